"""Cases x machine -> plans: what can work here, and the code that loads it."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.case import Case, Machine, Plan, Tier, Verdict
from harness.devicemap import MARGIN, STRATEGIES, found_free
from harness.placement import DIVIDES, PLACEMENTS, PRINTED, Placement
from harness.precision import PRECISIONS, Config, Precision
from harness.units import exact_size, format_size

if TYPE_CHECKING:
    from harness.catalog import Source
    from harness.checkpoint import Checkpoint

_BLOCK = re.compile(r"\.(\d+)\.")
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def gate(case: Case, machine: Machine, here: bool = True, placement: Placement | None = None) -> tuple[Verdict, str] | None:
    """Return the verdict and reason of a case that cannot run, from the tables alone; None if it may.

    What cannot work anywhere is invalid; what this machine or its packages lack is unavailable. `here` is False for a machine that
    was only described: what is installed on this one says nothing about it. `placement` stands for the row of that name.
    """
    precision, placement = PRECISIONS[case.precision], placement or PLACEMENTS[case.placement]
    if precision.never:
        return Verdict.INVALID, precision.never
    # Without a GPU what may use one lies in RAM alone.
    for trait in placement.traits if machine.gpus or placement.needs_gpu else (*placement.traits, "ram"):
        if trait in precision.refuses:
            return Verdict.INVALID, precision.refuses[trait]
    if placement.lacks_gpus(len(machine.gpus)):
        return Verdict.UNAVAILABLE, placement.on_fewer or "needs a GPU, and NVML knows none here"
    if beyond := _beyond(case, machine):
        return Verdict.UNAVAILABLE, beyond
    missing = [package for package in precision.needs if here and not _is_installed(package)]
    if missing:
        what = f"fitmatrix[{precision.extra}]" if precision.extra else missing[0]
        return Verdict.UNAVAILABLE, f"needs the package {missing[0]}: pip install {what}"
    return _too_old(precision, placement, machine)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def _beyond(case: Case, machine: Machine) -> str | None:
    """Say why a limit cannot be emulated here: there must be at least as much memory, else the result is of another size."""
    if case.vram_bytes is not None and not machine.gpus:
        return f"--vram {exact_size(case.vram_bytes)} limits a GPU, and NVML knows none here"
    for tier in machine.tiers:
        option, limit = {"gpu": ("--vram", case.vram_bytes), "cpu": ("--ram", case.ram_bytes)}.get(tier.kind, ("", None))
        there = tier.total_bytes if tier.free_bytes is None else tier.free_bytes
        if limit is not None and there is not None and limit > there:
            return f"{option} {exact_size(limit)} is more than {tier.name} has free, {format_size(there)}"
    return None


def _too_old(precision: Precision, placement: Placement, machine: Machine) -> tuple[Verdict, str] | None:
    if placement.devices[0] != "gpu" or not machine.gpus:
        return None
    least = precision.min_compute_capability
    for gpu in _used(placement, machine):
        if gpu.compute_capability is not None and float(gpu.compute_capability) < least:
            have = f"{gpu.model or gpu.name} has {gpu.compute_capability}"
            return Verdict.UNAVAILABLE, f"{precision.name} needs compute capability {least}, and {have}"
    return None


def _used(placement: Placement, machine: Machine) -> Sequence[Tier]:
    """Return the GPUs that a placement may put weights on."""
    if isinstance(placement.device_map, Mapping) and placement.call != "to":
        return [gpu for number, gpu in enumerate(machine.gpus) if number in placement.device_map.values()]
    return machine.gpus if placement.limits is None and placement.call != "to" else machine.gpus[:1]


class Named(NamedTuple):
    """A tensor by name and shape."""

    name: str
    shape: tuple[int, ...]


class Stock(NamedTuple):
    """The tensors of a model of which there is no checkpoint."""

    tensors: Sequence[Named]


class Sizes:
    """Bytes of a model's weights in one 16- or 32-bit dtype: the largest tensor outside the blocks, and the blocks."""

    def __init__(self, weights: Checkpoint | Stock, dtype: str) -> None:
        blocks: dict[str, int] = defaultdict(int)
        outside = [0]
        for tensor in weights.tensors:
            count = math.prod(tensor.shape)
            block = _BLOCK.search(tensor.name)
            if block:
                blocks[tensor.name[: block.end() - 1]] += count * _DTYPE_BYTES[dtype]
            else:
                outside.append(count * _DTYPE_BYTES[dtype])
        self.outside_bytes, self.blocks_bytes = max(outside), sum(blocks.values())
        # The placement algorithm keeps room for the largest layer on every device from which it spills to the disk.
        self.room_bytes = max(self.outside_bytes, max(blocks.values(), default=0))


def _spill_to_cpu(sizes: Sizes, machine: Machine) -> dict[str, int]:
    """Let about 60 % of the blocks live on the first GPU, less where three quarters of it do not hold them; the rest in RAM."""
    wanted = sizes.outside_bytes + sizes.blocks_bytes * 6 // 10 + sizes.room_bytes
    gpu, cpu = machine.gpus[0], machine.tier("cpu")
    return {
        gpu.name: min(wanted, (gpu.capacity_bytes or wanted) * 3 // 4),
        "cpu": (cpu.capacity_bytes if cpu else None) or 1 << 40,
    }


def _spill_to_disk(sizes: Sizes, machine: Machine) -> dict[str, int]:
    """Let the fast tiers hold the embedding and half of the blocks between them; the other half stays on the disk."""
    if not machine.gpus:
        return {"cpu": sizes.outside_bytes + sizes.blocks_bytes // 2 + sizes.room_bytes}
    gpu = machine.gpus[0]
    wanted = sizes.outside_bytes + sizes.blocks_bytes // 4 + sizes.room_bytes
    return {
        gpu.name: min(wanted, (gpu.capacity_bytes or wanted) * 3 // 4),
        "cpu": sizes.blocks_bytes // 4 + sizes.room_bytes,
    }


def max_memory(placement: Placement, machine: Machine, sizes: Callable[[], Sizes]) -> dict[str, int] | None:
    """Return the `max_memory` to load with: by the placement's own rule, or so that transformers heeds limits that it does not see.

    None where the libraries may look for themselves. Under a limit they are given what they would take of a machine of that size.
    """
    if placement.limits is not None:
        return LIMITS[placement.limits](sizes(), machine)
    tiers = [tier for tier in machine.tiers if tier.kind in ("gpu", "cpu") and tier.capacity_bytes is not None]
    if placement.device_map not in STRATEGIES or all(tier.limit_bytes is None for tier in tiers):
        return None
    takes_all = {"cpu": placement.call == "load_checkpoint_and_dispatch", "gpu": len(machine.gpus) > 1}
    return {tier.name: int((found_free(tier) or 0) * (1.0 if takes_all[tier.kind] else MARGIN)) for tier in tiers}


LIMITS: Mapping[str, Callable[[Sizes, Machine], dict[str, int]]] = {
    "spill-to-cpu": _spill_to_cpu,
    "spill-to-disk": _spill_to_disk,
}


def decide(case: Case, machine: Machine, checkpoint: Checkpoint | None) -> Plan:
    """Plan one case from the tables. A case that needs sizes has no code without a checkpoint, nor one whose map is computed."""
    refused = gate(case, machine)
    if refused:
        return Plan(case=case, verdict=refused[0], why=refused[1])
    precision, placement = PRECISIONS[case.precision], PLACEMENTS[case.placement]
    on_gpu = placement.devices[0] == "gpu" and machine.gpus
    dtype = precision.dtype_on(machine.gpus[0].compute_capability if on_gpu else None)
    if placement.device_map in PRINTED or (placement.limits and checkpoint is None):
        return Plan(case=case, verdict=Verdict.UNKNOWN)
    limits = max_memory(placement, machine, lambda: Sizes(checkpoint or Stock([]), dtype))
    return Plan(
        case=case,
        verdict=Verdict.UNKNOWN,
        code=loading_code(precision, placement, dtype, limits, on_gpu=bool(on_gpu)),
        max_memory=limits,
    )


def loading_code(
    precision: Precision,
    placement: Placement,
    dtype: str,
    max_memory: Mapping[str, int] | None,
    *,
    device_map: Mapping[str, str | int] | None = None,
    gguf_file: str | None = None,
    stored: bool = False,
    ours: bool = False,
    on_gpu: bool = False,
    trusted: bool | None = None,
) -> str:
    """Write Python that loads the model named by MODEL into `model`; what a case runs is exactly this text.

    `device_map` gives tiers by module: it is printed for a placement whose map is computed here.
    What is `stored` quantised is loaded as it is, without a config; `ours` are the architectures of `harness.models`.
    Of a GGUF file a precision that quantises nothing asks for the weights unpacked: transformers' default depends on the machine.
    `trusted` says whether the model's own code may run, None where it has none. It is always said where there is some: left out,
    transformers would ask at the terminal.
    """
    arguments: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    arguments["dtype"] = dtype
    config = None if stored else precision.quantization if on_gpu else precision.quantization_on_cpu or precision.quantization
    if gguf_file and precision.quantization is None:
        arguments["quantization_config"] = {"quant_method": "gguf", "dequantize": True}
    elif isinstance(config, Config):
        arguments["quantization_config"] = config
    elif config is not None:
        off_gpu = precision.off_gpu if DIVIDES in placement.traits else None
        arguments["quantization_config"] = _quantization(config, dtype) | dict(off_gpu or {})
    arguments |= placement.arguments()
    if placement.device_map in PRINTED:
        assert device_map is not None, "its code cannot be written without the map"
        arguments["device_map"] = {path: _device(str(tier)) for path, tier in device_map.items()}
    if "disk" in (device_map or {}).values():  # where a file is not safetensors, transformers asks for it
        arguments["offload_folder"] = "offload"
    if max_memory is not None:
        arguments["max_memory"] = {_device(tier): size for tier, size in max_memory.items()}
    imports = ["import harness.models  # registers architectures that transformers lacks"] if ours else []
    given = config.imports if isinstance(config, Config) else ()
    if placement.call == "load_checkpoint_and_dispatch":
        return "\n".join([*imports, *_imports(*given), *_dispatch_code(arguments, trusted)]) + "\n"
    if trusted is not None:
        arguments["trust_remote_code"] = trusted
    imports += _imports("from transformers import AutoModelForCausalLM", *given)
    lines = [*imports, "", "model = AutoModelForCausalLM.from_pretrained(", "    MODEL,", *_written(arguments), ")"]
    if placement.call == "to":
        lines.append('model = model.to("cuda")')
    return "\n".join(lines) + "\n"


def _quantization(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    given = dict(config)
    if given.get("load_in_4bit"):
        given["bnb_4bit_compute_dtype"] = dtype
    return given


def _imports(*lines: str) -> list[str]:
    """Sort import lines by module, and join those from one module."""
    names: dict[str, set[str]] = defaultdict(set)
    for line in lines:
        module, _, name = line.removeprefix("from ").partition(" import ")
        names[module].add(name)
    return [f"from {module} import {', '.join(sorted(names[module]))}" for module in sorted(names)]


def _dispatch_code(arguments: Mapping[str, Any], trusted: bool | None) -> list[str]:
    dtype, trust = arguments["dtype"], _trust(trusted)
    return [
        "from accelerate import init_empty_weights, load_checkpoint_and_dispatch",
        "from transformers import AutoConfig, AutoModelForCausalLM",
        "",
        f"config = AutoConfig.from_pretrained(MODEL{trust})",
        "with init_empty_weights():",
        f"    model = AutoModelForCausalLM.from_config(config, dtype={_literal(dtype)}{trust})",
        "model.tie_weights()",
        "model = load_checkpoint_and_dispatch(",
        "    model,",
        "    MODEL,",
        *_written(arguments),
        "    no_split_module_classes=model._no_split_modules,",
        ")",
    ]


def _trust(trusted: bool | None) -> str:
    return "" if trusted is None else f", trust_remote_code={trusted}"


def _written(arguments: Mapping[str, Any]) -> list[str]:
    return [f"    {name}={_literal(value)}," for name, value in arguments.items()]


def _literal(value: Any) -> str:
    """Write a value as Python with double quotes; JSON escapes a string as Python reads it; so is what cannot be seen."""
    if isinstance(value, Config):
        return value.expression
    if isinstance(value, str):
        return "".join(letter if letter.isprintable() else _escaped(letter) for letter in json.dumps(value, ensure_ascii=False))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    return repr(value)


def _escaped(letter: str) -> str:
    """Write a letter that turns a line around, or that no screen shows, by its number."""
    return f"\\u{ord(letter):04x}" if ord(letter) < 1 << 16 else f"\\U{ord(letter):08x}"


def _device(tier: str) -> str | int:
    return int(tier.removeprefix("gpu:")) if tier.startswith("gpu:") else tier


def script(head: str, one: Plan, gguf_file: str | None = None) -> str:
    """Write a whole program for a plan: name the model, load it, ask it for the workload's tokens, print them.

    Needs the plan's `code`. A GGUF file holds its tokenizer. Inputs go to the first GPU where there is one in the plan, where
    accelerate's hooks take them. CUDA is told to number the GPUs as the plan does, unless there is but the first.
    """
    load, numbers, ranks = one.case.workload, gpus(one), _ranks(one)
    device = f'"cuda:{numbers[0]}"' if numbers else '"cpu"'
    told = f", gguf_file={_literal(gguf_file)}" if gguf_file else ""
    lines = [
        "from transformers import AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained(MODEL{told}{_trust(one.trusted if one.remote_code else None)})",
        'inputs = tokenizer(["The capital of France is"] * '
        f'{load.batch}, return_tensors="pt").to({"model.device" if ranks > 1 else device})',
        f"output = model.generate(**inputs, max_new_tokens={load.new_tokens}, do_sample=False)",
        "print(tokenizer.batch_decode(output, skip_special_tokens=True)[0])",
    ]
    if numbers not in ((), (0,)):
        head = f'import os\n\nos.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # as the plan numbers the GPUs\n\n{head}'
    return f"{loading_program(head, one)}\n" + "\n".join(_once(lines) if ranks > 1 else lines) + "\n"


def loading_program(head: str, one: Plan) -> str:
    """Write what names and loads the model of a plan, and how it is started where that takes several processes."""
    start = f"# Start it by: torchrun --nproc-per-node {ranks} THIS_FILE\n" if (ranks := _ranks(one)) > 1 else ""
    return f"{start}{head}{one.code}"


def _ranks(one: Plan) -> int:
    return PLACEMENTS[one.case.placement].ranks(len(gpus(one)))


def gpus(one: Plan) -> tuple[int, ...]:
    """Return the numbers of the GPUs that a plan uses, in order: those of its map or, where all share it, of its estimate."""
    places = one.device_map.values() if isinstance(one.device_map, Mapping) else (one.estimate.tiers if one.estimate else ())
    return tuple(sorted({number for place in places if isinstance(number := _device(str(place)), int)}))


def _once(lines: Sequence[str]) -> list[str]:
    """Let the last line of what every process runs be run by one of them."""
    *shared, last = lines
    leave = "torch.distributed.destroy_process_group()"
    return ["import torch.distributed", *shared, "if torch.distributed.get_rank() == 0:", f"    {last}", leave]


def code_head(source: Source, placement: str) -> str:
    """Write the lines before the loading code: where MODEL comes from, without naming anybody's directories."""
    if source.kind == "directory":
        return f"MODEL = {_literal(source.name)}  # the directory of the model\n\n"
    if source.hub_id is None:
        return f"from harness.catalog import fetch\n\nMODEL = fetch({_literal(source.name)})\n\n"
    if PLACEMENTS[placement].call == "load_checkpoint_and_dispatch":
        return f"from huggingface_hub import snapshot_download\n\nMODEL = snapshot_download({_literal(source.hub_id)})\n\n"
    return f"MODEL = {_literal(source.hub_id)}\n\n"
