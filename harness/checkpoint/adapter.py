"""LoRA adapters as peft keeps them: which model one belongs to, and the matrices that it adds to which modules, from its header."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from harness.checkpoint.auxiliary_files import ADAPTER
from harness.checkpoint.formats.files import Directory, Folder, quote
from harness.checkpoint.formats.safetensors_header import StoredTensor, parse_config, read_safetensors
from harness.core.errors import CheckpointError, HarnessError
from harness.core.precisions import Precision
from harness.core.quantizers import SCHEMES
from harness.core.records import Record

ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODULE = "peft"  # what transformers' load_adapter asks to be installed
_CONFIG = "config.json"
_TASK = "CAUSAL_LM"
_MERGE = "merge it into a copy of its base (merge_and_unload of peft), and give that"
# Types of peft without merge_and_unload: what they learned is put before a prompt or into attention, not into weights.
_UNMERGED = ("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")
_BY_PEFT = "peft itself loads it onto its base (PeftModel.from_pretrained), and no copy of the base can hold it"
_LEFT_OFF = "transformers fills no adapter of layers that lie outside of the memory they run in, and answers wrongly"
# What loading refuses, by the trait of a placement.
REFUSES: Mapping[str, str] = {
    "offloads_to_cpu": f"{_LEFT_OFF}: merge the adapter into a copy of its base first",
    "dispatches": "load_checkpoint_and_dispatch knows no adapters: merge the adapter into a copy of its base first",
    "parallel": "tensor parallelism is untested with adapters: merge the adapter into a copy of its base first",
}
MOVED = "modules are moved after loading, away from where transformers puts an adapter: merge it into a copy of its base first"
ON_OTHERS = "adapters are measured on plain weights and those of bitsandbytes alone: take bf16, fp16, fp32, int8 or int4"
# peft puts the module that it wraps below two of its own.
_MATRIX = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Settings by which an adapter is more than two matrices beside a Linear, or changes the base itself.
_MORE = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "modules_to_save", "monteclora_config",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "velora_config",
)  # fmt: skip


class LoraModule(Record, frozen=True, kw_only=True):
    """What one module of the base gets: matrices of `rank` x `inputs` and `outputs` x `rank`."""

    rank: int
    inputs: int
    outputs: int

    @property
    def elements(self) -> int:
        return self.rank * (self.inputs + self.outputs)


class Adapter(Record, frozen=True, kw_only=True):
    """A LoRA in a directory `path`, made for the model `base`; `modules` go by their path in the base as the adapter names it."""

    path: str
    base: str
    rank: int
    alpha: float | None
    targets: tuple[str, ...]  #: the last names of the modules
    modules: dict[str, LoraModule]
    tensors: tuple[StoredTensor, ...]
    file_bytes: int

    @property
    def elements(self) -> int:
        """How many weights it adds."""
        return sum(module.elements for module in self.modules.values())

    @property
    def bytes(self) -> int:
        """What its tensors take in the file."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def dtype(self) -> str:
        """The dtype of its tensors in the file."""
        return self.tensors[0].dtype

    def __str__(self) -> str:
        scale = f", alpha {self.alpha:g}" if self.alpha is not None else ""
        return f"LoRA of rank {self.rank}{scale} on {', '.join(self.targets)}"


def under_adapter(row: Precision) -> Precision:
    """Return the row of a precision as it holds of weights that an adapter is loaded onto."""
    others = row.quantizes and not (row.scheme is not None and SCHEMES[row.scheme].adapted)
    return replace(
        row,
        needs=(*row.needs, MODULE),
        incompatible={**row.incompatible, **REFUSES},
        unsupported=row.unsupported or (ON_OTHERS if others else None),
    )


def is_adapter(path: Path) -> bool:
    """Say whether a directory holds an adapter and no model of its own."""
    folder = Directory(path)
    return folder.size(ADAPTER) is not None and folder.size(_CONFIG) is None


def read_adapter(path: Path) -> Adapter:
    """Read an adapter from its config and the header of its weights.

    Raises:
        CheckpointError: a file is missing or damaged, or it is more than LoRA; the sentence says what to do.
    """
    folder = Directory(path)
    with closing(folder.open(ADAPTER)) as blob:
        config = parse_config(blob)
    base = config.get("base_model_name_or_path")
    _check_kind(folder, config)
    if not isinstance(base, str) or not base:
        raise _fault(folder, ADAPTER, "names no base_model_name_or_path: write the hub id or directory of its base there")
    if folder.size(ADAPTER_WEIGHTS) is None:
        way = "download the adapter again, whole, or save one of other files anew by peft's save_pretrained"
        raise _fault(folder, "", f"is an adapter without {ADAPTER_WEIGHTS}: {way}")
    with closing(folder.open(ADAPTER_WEIGHTS)) as blob:
        tensors, size = tuple(read_safetensors(blob)), blob.size
    modules = _modules(folder, tensors)
    alpha = config.get("lora_alpha")
    return Adapter(
        path=str(path),
        base=base,
        rank=max(module.rank for module in modules.values()),
        alpha=alpha if isinstance(alpha, int | float) else None,
        targets=tuple(sorted({name.rpartition(".")[2] for name in modules})),
        modules=modules,
        tensors=tensors,
        file_bytes=size,
    )


def without_base(directory: Path | str, base: str, error: HarnessError) -> CheckpointError:
    """Return the error for an adapter whose base cannot be had, which names it and says what to do."""
    way_out = f"write where it is as base_model_name_or_path into {ADAPTER}"
    return CheckpointError(directory, f"is an adapter for {quote(base)}, and that is not to be had ({error}): {way_out}")


def _fault(folder: Folder, file: str, message: str) -> CheckpointError:
    return CheckpointError(f"{folder.where}/{file}" if file else folder.where, message)


def _check_kind(folder: Folder, config: Mapping[str, Any]) -> None:
    """Refuse what is no LoRA, and what is more than that. Raises CheckpointError."""
    kind = config.get("peft_type")
    if kind != "LORA":
        way = _BY_PEFT if kind in _UNMERGED else _MERGE
        raise _fault(folder, ADAPTER, f"is an adapter of the type {quote(kind)}, and LORA is what can be planned: {way}")
    task = config.get("task_type")
    if task not in (None, _TASK):
        what = f"is an adapter for the task {quote(task)}, and only models are measured that continue a text ({_TASK})"
        raise _fault(folder, ADAPTER, f"{what}: peft's own classes load it")
    more = next((key for key in _MORE if config.get(key)), None)
    if more is not None:
        raise _fault(folder, ADAPTER, f"sets {more}, so it is more than LoRA beside Linear modules: {_MERGE}")


def _modules(folder: Folder, tensors: tuple[StoredTensor, ...]) -> dict[str, LoraModule]:
    """Pair the two matrices of each module. Raises CheckpointError."""
    sides: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for tensor in tensors:
        found = _MATRIX.fullmatch(tensor.name)
        if found is None or len(tensor.shape) != 2:
            raise _fault(folder, ADAPTER_WEIGHTS, f"holds {quote(tensor.name)}, which is no LoRA matrix of a Linear: {_MERGE}")
        sides[found["module"]][found["side"]] = tensor.shape
    if not sides:
        raise _fault(folder, ADAPTER_WEIGHTS, "holds no tensors: download the adapter again")
    for name, pair in sides.items():
        if pair.keys() != {"A", "B"} or pair["A"][0] != pair["B"][1] or not math.prod(pair["A"]):
            raise _fault(folder, ADAPTER_WEIGHTS, f"holds no pair of matrices for {quote(name)}: download the adapter again")
    return {name: LoraModule(rank=pair["A"][0], inputs=pair["A"][1], outputs=pair["B"][0]) for name, pair in sides.items()}
