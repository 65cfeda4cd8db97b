"""PLACEMENTS: where weights can go and how they get there, fastest place first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from harness.core.records import Record

# Device maps that are printed in full, for transformers knows no such words: one that we compute (`device_map.recommended`), one
# that the user wrote (`harness.planning.device_map.user_map`).
RECOMMENDED_MAP = "room"
USER_MAP = "given"
_EXPLICIT_MAPS = (RECOMMENDED_MAP, USER_MAP)
FILE = "file"  # the placement of the latter
_SPLITS_DEVICES = "divides"


class Placement(Record, frozen=True, kw_only=True):
    """One row of the table: what it is called, how it loads, where weights may end up, and what a machine needs for it."""

    name: str
    title: str
    help: str
    device_map: str | Mapping[str, str | int] | None  #: passed on as it is, except RECOMMENDED_MAP and USER_MAP
    devices: tuple[str, ...]  #: where the weights may end up, best first
    limits: str | None = None  #: the rule that computes `max_memory` (`max_memory.LIMITS`); None passes none
    traits: tuple[str, ...] = ()  #: what a precision may refuse
    least_gpus: int = 0
    on_fewer: str | None = None  #: what it is the same as on fewer GPUs, where it is skipped
    on_request: bool = False  #: no part of a matrix unless it is named
    parallel: int = 0  #: a process for each GPU, which share every layer; without a GPU this many share the RAM
    offload_folder: bool = False
    moves_after_loading: bool = False  #: loads in RAM, then `.to("cuda")`
    dispatches_stored: bool = False  #: load_checkpoint_and_dispatch on a directory, not from_pretrained
    takes_all_ram: bool = False  #: fills the RAM without the margin that transformers keeps
    rewrites_offloaded: bool = False  #: writes what stays on the disk into the offload folder, whatever the files are
    first_gpu_only: bool = False  #: leaves every GPU but one empty: the first, unless another has more memory
    experts_in_ram: bool = False  #: what is routed and does not fit on the GPU lies in RAM, where the processor multiplies with it
    gpu: int = 0  #: the number of that one
    writes_inferred_map: bool = False  #: its code has the map that accelerate infers from limits, not the limits

    @property
    def map_is_recommended(self) -> bool:
        """Whether its map is computed here (`device_map.recommended`)."""
        return self.device_map == RECOMMENDED_MAP

    @property
    def map_is_missing(self) -> bool:
        """Whether its map is the user's, who gave none (`filled` puts it in)."""
        return self.device_map == USER_MAP

    @property
    def prints_map(self) -> bool:
        """Whether its code names a tier for every module: transformers has no word for such a map."""
        return self.writes_inferred_map or self.experts_in_ram or self.device_map in _EXPLICIT_MAPS

    @property
    def splits_devices(self) -> bool:
        """Whether its explicit map has parts on a GPU and parts elsewhere: a precision may hold those in another way."""
        return _SPLITS_DEVICES in self.traits

    @property
    def needs_gpu(self) -> bool:
        return self.least_gpus > 0 and not self.parallel

    def lacks_gpus(self, gpus: int) -> bool:
        """Say whether a machine with this many GPUs has too few."""
        return gpus < self.least_gpus and (gpus > 0 or self.needs_gpu)

    def ranks(self, gpus: int) -> int:
        """Return how many processes hold the model on a machine with this many GPUs."""
        return (gpus or self.parallel) if self.parallel else 1

    def on(self, gpu: int) -> Placement:
        """Return this row with another GPU than the first, where it uses one alone."""
        if not self.first_gpu_only or gpu == 0:
            return self
        placed = self.device_map
        if isinstance(placed, Mapping):
            placed = {path: gpu if device == 0 else device for path, device in placed.items()}
        return msgspec.structs.replace(self, gpu=gpu, device_map=placed)

    def mapped(self, gpus: int) -> Placement:
        """Return this row as it loads weights that transformers leaves off the GPUs of an explicit map alone, and there in 16 bits.

        What limits would send off the GPUs is written out as a map; without a GPU, and where neither limits nor a computed map may
        leave anything off it, the row stays as it is.
        """
        if not (gpus or self.needs_gpu) or not (self.limits or self.map_is_recommended):
            return self
        traits = (_SPLITS_DEVICES, *(trait for trait in self.traits if trait != "offloads_to_cpu"))
        return msgspec.structs.replace(self, traits=traits, writes_inferred_map=self.limits is not None)

    def filled(self, device_map: Mapping[str, str | int]) -> Placement:
        """Return this row as one file fills it: an explicit map says which devices are used, and what a precision may refuse.

        The map is not checked here.
        """
        kinds = {device if isinstance(device, str) else "gpu" for device in device_map.values()}
        traits = {
            _SPLITS_DEVICES: "gpu" in kinds and len(kinds) > 1,
            "offloads_to_cpu": kinds == {"cpu", "disk"},
            "offloads": "disk" in kinds,
            "ram": kinds == {"cpu"},
        }
        return msgspec.structs.replace(
            self,
            device_map=device_map,
            devices=tuple(kind for kind in ("gpu", "cpu", "disk") if kind in kinds),
            traits=tuple(trait for trait, is_so in traits.items() if is_so),
            offload_folder="disk" in kinds,
        )

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments that the loader takes from this row."""
        given: dict[str, Any] = {}
        if self.device_map is not None and not self.prints_map:
            given["device_map"] = self.device_map if isinstance(self.device_map, str) else dict(self.device_map)
        if self.offload_folder:
            given["offload_folder"] = "offload"
        if self.parallel:
            given["distributed_config"] = {"tp_plan": "auto"}
        return given


_AUTO_THERE = "identical to auto with fewer than two GPUs"

_ROWS = (
    Placement(
        name="direct",
        title="straight to the GPU",
        help='device_map={"": 0}: load straight onto the first GPU, without a copy of the model in RAM',
        device_map={"": 0},
        devices=("gpu",),
        least_gpus=1,
        first_gpu_only=True,
    ),
    Placement(
        name="ram-to-gpu",
        title="RAM, then GPU",
        help='load into RAM, then .to("cuda"): the former default, for comparison',
        device_map={"": "cpu"},
        devices=("gpu",),
        least_gpus=1,
        moves_after_loading=True,
        first_gpu_only=True,
    ),
    Placement(
        name="auto",
        title="GPU first, then RAM",
        help='device_map="auto" without max_memory: GPUs first, then RAM, then disk',
        device_map="auto",
        devices=("gpu", "cpu", "disk"),
    ),
    Placement(
        name="balanced",
        title="an even share for each GPU",
        help='device_map="balanced": an even share of the weights for each GPU; identical to auto in transformers 5',
        device_map="balanced",
        devices=("gpu", "cpu", "disk"),
        least_gpus=2,
        on_fewer=_AUTO_THERE,
        on_request=True,
    ),
    Placement(
        name="balanced_low_0",
        title="balanced, first GPU kept free",
        help='device_map="balanced_low_0": balanced over the other GPUs; the first one gets only what they cannot hold',
        device_map="balanced_low_0",
        devices=("gpu", "cpu", "disk"),
        least_gpus=2,
        on_fewer=_AUTO_THERE,
    ),
    Placement(
        name="sequential",
        title="one GPU after another",
        help='device_map="sequential": fills one GPU after another',
        device_map="sequential",
        devices=("gpu", "cpu", "disk"),
        least_gpus=2,
        on_fewer=f"{_AUTO_THERE}, except that it does not keep a tenth of the GPU free",
    ),
    Placement(
        name="recommended",
        title="computed device map",
        help="device_map computed by fitmatrix: blocks fill the GPUs in order, with room for their KV cache and for inference",
        device_map=RECOMMENDED_MAP,
        devices=("gpu", "cpu", "disk"),
        least_gpus=1,
        on_fewer="identical to cpu without a GPU",
    ),
    Placement(
        name="dispatch",
        title="accelerate's dispatch",
        help="init_empty_weights + load_checkpoint_and_dispatch: accelerate's own loader",
        device_map="auto",
        devices=("gpu", "cpu", "disk"),
        traits=("dispatches",),
        offload_folder=True,
        dispatches_stored=True,
        takes_all_ram=True,
        rewrites_offloaded=True,
    ),
    Placement(
        name="gpu+cpu",
        title="GPU + RAM",
        help="max_memory leaves room on the GPU for inference; the remaining weights are offloaded to RAM",
        device_map="auto",
        devices=("gpu", "cpu"),
        limits="spill-to-cpu",
        traits=("offloads_to_cpu",),
        least_gpus=1,
        first_gpu_only=True,
    ),
    Placement(
        name="experts-in-ram",
        title="GPU, experts in RAM",
        help="routed experts of the last blocks in RAM, multiplied there; all else on the GPU",
        device_map={"": "cpu"},
        devices=("gpu", "cpu"),
        least_gpus=1,
        on_request=True,
        first_gpu_only=True,
        experts_in_ram=True,
    ),
    Placement(
        name="disk",
        title="GPU + RAM + disk",
        help="GPU (if any), then RAM, then disk; max_memory is set so that some blocks are offloaded to disk",
        device_map="auto",
        devices=("gpu", "cpu", "disk"),
        limits="spill-to-disk",
        traits=("offloads_to_cpu", "offloads"),
        offload_folder=True,
        first_gpu_only=True,
    ),
    Placement(
        name="cpu",
        title="RAM only",
        help='device_map={"": "cpu"}: everything in RAM',
        device_map={"": "cpu"},
        devices=("cpu",),
        traits=("ram",),
    ),
    Placement(
        name="tp",
        title="tensor parallel",
        help="tensor parallelism, as with torchrun: one process per GPU, each with part of every layer (without a GPU: two in RAM)",
        device_map=None,
        devices=("gpu", "cpu"),
        traits=("parallel",),
        least_gpus=2,
        on_fewer="tensor parallelism splits every layer over at least two GPUs, and this machine has one",
        on_request=True,
        parallel=2,
    ),
    Placement(
        name=FILE,
        title="custom device map",
        help="your own device_map, read from --device-map FILE",
        device_map=USER_MAP,
        devices=("gpu", "cpu", "disk"),
        on_request=True,
    ),
)

PLACEMENTS: Mapping[str, Placement] = {row.name: row for row in _ROWS}


def plainness(placement: str) -> int:
    """Return the place of a placement among those that do the same: the plainest call comes first, what is no longer known last."""
    order = ("direct", "cpu", "auto", *PLACEMENTS)
    return order.index(placement) if placement in PLACEMENTS else len(order)


def distinct(names: Iterable[str], gpus: int) -> list[str]:
    """Leave out the placements that are identical to another on a machine with this number of GPUs, and those on request."""
    rows = [PLACEMENTS[name] for name in names]
    return [row.name for row in rows if not row.on_request and (gpus >= row.least_gpus or row.on_fewer is None)]


def named(given: Iterable[str] | None, has_file: bool) -> list[str]:
    """Return the placements that were asked for in the table's order; none if all that differ are meant.

    A custom device map is asked for by being given: alone, if nothing else is named.
    """
    wanted = {*(given or ()), *([FILE] if has_file else ())}
    return [name for name in PLACEMENTS if name in wanted]
