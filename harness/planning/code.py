"""The Python that loads a case: what `fitmatrix plan` prints and what a worker runs is the same text."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.core.attention import KV_FORMS
from harness.core.families import GGUF
from harness.core.placements import PLACEMENTS, Placement
from harness.core.precisions import Config, Precision
from harness.core.records import USUAL_KV, Plan
from harness.machine.accelerators import ALLOCATOR_OPTIONS, EXPANDABLE_SEGMENTS
from harness.planning.images import lines_with_images

if TYPE_CHECKING:
    from harness.architecture.vision.image_trace import ImageTrace
    from harness.catalog.resolve import Source


class Facts(NamedTuple):
    """What loading code must say of a model."""

    gguf_file: str | None = None  #: the name of its GGUF file
    native: bool = False  #: whether `harness.models` has its architecture
    auto_class: str = "AutoModelForCausalLM"  #: the class of transformers that loads it
    #: Whether the model's own code may run; None if it has none. Left out, transformers would ask at the terminal.
    trusted: bool | None = None
    attention: str | None = None  #: the implementation that is asked for; None is what transformers chooses
    tuples: bool = False  #: whether config.json asks for tuples of outputs, which `generate` cannot read
    adapter: bool = False  #: whether ADAPTER is loaded on top, which takes peft


class Destination(NamedTuple):
    """Where loading code puts the weights."""

    max_memory: Mapping[str, int] | None = None  #: bytes by tier
    device_map: Mapping[str, str | int] | None = None  #: tiers by module, printed for a placement whose map is computed here
    on_gpu: bool = False  #: whether part of the model lies on a GPU


PLAIN, ANYWHERE = Facts(), Destination()
# What lets a processor multiply with what an explicit map has in RAM; its output goes where its input came from.
_HOOKS = ("AlignDevicesHook", "add_hook_to_module", "remove_hook_from_module")
_COMPUTING_IN_RAM = (
    "remove_hook_from_module(model, recurse=True)  # or experts come to the GPU for every token",
    "for name, place in model.hf_device_map.items():",
    '    if place == "cpu":',
    '        add_hook_to_module(model.get_submodule(name), AlignDevicesHook("cpu", io_same_device=True))',
)
_IN_ORDER = 'os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # as the plan numbers the GPUs'
_EXPANDABLE = f'os.environ.setdefault("{ALLOCATOR_OPTIONS}", "{EXPANDABLE_SEGMENTS}")  # else it may not fit'

# A program that does nothing but load: the address of the model, one import, one call with an argument a line.
_ONE_CALL = re.compile(
    r'MODEL = (".*")\n\nfrom transformers import (\w+)\n\nmodel = \2\.from_pretrained\(\n    MODEL,\n((?: {4}.*,\n)*)\)\n'
)

# glibc maps large blocks one by one until the first of them is freed, and takes those after it from its heap. There what is kept of
# a tensor lies in the hole of a copy: by chance the heap grew by up to 2.7 times the 16-bit weights. A threshold that is set
# stays.
_TAME_HEAP = (
    'if sys.platform == "linux":',
    "    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: give back what quantizing copies",
)

# What a worker does as well (`worker.model`): a model's own generation_config may ask for beams, samples or several answers.
_GREEDY = "model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id{})  # greedy, one answer"

_AS_JSON = json.JSONEncoder(ensure_ascii=False)


def greedy(kv: str = USUAL_KV) -> str:
    """Write the line that lets a model continue greedily, with its KV cache kept in a form."""
    return _GREEDY.format("".join(f", {name}={_literal(value)}" for name, value in KV_FORMS[kv].arguments.items()))


def loading_code(
    precision: Precision,
    placement: Placement,
    dtype: str,
    destination: Destination = ANYWHERE,
    facts: Facts = PLAIN,
) -> str:
    """Write Python that loads the model named by MODEL into `model`; what a case runs is exactly this text.

    Of a checkpoint that is quantized already, `precision` is the row as it holds of that (`ModelSpec.adapted`): it asks for the
    weights unpacked, where transformers' default depends on the machine, or for nothing.
    """
    max_memory, device_map, on_gpu = destination
    arguments: dict[str, Any] = {GGUF.argument: facts.gguf_file} if facts.gguf_file else {}
    arguments["dtype"] = dtype
    config = precision.quantization if on_gpu else precision.quantization_on_cpu or precision.quantization
    if isinstance(config, Config):
        arguments["quantization_config"] = config
    elif config is not None:
        is_divided = placement.splits_devices and not {"cpu", "disk"}.isdisjoint((device_map or {}).values())
        off_gpu = precision.off_gpu if is_divided else None
        arguments["quantization_config"] = _quantization(config, dtype) | dict(off_gpu or {})
    arguments |= placement.arguments()
    if placement.prints_map:
        assert device_map is not None, "its code cannot be written without the map"
        arguments["device_map"] = {path: _device(str(tier)) for path, tier in device_map.items()}
    if "disk" in (device_map or {}).values():  # where a file is not safetensors, transformers asks for it
        arguments["offload_folder"] = "offload"
    if max_memory is not None:
        arguments["max_memory"] = {_device(tier): size for tier, size in max_memory.items()}
    imports = ["import harness.models  # registers architectures that transformers lacks"] if facts.native else []
    given = config.imports if isinstance(config, Config) else ()
    if placement.dispatches_stored:
        return "\n".join([*imports, *_imports(*given), *_dispatch_code(arguments, facts)]) + "\n"
    if facts.trusted is not None:
        arguments["trust_remote_code"] = facts.trusted
    if facts.attention is not None:
        arguments["attn_implementation"] = facts.attention
    if facts.tuples:
        arguments["return_dict"] = True
    if placement.experts_in_ram:
        given = (*given, *(f"from accelerate.hooks import {name}" for name in _HOOKS))
    tamed = [*_TAME_HEAP, ""] if precision.quantizes and not on_gpu else []
    if tamed:
        imports = ["import ctypes", "import sys", "", *imports]
    imports += _imports(f"from transformers import {facts.auto_class}", *given)
    lines = [*imports, "", *tamed, f"model = {facts.auto_class}.from_pretrained(", "    MODEL,", *_written(arguments), ")"]
    if placement.experts_in_ram:
        lines += ["", *_COMPUTING_IN_RAM]
    if placement.moves_after_loading:
        lines.append(f"model = model.to({_literal(f'cuda:{placement.gpu}' if placement.gpu else 'cuda')})")
    if facts.adapter:
        lines.append("model.load_adapter(ADAPTER)")
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


def _dispatch_code(arguments: Mapping[str, Any], facts: Facts) -> list[str]:
    dtype, trust, auto = arguments["dtype"], _trust(facts.trusted), facts.auto_class
    attention = f", attn_implementation={_literal(facts.attention)}" if facts.attention else ""
    return [
        "from accelerate import init_empty_weights, load_checkpoint_and_dispatch",
        f"from transformers import AutoConfig, {auto}",
        "",
        f"config = AutoConfig.from_pretrained(MODEL{trust})",
        "with init_empty_weights():",
        f"    model = {auto}.from_config(config, dtype={_literal(dtype)}{trust}{attention})",
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
        written = _AS_JSON.encode(value)
        if written.isprintable():
            return written
        return "".join(letter if letter.isprintable() else _escaped(letter) for letter in written)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    return repr(value)


def _escaped(letter: str) -> str:
    """Write a letter that turns a line around, or that no screen shows, by its number."""
    return f"\\u{ord(letter):04x}" if ord(letter) < 1 << 16 else f"\\U{ord(letter):08x}"


def _device(tier: str) -> str | int:
    return int(tier.removeprefix("gpu:")) if tier.startswith("gpu:") else tier


def script(
    head: str, one: Plan, gguf_file: str | None = None, *, gpus_differ: bool = False, image: ImageTrace | None = None
) -> str:
    """Write a whole program for a plan: name the model, load it, ask it for the workload's tokens, print them.

    Needs the plan's `code`. A GGUF file has its tokenizer inside. Inputs go to the first GPU of the plan, if any, where
    accelerate's hooks take them; where the prompt has images, each is as `image` says. CUDA numbers the GPUs as the plan does,
    which has to be set unless only the first of GPUs of one model is used.
    """
    workload, numbers, ranks = one.case.workload, gpus(one), _ranks(one)
    device = f'"cuda:{numbers[0]}"' if numbers else '"cpu"'
    device, trust = "model.device" if ranks > 1 else device, _trust(one.trusted if one.remote_code else None)
    if image is None:
        reader, inputs = "tokenizer", _lines_in_words(workload.batch, gguf_file, device, trust)
    else:
        reader, inputs = "processor", lines_with_images(image, workload, device, trust)
    lines = [
        *inputs,
        greedy(one.case.kv),
        f"output = model.generate(**inputs, max_new_tokens={workload.new_tokens})",
        f"print({reader}.batch_decode(output, skip_special_tokens=True)[0])",
    ]
    program = loading_program(head, one, in_order=is_numbered(one, gpus_differ))
    return f"{program}\n" + "\n".join(_once(lines) if ranks > 1 else lines) + "\n"


def _lines_in_words(batch: int, gguf_file: str | None, device: str, trust: str) -> list[str]:
    """Write the lines between loading a model and `generate`: tokenizer and inputs."""
    file = f", {GGUF.argument}={_literal(gguf_file)}" if gguf_file else ""
    return [
        "from transformers import AutoTokenizer, GenerationConfig",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained(MODEL{file}{trust})",
        f'inputs = tokenizer(["The capital of France is"] * {batch}, return_tensors="pt").to({device})',
    ]


def is_numbered(one: Plan, gpus_differ: bool) -> bool:
    """Say whether the code of a plan holds only where CUDA numbers the GPUs as the plan does."""
    return gpus_differ or gpus(one) not in ((), (0,))


def loading_program(head: str, one: Plan, *, in_order: bool = False) -> str:
    """Write what names and loads the model of a plan, and how it is started where that takes several processes.

    `in_order` lets CUDA number the GPUs as NVML does and the plan; by itself it would begin with the fastest.
    """
    lines = [_IN_ORDER] if in_order and gpus(one) else []
    lines += [_EXPANDABLE] if one.expandable_segments else []
    if lines:
        head = "\n".join(["import os", "", *lines, "", head])
    start = f"# Start it by: torchrun --nproc-per-node {ranks} THIS_FILE\n" if (ranks := _ranks(one)) > 1 else ""
    return f"{start}{head}{one.code}"


def one_call(program: str) -> str | None:
    """Return the call of a loading program in one line; None if more than the import of the class belongs to it."""
    found = _ONE_CALL.fullmatch(program)
    if found is None:
        return None
    arguments = ", ".join((found[1], *(line.strip().removesuffix(",") for line in found[3].splitlines())))
    return f"{found[2]}.from_pretrained({arguments})"


def _ranks(one: Plan) -> int:
    return PLACEMENTS[one.case.placement].ranks(len(gpus(one)))


def gpus(one: Plan) -> tuple[int, ...]:
    """Return the numbers of the GPUs that a plan uses, in order: those of its map, or of its estimate if all share it."""
    places = one.device_map.values() if isinstance(one.device_map, Mapping) else (one.estimate.tiers if one.estimate else ())
    return tuple(sorted({number for place in places if isinstance(number := _device(str(place)), int)}))


def _once(lines: Sequence[str]) -> list[str]:
    """Let the last line of what every process runs be run by one of them."""
    *shared, last = lines
    leave = "torch.distributed.destroy_process_group()"
    return ["import torch.distributed", *shared, "if torch.distributed.get_rank() == 0:", f"    {last}", leave]


def code_head(source: Source, placement: str, form: str | None = None) -> str:
    """Write the lines before the loading code: where MODEL comes from, without naming anybody's directories.

    `form` is that of a checkpoint which was made for the case, in another than the model is published in.
    """
    if source.base is not None:
        adapter = f"ADAPTER = {_literal(source.name)}  # the directory of the adapter, which peft loads"
        return f"{code_head(source.base, placement).rstrip()}\n{adapter}\n\n"
    if form is not None:
        return f"MODEL = {_literal(source.name)}  # a directory of the model as {form}\n\n"
    if source.kind == "directory":
        return f"MODEL = {_literal(source.name)}  # the directory of the model\n\n"
    if source.hub_id is None:
        return f"from harness.catalog import fetch\n\nMODEL = fetch({_literal(source.name)})\n\n"
    if PLACEMENTS[placement].dispatches_stored:
        return f"from huggingface_hub import snapshot_download\n\nMODEL = snapshot_download({_literal(source.hub_id)})\n\n"
    return f"MODEL = {_literal(source.hub_id)}\n\n"
