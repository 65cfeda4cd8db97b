"""What is counted of a model whatever the machine: its tensors in every weight format, for every placement."""

from __future__ import annotations

from functools import lru_cache

from harness.architecture.model_spec import ModelSpec
from harness.architecture.skeleton import Skeleton, Weight
from harness.core.attention import KV_FORMS
from harness.core.precisions import Precision
from harness.core.records import Workload
from harness.planning.calibration import Calibration
from harness.planning.cost import estimate
from harness.planning.cost.footprint import Footprint, Loading, Tiers
from harness.planning.cost.inventory import Inventory
from harness.planning.cost.memory import WeightFormat
from harness.planning.device_map.max_memory import Named, Sizes, Stock

# Of a model in some precisions on some cards, by a few contexts.
_MOST_FOOTPRINTS = 1024


class Counted:
    """One model, counted once for all machines that it is planned on."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self._inventories: dict[WeightFormat, Inventory] = {}
        self._formats: dict[tuple[str, str, bool], WeightFormat] = {}
        self._sizes: dict[WeightFormat | int, Sizes] = {}
        self._weights: dict[str, Weight] = {}
        #: what a case takes, whatever the machine has; to be cleared once its activations are traced
        self.footprint = lru_cache(maxsize=_MOST_FOOTPRINTS)(self._footprint)

    def weight_format(self, precision: Precision, dtype: str, *, on_cards: bool) -> WeightFormat:
        """Return the format in which a precision, as it holds of this model, keeps its weights."""
        key = (precision.name, dtype, on_cards)
        if key not in self._formats:
            self._formats[key] = estimate.weight_format(precision, dtype, self.spec, on_cards=on_cards)
        return self._formats[key]

    def inventory(self, fmt: WeightFormat) -> Inventory:
        """Return its tensors in a format."""
        if fmt not in self._inventories:
            self._inventories[fmt] = Inventory(self.spec, fmt)
        return self._inventories[fmt]

    def _footprint(
        self, fmt: WeightFormat, tiers: Tiers, workload: Workload, calibration: Calibration, loading: Loading, kv: str
    ) -> Footprint:
        inventory = self.inventory(fmt)
        placed = tiers if isinstance(tiers, str) else dict(zip(inventory.paths, tiers, strict=True))
        return Footprint(inventory, placed, workload, calibration, loading, KV_FORMS[kv])

    def sizes(self, fmt: WeightFormat) -> Sizes:
        """Return the bytes of its blocks, and of what lies outside of them, as a placement's own limits go by them."""
        key = fmt if fmt.packed_bits is not None else fmt.element_bytes  # limits go by what is stored
        if key not in self._sizes:
            self._weights = self._weights or _weights_by_path(self.spec.skeleton)
            stock = Stock([Named(path, weight.tensor.shape) for path, weight in self._weights.items()])
            sizes = self.inventory(fmt).sizes if fmt.packed_bits is not None else {}
            packed = {path: sizes[weight.path] for path, weight in self._weights.items()} if sizes else None
            self._sizes[key] = Sizes(stock, fmt.dtype, packed)
        return self._sizes[key]


@lru_cache(maxsize=16)
def count_model(spec: ModelSpec) -> Counted:
    """Return what is counted of a model; of the last ones, each in some forms, it is kept."""
    return Counted(spec)


def _weights_by_path(skeleton: Skeleton) -> dict[str, Weight]:
    """Return the weights of a model by their path, each as that of the first piece of its kind; tied ones are left out."""
    inside = {like: [w for module in like.inside for w in module.weights if not w.tied_to] for _, _, like in skeleton.pieces}
    return {f"{path}{w.path.removeprefix(like.path)}": w for path, _, like in skeleton.pieces for w in inside[like]}
