"""What compressed-tensors takes of a quantization_config: its own classes asked, value by value, and their answers kept as data.

python -m tests.support.compressed_settings    # where it is installed; writes harness/data/compressed_tensors.json
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parents[2] / "harness/data/compressed_tensors.json"
PACKAGE = "compressed-tensors"
WIDTHS = range(1, 17)
GROUPS = (None, -2, -1, 0, 128)
BLOCKS = (None, [128, 128])
DYNAMIC: tuple[bool | str, ...] = (False, True, "local")
SIZES = (16, 32, 128)  # 128: any other, or no groups
# Of each format weights that it is for, and of each strategy of weights what it asks for.
_WHOLE = {"num_bits": 8, "strategy": "channel"}
_MX = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
OF: Mapping[str, Mapping[str, Any]] = {
    "pack-quantized": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
    "int-quantized": {**_WHOLE, "type": "int"},
    "naive-quantized": {**_WHOLE, "type": "int"},
    "float-quantized": {**_WHOLE, "type": "float"},
    "nvfp4-pack-quantized": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    "mxfp4-pack-quantized": {**_MX, "num_bits": 4},
    "mxfp6-pack-quantized": {**_MX, "num_bits": 6},
    "mxfp8-quantized": {**_MX, "num_bits": 8},
}
STRATEGIES: Mapping[str, Mapping[str, Any]] = {
    "tensor": {"strategy": "tensor"},
    "channel": {"strategy": "channel"},
    "group": {"strategy": "group", "group_size": 32},
    "block": {"strategy": "block", "block_structure": [32, 32]},
}
# Of each key with words: what is said beside it, so that the word alone decides.
BESIDE: Mapping[str, Mapping[str, Any]] = {"actorder": {"strategy": "group", "group_size": 128}}


def words_of(name: str) -> list[Any]:
    """Return what an argument may be called by the library's schema, and what people write in its place."""
    schema = import_module("compressed_tensors.quantization").QuantizationArgs.model_json_schema()
    kinds = [schema["properties"][name], *schema["properties"][name].get("anyOf", ())]
    named = [word for kind in kinds if "$ref" in kind for word in schema["$defs"][kind["$ref"].rpartition("/")[2]]["enum"]]
    return [*named, *(word.upper() for word in named), None, False, True]


def reason(make: Callable[[Any], Any], given: Any) -> str | None:
    """Return why the library makes nothing of settings, in the first line of its words; None if it does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make(given)
    except (ValueError, NotImplementedError, KeyError, TypeError) as error:
        errors = getattr(error, "errors", None)
        said = errors()[0]["msg"] if errors is not None else str(error.args[0])
        return re.sub(r"<[^<>]*: ('\w+')>", r"\1", str(said).removeprefix("Value error, ").partition("\n")[0])
    return None


def args(**said: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "int", **said}


def answers() -> dict[str, Any]:
    """Ask for everything that is kept."""
    library = import_module("compressed_tensors.quantization")
    made, group = library.QuantizationArgs.model_validate, library.QuantizationScheme.model_validate
    strategies = [None, *(one.value for one in library.QuantizationStrategy)]
    whole = product(strategies, GROUPS, BLOCKS, DYNAMIC)
    presets = import_module("compressed_tensors.quantization.quant_scheme").PRESET_SCHEMES
    return {
        "version": version(PACKAGE),
        "arguments": list(library.QuantizationArgs.model_fields),
        "of_a_group": list(library.QuantizationScheme.model_fields),
        "words": {
            name: {json.dumps(word): reason(made, args(**beside_of(name, word))) for word in words_of(name)}
            for name in ("type", "strategy", "dynamic", "actorder")
        },
        "statuses": {json.dumps(word): reason(whole_config, {"quantization_status": word}) for word in statuses()},
        "formats": {json.dumps(word): reason(group, {"targets": [], "format": word}) for word in formats()},
        "unpacked": {name: unpacked(name) for name in unpackers()},
        "inferred": [[*one, inferred(*one)] for one in told_apart()],
        "unfilled": [[name, strategy] for name, strategy in product(unpackers(), STRATEGIES) if is_unfilled(name, strategy)],
        "widths": {
            kind: [bits for bits in WIDTHS if reason(made, {"num_bits": bits, "type": kind}) is None] for kind in ("int", "float")
        },
        "refused": [[*one, why] for one in whole if (why := reason(made, combined(*one))) is not None],
        "activations": [
            [strategy, size, why]
            for strategy, size in product(strategies, GROUPS)
            if reason(made, grouped(strategy, size)) is None
            and (why := reason(group, {"targets": [], "input_activations": grouped(strategy, size)})) is not None
        ],
        "ordered_activations": reason(group, {"targets": [], "input_activations": {**fitting("group"), "actorder": "weight"}}),
        "presets": {
            name: json.loads(library.preset_name_to_scheme(name, []).model_dump_json())["weights"] for name in sorted(presets)
        },
    }


def unpackers() -> list[str]:
    """Return the formats that a class of the library unpacks; that of "dense" hands on what it is given."""
    library = import_module("compressed_tensors.compressors")
    classes = {name: library.BaseCompressor.get_value_from_registry(name) for name in library.BaseCompressor.registered_names()}
    return sorted(name for name, one in classes.items() if one is not library.DenseCompressor)


def unpacked(name: str) -> dict[str, str]:
    """Return by which functions a format is unpacked, and the dtypes of weight and scales in a module of float16 thereafter."""
    one, module = _compressor(name), packed_module("cpu", name, OF[name])
    found = one.decompress(dict(module.named_parameters()), module.quantization_scheme)
    dtypes = {part: str(found[part].dtype).removeprefix("torch.") for part in ("weight", "weight_scale")}
    ways = (getattr(one, way, None) for way in ("decompress", "_decompress_scale"))
    return {"by": " ".join(way.__qualname__ for way in ways if way is not None), **dtypes}


def packed_module(device: str, name: str, said: Mapping[str, Any]) -> Any:
    """Return a Linear of float16 in a format, as the library makes it of one that is not packed."""
    torch = import_module("torch")
    module = torch.nn.Linear(64, 64, bias=False, dtype=torch.float16, device=device)
    lifecycle = import_module("compressed_tensors.quantization.lifecycle.initialize")
    lifecycle.initialize_module_for_quantization(module, scheme(**said))
    for part, tensor in module.named_parameters():
        if part != "weight" and device != "meta":
            tensor.data.fill_(1)
    _compressor(name).compress_module(module)
    return module


def _compressor(name: str) -> Any:
    return import_module("compressed_tensors.compressors").BaseCompressor.get_value_from_registry(name)


def scheme(inputs: str | None = None, **weights: Any) -> Any:
    library = import_module("compressed_tensors.quantization")
    taken = library.QuantizationArgs(num_bits=8, type=inputs, dynamic=True, strategy="token") if inputs else None
    return library.QuantizationScheme(targets=["Linear"], weights=library.QuantizationArgs(**weights), input_activations=taken)


def told_apart() -> Iterator[tuple[Any, ...]]:
    """Return what of a scheme may decide on a format: type, bits, size of a group, type of the inputs, dtype of the scales."""
    kinds = [*(("int", bits) for bits in range(1, 9)), ("float", 4), ("float", 6), ("float", 8)]
    for kind, bits in kinds:
        yield from product([kind], [bits], SIZES, (None, "int", "float"), (None, "torch.uint8"))


def inferred(kind: str, bits: int, size: int, inputs: str | None, scale: str | None) -> str:
    """Return the format that the library takes for Linear weights whose group has none of its own."""
    made = scheme(inputs, num_bits=bits, type=kind, strategy="group", group_size=size, scale_dtype=scale)
    infer = import_module("compressed_tensors.compressors.format").infer_module_format
    return str(infer(import_module("torch").nn.Linear, made).value)


def is_unfilled(name: str, strategy: str) -> bool:
    """Say whether zero points are of other shapes in a file than in a module that transformers makes for it, on the meta device."""
    said = {**OF[name], "symmetric": False, "group_size": None, **STRATEGIES[strategy]}
    if said["type"] != "int":
        return False
    made, filled = (packed_module(device, name, said).weight_zero_point for device in ("cpu", "meta"))
    return (made.shape, made.dtype) != (filled.shape, filled.dtype)


def statuses() -> list[Any]:
    known = [one.value for one in import_module("compressed_tensors.quantization").QuantizationStatus]
    return [*known, *(word.upper() for word in known), None]


def formats() -> list[Any]:
    return [*(one.value for one in import_module("compressed_tensors.config").CompressionFormat), None]


def whole_config(said: dict[str, Any]) -> Any:
    config = import_module("compressed_tensors.quantization").QuantizationConfig
    return config.model_validate({"config_groups": {"group_0": {"targets": ["Linear"], "weights": args()}}, **said})


def beside_of(name: str, word: Any) -> dict[str, Any]:
    """Return a word with what goes well with it."""
    return {**(fitting(str(word).lower()) if name == "strategy" else BESIDE.get(name, {})), name: word} | (
        {"strategy": "tensor_group", "group_size": 16} if name == "dynamic" and str(word).lower() == "local" else {}
    )


def fitting(strategy: str | None) -> dict[str, Any]:
    """Return arguments of a strategy with all that it asks for."""
    groups = {"group_size": 128} if strategy in ("group", "tensor_group") else {}
    blocks = {"block_structure": [128, 128]} if strategy == "block" else {}
    return args(**groups, **blocks, strategy=strategy, **({"dynamic": True} if strategy == "token" else {}))


def grouped(strategy: str | None, size: int | None) -> dict[str, Any]:
    return {**fitting(strategy), "group_size": size}


def combined(strategy: str | None, group: int | None, block: list[int] | None, dynamic: bool | str) -> dict[str, Any]:
    return args(strategy=strategy, group_size=group, block_structure=block, dynamic=dynamic)


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    for key, value in found.items():
        long = isinstance(value, list) and value and isinstance(value[0], list)
        inner = ",\n  ".join(json.dumps(one) for one in value) if long else ""
        yield f" {json.dumps(key)}: " + (f"[\n  {inner}\n ]" if long else json.dumps(value))


def write(file: Path = RECORDED) -> None:
    """Write the answers of the package that is installed."""
    file.write_text("{\n" + ",\n".join(_lines(answers())) + "\n}\n")


if __name__ == "__main__":
    write()
