"""PLACEMENTS: where weights can go and by which call, fastest place first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from harness.case import Record

# A device map that we compute (`harness.roommap`) and print in full; transformers knows no such word.
ROOM = "room"


class Placement(Record, frozen=True, kw_only=True):
    """One row of the table.

    `call` is the way of loading: "from_pretrained", "load_checkpoint_and_dispatch", or "to" (load in RAM, then move).
    `device_map` is passed on as it is, but for ROOM. `limits` names the rule that computes `max_memory` (`harness.plan.LIMITS`):
    None passes none. `traits` are what a precision may refuse. `devices` are where the weights may end up, best first.
    `without_gpu` names the placement that it is the same as where there is no GPU: it is no case of its own there.
    """

    name: str
    title: str
    help: str
    call: str
    device_map: str | Mapping[str, str | int] | None
    devices: tuple[str, ...]
    limits: str | None = None
    traits: tuple[str, ...] = ()
    needs_gpu: bool = False
    offload_folder: bool = False
    without_gpu: str | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments that the loader takes from this row."""
        given: dict[str, Any] = {}
        if self.device_map is not None and self.device_map != ROOM:
            given["device_map"] = self.device_map if isinstance(self.device_map, str) else dict(self.device_map)
        if self.offload_folder:
            given["offload_folder"] = "offload"
        return given


_ROWS = (
    Placement(
        name="direct",
        title="straight to the GPU",
        help='device_map={"": 0}: onto the first GPU, without a copy of the model in RAM',
        call="from_pretrained",
        device_map={"": 0},
        devices=("gpu",),
        needs_gpu=True,
    ),
    Placement(
        name="ram-to-gpu",
        title="RAM, then GPU",
        help='load in RAM, then .to("cuda"): the old default, for comparison',
        call="to",
        device_map={"": "cpu"},
        devices=("gpu",),
        needs_gpu=True,
    ),
    Placement(
        name="auto",
        title="auto",
        help='device_map="auto" with no limits: GPUs first, then RAM, then disk',
        call="from_pretrained",
        device_map="auto",
        devices=("gpu", "cpu", "disk"),
    ),
    Placement(
        name="recommended",
        title="our device map",
        help="a device_map of ours: blocks fill the GPUs in order, each with its KV cache, and inference keeps the room it needs",
        call="from_pretrained",
        device_map=ROOM,
        devices=("gpu", "cpu", "disk"),
        needs_gpu=True,
        without_gpu="cpu",
    ),
    Placement(
        name="dispatch",
        title="accelerate's dispatch",
        help="init_empty_weights + load_checkpoint_and_dispatch: accelerate's own way",
        call="load_checkpoint_and_dispatch",
        device_map="auto",
        devices=("gpu", "cpu", "disk"),
        traits=("dispatches",),
        offload_folder=True,
    ),
    Placement(
        name="gpu+cpu",
        title="GPU + RAM",
        help="max_memory that leaves room on the GPU for inference, the rest of the weights in RAM",
        call="from_pretrained",
        device_map="auto",
        devices=("gpu", "cpu"),
        limits="spill-to-cpu",
        traits=("spills",),
        needs_gpu=True,
    ),
    Placement(
        name="disk",
        title="GPU + RAM + disk",
        help="GPU if there is one, then RAM, then disk; limited so that some blocks really lie on disk",
        call="from_pretrained",
        device_map="auto",
        devices=("gpu", "cpu", "disk"),
        limits="spill-to-disk",
        traits=("spills", "offloads"),
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
)

PLACEMENTS: Mapping[str, Placement] = {row.name: row for row in _ROWS}


def distinct(names: Iterable[str], has_gpu: bool) -> list[str]:
    """Leave out the placements that are the same as another on this machine."""
    return [name for name in names if has_gpu or PLACEMENTS[name].without_gpu is None]
