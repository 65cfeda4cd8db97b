"""PLACEMENTS: where weights can go and by which call, fastest place first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from harness.core.records import Record

# Device maps that are printed in full, for transformers knows no such words: one that we compute (`device_map.recommended`), one
# that the user wrote (`harness.planning.device_map.user_map`).
RECOMMENDED_MAP = "room"
USER_MAP = "given"
EXPLICIT_MAPS = (RECOMMENDED_MAP, USER_MAP)
FILE = "file"  # the placement of the latter
# The trait of such a map that has parts off the GPUs: a precision may hold those in another way.
SPLITS_DEVICES = "divides"


class Placement(Record, frozen=True, kw_only=True):
    """One row of the table: how the model is loaded, and where its weights may go."""

    name: str
    title: str
    help: str
    call: str  #: "from_pretrained", "load_checkpoint_and_dispatch", or "to" (load in RAM, then move)
    device_map: str | Mapping[str, str | int] | None  #: passed on unchanged, except RECOMMENDED_MAP and USER_MAP
    devices: tuple[str, ...]  #: where the weights may go, fastest first
    limits: str | None = None  #: the rule that computes `max_memory` (`max_memory.LIMITS`); None passes none
    traits: tuple[str, ...] = ()  #: what a precision may be incompatible with
    least_gpus: int = 0  #: the number of GPUs that it needs
    on_fewer: str | None = (
        None  #: why it is skipped on fewer GPUs, such as what it is identical to; None if it is unavailable there
    )
    on_request: bool = False  #: runs only if it is named
    parallel: int = 0  #: one process per GPU, each with a part of every layer; without a GPU this number of processes in RAM
    offload_folder: bool = False  #: passes a folder for weights that are offloaded to disk

    @property
    def needs_gpu(self) -> bool:
        return self.least_gpus > 0 and not self.parallel

    def lacks_gpus(self, gpus: int) -> bool:
        """Say whether a machine with this number of GPUs has too few."""
        return gpus < self.least_gpus and (gpus > 0 or self.needs_gpu)

    def ranks(self, gpus: int) -> int:
        """Return the number of processes that hold the model on a machine with this number of GPUs."""
        return (gpus or self.parallel) if self.parallel else 1

    def given(self, device_map: Mapping[str, str | int]) -> Placement:
        """Return this row with the user's device map, which decides the devices and what a precision may refuse.

        The map is not checked here.
        """
        kinds = {device if isinstance(device, str) else "gpu" for device in device_map.values()}
        traits = {
            SPLITS_DEVICES: "gpu" in kinds and len(kinds) > 1,
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
        if self.device_map is not None and self.device_map not in EXPLICIT_MAPS:
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
        call="from_pretrained",
        device_map={"": 0},
        devices=("gpu",),
        least_gpus=1,
    ),
    Placement(
        name="ram-to-gpu",
        title="RAM, then GPU",
        help='load into RAM, then .to("cuda"): the former default, for comparison',
        call="to",
        device_map={"": "cpu"},
        devices=("gpu",),
        least_gpus=1,
    ),
    Placement(
        name="auto",
        title="auto",
        help='device_map="auto" without max_memory: GPUs first, then RAM, then disk',
        call="from_pretrained",
        device_map="auto",
        devices=("gpu", "cpu", "disk"),
    ),
    Placement(
        name="balanced",
        title="balanced",
        help='device_map="balanced": an even share of the weights for each GPU; identical to auto in transformers 5',
        call="from_pretrained",
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
        call="from_pretrained",
        device_map="balanced_low_0",
        devices=("gpu", "cpu", "disk"),
        least_gpus=2,
        on_fewer=_AUTO_THERE,
    ),
    Placement(
        name="sequential",
        title="one GPU after another",
        help='device_map="sequential": fills one GPU after another',
        call="from_pretrained",
        device_map="sequential",
        devices=("gpu", "cpu", "disk"),
        least_gpus=2,
        on_fewer=f"{_AUTO_THERE}, except that it does not keep a tenth of the GPU free",
    ),
    Placement(
        name="recommended",
        title="computed device map",
        help="device_map computed by fitmatrix: blocks fill the GPUs in order, with room for their KV cache and for inference",
        call="from_pretrained",
        device_map=RECOMMENDED_MAP,
        devices=("gpu", "cpu", "disk"),
        least_gpus=1,
        on_fewer="identical to cpu without a GPU",
    ),
    Placement(
        name="dispatch",
        title="accelerate's dispatch",
        help="init_empty_weights + load_checkpoint_and_dispatch: accelerate's own loader",
        call="load_checkpoint_and_dispatch",
        device_map="auto",
        devices=("gpu", "cpu", "disk"),
        traits=("dispatches",),
        offload_folder=True,
    ),
    Placement(
        name="gpu+cpu",
        title="GPU + RAM",
        help="max_memory leaves room on the GPU for inference; the remaining weights are offloaded to RAM",
        call="from_pretrained",
        device_map="auto",
        devices=("gpu", "cpu"),
        limits="spill-to-cpu",
        traits=("offloads_to_cpu",),
        least_gpus=1,
    ),
    Placement(
        name="disk",
        title="GPU + RAM + disk",
        help="GPU (if any), then RAM, then disk; max_memory is set so that some blocks are offloaded to disk",
        call="from_pretrained",
        device_map="auto",
        devices=("gpu", "cpu", "disk"),
        limits="spill-to-disk",
        traits=("offloads_to_cpu", "offloads"),
        offload_folder=True,
    ),
    Placement(
        name="cpu",
        title="RAM only",
        help='device_map={"": "cpu"}: everything in RAM',
        call="from_pretrained",
        device_map={"": "cpu"},
        devices=("cpu",),
        traits=("ram",),
    ),
    Placement(
        name="tp",
        title="tensor parallel",
        help="tensor parallelism, as with torchrun: one process per GPU, each with part of every layer (without a GPU: two in RAM)",
        call="from_pretrained",
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
        call="from_pretrained",
        device_map=USER_MAP,
        devices=("gpu", "cpu", "disk"),
        on_request=True,
    ),
)

PLACEMENTS: Mapping[str, Placement] = {row.name: row for row in _ROWS}


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
