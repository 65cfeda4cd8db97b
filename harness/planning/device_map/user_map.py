"""A device map that the user wrote: read from JSON or TOML, and checked against a model before anything is loaded.

transformers 5 takes any dict: modules that it misses land in RAM, names that do not exist are ignored, and entries inside others
or tied weights apart fail at the first token, with an error of torch's. So what is not sound is refused here.
"""

from __future__ import annotations

import errno
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.architecture.skeleton import Skeleton
from harness.core.errors import UsageError, did_you_mean
from harness.core.placements import FILE
from harness.machine.regular import read_regular
from harness.planning.device_map.infer import Device, device_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MOST_BYTES = 1 << 20
_GPU = re.compile(r"(?:cuda|gpu):(\d{1,4})")
_MOST_GPUS = 10_000  # as many as four digits number
_SHOWN = 3


def asked(path: Path | None, placements: Sequence[str] | None) -> dict[str, Device] | None:
    """Read the map that a request gives, if it does; `placements` are those that it names.

    Raises:
        UsageError: as `read`; or it names the placement of a file and gives none.
    """
    if path is None and FILE in (placements or ()):
        raise UsageError(f"placement {FILE} is a device map of yours: give it by --device-map FILE")
    return read(path) if path is not None else None


def read(path: Path) -> dict[str, Device]:
    """Read a map, module -> number of a GPU, "cpu" or "disk"; a GPU may be written 0, "cuda:0" or "gpu:0".

    A file whose name ends in .toml is TOML, where `model.layers.0 = 0` says the same as `"model.layers.0" = 0`; others are JSON.

    Raises:
        UsageError: no such file, neither JSON nor TOML, no map, or something that is no device.
    """
    try:
        text = read_regular(path, _MOST_BYTES).decode("utf-8-sig")  # as editors of Windows save it
        found = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text, object_pairs_hook=_unrepeated)
        return _entries(found, path)
    except OSError as error:
        what = f"more than a device map can need, {_MOST_BYTES >> 20} MiB" if error.errno == errno.EFBIG else error.strerror
        raise UsageError(f"--device-map {path}: {what}; name a file of JSON or TOML that gives each module a device") from None
    except (ValueError, RecursionError) as error:  # of JSON, TOML and UTF-8; or too deep, or a number too long to be written
        kind = "TOML" if path.suffix == ".toml" else "JSON"
        raise UsageError(f"--device-map {path} is not {kind}: {error}") from None


def _entries(found: object, path: Path) -> dict[str, Device]:
    if not isinstance(found, dict) or not found:
        raise UsageError(f'--device-map {path}: not a map such as {{"model.embed_tokens": 0, "model.layers.0": "cpu"}}')
    entries: dict[str, Device] = {}
    for module, device in _flat(found):
        if module in entries:
            raise UsageError(f"--device-map {path}: {module!r} is there twice")
        entries[module] = _device(device, module, path)
    return entries


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Join the keys of nested tables by dots, as modules are named."""
    for name, value in tree.items():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(value, dict):
            yield from _flat(value, path)
        else:
            yield path, value


def _device(value: object, module: str, path: Path) -> Device:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_GPUS:
        return value
    if isinstance(value, str):
        if value in ("cpu", "disk"):
            return value
        if match := _GPU.fullmatch(value):
            return int(match[1])
    raise UsageError(f'--device-map {path}: {module!r} is on {value!r}, which is no device: write "cpu", "disk", 0 or "cuda:0"')


def check_map(device_map: Mapping[str, Device], skeleton: Skeleton, gpus: int, *, model: str) -> None:
    """Check that a map places every tensor of a model, once, on devices of a machine with `gpus` GPUs.

    Raises:
        UsageError: it does not; the message names the module.
    """
    wrong = next(_flaws(device_map, skeleton, gpus), None)
    if wrong is not None:
        raise UsageError(f"the device map does not fit {model}: {wrong}")


def _flaws(device_map: Mapping[str, Device], skeleton: Skeleton, gpus: int) -> Iterator[str]:
    for module, device in device_map.items():
        if isinstance(device, int) and device >= gpus:
            yield f"{module!r} is on GPU {device}, and {_counted(gpus)}"
    yield from _misplaced(device_map, skeleton)
    yield from _missing(device_map, skeleton)
    for name, source in skeleton.tied.items():
        homes = device_of(device_map, name), device_of(device_map, source)
        if homes[0] != homes[1]:
            yield f"{name} and {source} are one tensor, and lie on {homes[0]} and {homes[1]}: put both on one device"


def _counted(gpus: int) -> str:
    return "there is no GPU" if not gpus else "the only GPU is 0" if gpus == 1 else f"there are {gpus}, from 0"


def _misplaced(device_map: Mapping[str, Device], skeleton: Skeleton) -> Iterator[str]:
    """Find entries that name nothing, a part of what is kept whole, or a part of what another entry places."""
    pieces = {piece.path: piece.like for piece in skeleton.pieces}
    known = {*pieces, *(module.path for module in skeleton.frame)}
    for module in device_map:
        above = list(_above(module))
        whole = next((path for path in above if path in pieces), None)
        outer = next((path for path in above if path in device_map), None)
        if outer is not None:
            yield f"{module!r} lies inside {outer or 'the whole model'!r}, which is placed as well: name the parts, or the whole"
        elif whole is not None:
            kind = pieces[whole].block.class_name
            yield f"{module!r} lies inside {whole!r}, which is kept on one device ({kind}): name {whole!r}"
        elif module not in known:
            yield f"no module {module!r}: {did_you_mean(module, known - {''})}"


def _above(module: str) -> Iterator[str]:
    """Yield the paths of all modules around one, the nearest first; the model itself is ""."""
    while module:
        module = module.rpartition(".")[0]
        yield module


def _missing(device_map: Mapping[str, Device], skeleton: Skeleton) -> Iterator[str]:
    """Find what no entry places; buffers that are in no file are made in RAM, and need none."""
    if "" in device_map:
        return
    lacking = [
        piece.path
        for piece in skeleton.pieces
        if device_of(device_map, piece.path) is None
        and any(weight.tensor.kind != "unsaved" for module in piece.like.walk() for weight in module.weights)
    ]
    if lacking:
        more = f" and {len(lacking) - _SHOWN} more" if len(lacking) > _SHOWN else ""
        yield f"it places neither {' nor '.join(lacking[:_SHOWN])}{more}" if len(lacking) > 1 else f"it does not place {lacking[0]}"
