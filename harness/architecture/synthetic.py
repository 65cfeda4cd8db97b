"""Synthetic checkpoints: the shapes, dtypes, files and shards of a model, with random weights, from its skeleton alone.

So a fit can be measured before anything is downloaded. What is published quantized is written in the parts of its layout
(`harness.checkpoint.quantization`). What the tensors hold is `harness.architecture.random_weights`'s.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

from harness.architecture import random_weights, skeleton, skeleton_source
from harness.architecture.skeleton import Skeleton, Weight
from harness.catalog import download, shipped, wheel_cache
from harness.catalog.resolve import Source
from harness.checkpoint import quantization
from harness.checkpoint.formats.files import Directory
from harness.checkpoint.formats.safetensors_header import parse_config
from harness.checkpoint.formats.tensor_writer import DTYPES, Pieces, TensorToWrite, write_bin, write_safetensors
from harness.checkpoint.published import Stored, published
from harness.checkpoint.quantization import Packed
from harness.checkpoint.reader import stated_dtype
from harness.core.errors import UsageError
from harness.core.precisions import PRECISIONS, Precision
from harness.core.progress import Report, silent
from harness.core.records import Record
from harness.core.text import as_written
from harness.machine import atomic
from harness.machine.cache import cache_dir

SYNTHETIC_MARK = "fitmatrix-synthetic.json"
_SHARD_BYTES = 5_000_000_000
_FLOATS = ("float32", "float16", "bfloat16")

WRITERS: Mapping[str, tuple[str, str, Callable[[Path, Sequence[TensorToWrite], Pieces | None], None]]] = {
    "safetensors": ("model", ".safetensors", write_safetensors),
    "bin": ("pytorch_model", ".bin", write_bin),
}


class Synthetic(Record, frozen=True, kw_only=True):
    """A checkpoint to be written: its config, its files with their tensors, in one of WRITERS."""

    name: str
    config: dict[str, Any]
    format: str
    shards: tuple[tuple[TensorToWrite, ...], ...]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.bytes for shard in self.shards for tensor in shard)

    @property
    def key(self) -> str:
        """What tells this checkpoint from every other, and its filling from that of another release: 16 hex digits."""
        return sha256(msgspec.json.encode(self) + random_weights.FILLING.encode()).hexdigest()[:16]


def describe(
    source: Source, *, file_format: str | None = None, shard_bytes: int | None = None, precision: str | None = None
) -> Synthetic:
    """Lay out the synthetic twin of a model, as it is published where that is known, else in shards of 5 GB.

    With a `precision` that reads one form of checkpoints alone it is stored so, whatever it is published as.

    Raises:
        UsageError: nothing here tells its shape, or its weights are quantized in a way that is not written here.
        CheckpointError: its config is damaged.
    """
    config, stored = _known(source)
    if precision is not None:
        config, stored = _in_form(source, PRECISIONS[precision], config), Stored(bytes=0, origin="", shard_bytes=_SHARD_BYTES)
    packed = quantization.packed(config)
    dtype = stored.dtype or stated_dtype(config)
    if dtype not in _FLOATS:
        raise UsageError(
            f"{source.name}: its config says torch_dtype {as_written(dtype)}; synthetic weights are {', '.join(_FLOATS)}"
        )
    found = skeleton_source.build(config, cache_dir())
    if packed is not None and precision is not None and (why := unwritten(found, packed)):
        raise UsageError(f"{source.name} cannot be written for --precision {precision}: {why}")
    if packed is not None and (why := unwritten(found, packed)):
        raise UsageError(f"{source.name} is quantized ({packed.title}), and {why}: name the 16-bit model that it was made from")
    shards = _sharded(list(stored_tensors(found, stored, dtype, packed)), shard_bytes or stored.shard_bytes)
    return Synthetic(name=source.name, config=config, format=file_format or stored.format, shards=tuple(shards))


def _known(source: Source) -> tuple[dict[str, Any], Stored]:
    """Return a model's config and how it is stored: of a directory, of the catalog, or of what was made here before."""
    usual = Stored(bytes=0, origin="", shard_bytes=_SHARD_BYTES)
    if source.kind != "directory" and source.hub_id is not None:
        try:
            known = shipped.hub_id(source.hub_id)
        except UsageError:
            raise UsageError(f"{source.hub_id} is not in the catalog: put its config.json into a directory and name that") from None
        return dict(shipped.catalog()[known].config), published(known) or usual
    here = download.cached(source)
    if here is None:
        raise UsageError(f"{source.name} is not on this machine yet: run pytest cases/ --model {source.name} once")
    with closing(Directory(here).open("config.json")) as blob:
        return parse_config(blob), usual


def form_of(source: Source, precision: Precision) -> Packed | None:
    """Return the form that a model would be written in for a precision that reads only that; None if it is stored so, or cannot be.

    Raises:
        UsageError, CheckpointError: nothing here tells its config, or that is damaged.
    """
    if precision.requires_checkpoint is None:
        return None
    config, _ = _known(source)
    return None if quantization.packed(config) is not None else quantization.form_for(precision, config)


def _in_form(source: Source, precision: Precision, config: Mapping[str, Any]) -> dict[str, Any]:
    form = quantization.form_for(precision, config)
    if form is None:
        raise UsageError(f"{source.name} has no {precision.requires_checkpoint} form: drop --precision {precision.name}")
    return quantization.config_in(form, config)


def unwritten(found: Skeleton, packed: Packed) -> str | None:
    """Say why what is packed is not written here; None if it is: every Linear but the head in a layout whose parts are known."""
    if packed.layout is None or not packed.layout.parts:
        return "how its files hold that is not known here"
    if packed.precision is None:
        return f"no --precision here runs its {packed.bits} bits"
    if packed.varies or packed.selects:
        return "its config packs some modules otherwise than the rest"
    if any(block.linear == "conv1d" for block in found.blocks):
        return "how it packs Conv1D is not known here"
    for weight, _ in found.tally:
        shape = weight.tensor.shape
        if skeleton.is_stacked(weight):
            return "under which names it packs each expert is not known here"
        if weight.quantizes and packed.layout.overhang(shape, packed.bits, packed.group):
            return f"{weight.path}, {shape[0]} x {shape[1]}, does not fill whole words or groups"
    return None


def stored_tensors(found: Skeleton, stored: Stored, dtype: str, packed: Packed | None) -> Iterator[TensorToWrite]:
    """Yield what the files hold, in the order of the modules: parameters and saved buffers, masks before the rest of their layer.

    Names are transformers' own; experts are stacked, as it holds them. What is packed is there by its parts.
    """
    masks = _masks(found, stored)
    for weight in found.weights:
        if weight.tensor.kind == "unsaved" or (weight.tied_to and not stored.repeats_head):
            continue
        for owner in [owner for owner in masks if weight.path.startswith(owner)]:
            yield masks.pop(owner)
        if packed is not None and weight.quantizes:
            yield from _parts(weight, packed)
        else:
            held = _dtype(weight, stored, dtype)
            yield TensorToWrite(name=weight.path, dtype=held, shape=weight.tensor.shape, repeats=weight.tied_to)


def _parts(weight: Weight, packed: Packed) -> Iterator[TensorToWrite]:
    assert packed.layout is not None
    module = weight.path.removesuffix(".weight")
    for part, (dtype, shape) in packed.layout.stored(weight.tensor.shape, packed.bits, packed.group).items():
        yield TensorToWrite(name=f"{module}{part}", dtype=dtype, shape=shape)


def _masks(found: Skeleton, stored: Stored) -> dict[str, TensorToWrite]:
    """Return the causal masks that the files hold beside the weights, by the prefix of the module that has one."""
    if stored.mask is None:
        return {}
    names = [stored.mask.format(layer) for layer in range(len(found.layers))]
    shape = (1, 1, stored.mask_side, stored.mask_side)
    return {f"{name.rpartition('.')[0]}.": TensorToWrite(name=name, dtype="bool", shape=shape) for name in names}


def _dtype(weight: Weight, stored: Stored, dtype: str) -> str:
    fixed = "float32" if stored.float32 is not None and stored.float32 in weight.path else weight.tensor.dtype
    return fixed if fixed is not None and fixed in DTYPES else dtype


def _sharded(tensors: Sequence[TensorToWrite], most: int | None) -> Iterator[tuple[TensorToWrite, ...]]:
    """Fill one file after the other, as save_pretrained does; a tensor is never split."""
    shard: list[TensorToWrite] = []
    for tensor in tensors:
        if most is not None and shard and sum(one.bytes for one in shard) + tensor.bytes > most:
            yield tuple(shard)
            shard = []
        shard.append(tensor)
    yield tuple(shard)


def write_synthetic(made: Synthetic, directory: Path, *, hollow: bool = False, report: Report = silent) -> Path:
    """Write the checkpoint into `directory`, which must not hold anything yet; all of it or nothing, alone if others write there.

    `hollow` files are sparse: full size, all zeros, no disk; for planning, not for running.

    Raises:
        UsageError: the directory holds something, or the disk has no room.
    """
    there = directory.resolve()  # "." has no name to build beside
    with _alone(there, report, "DIR"):
        if there.exists() and (not there.is_dir() or any(there.iterdir())):
            raise UsageError(f"{directory} is not an empty directory: name a new one")
        _write(made, there, hollow, report, "DIR")
    return directory


@contextmanager
def _alone(directory: Path, report: Report, variable: str) -> Iterator[None]:
    """Hold the lock of a directory that is written. Raises UsageError: the disk does not let us."""
    try:
        with wheel_cache.locked(directory, report):
            yield
    except OSError as error:
        raise UsageError(wheel_cache.disk_sentence(error, directory.parent, variable)) from None


def _write(made: Synthetic, directory: Path, hollow: bool, report: Report, variable: str) -> None:
    """Write the checkpoint to its place, where nothing is but perhaps an empty directory, which somebody may stand in."""
    if not hollow:
        wheel_cache.check_space(made.bytes + (64 << 20), directory.parent, variable)
    with atomic.draft_directory(directory) as build:
        _fill(made, build, hollow, report)
        if not directory.exists():
            build.rename(directory)
            return
        for file in sorted(build.iterdir(), key=lambda file: file.name == SYNTHETIC_MARK):  # last: it says that all is there
            file.rename(directory / file.name)


def _fill(made: Synthetic, build: Path, hollow: bool, report: Report) -> None:
    stem, suffix, writer = WRITERS[made.format]
    done, total = 0, made.bytes
    packed = quantization.packed(made.config)

    def pieces(tensor: TensorToWrite) -> Iterator[memoryview]:
        nonlocal done
        for piece in random_weights.contents(tensor, packed):
            yield piece
            done += len(piece)
            report(f"writing {made.name}", done, total)

    names: dict[str, str] = {}
    for number, shard in enumerate(made.shards, start=1):
        whole = len(made.shards) == 1
        file = f"{stem}{suffix}" if whole else f"{stem}-{number:05}-of-{len(made.shards):05}{suffix}"
        writer(build / file, shard, None if hollow else pieces)
        names |= dict.fromkeys((tensor.name for tensor in shard), file)
    if len(made.shards) > 1:
        index = {"metadata": {"total_size": made.bytes}, "weight_map": names}
        (build / f"{stem}{suffix}.index.json").write_text(json.dumps(index, indent=2))
    (build / "config.json").write_text(json.dumps(made.config, indent=2))
    (build / SYNTHETIC_MARK).write_text(json.dumps({"model": made.name, "key": made.key, "hollow": hollow, "bytes": made.bytes}))


def cached_path(made: Synthetic) -> Path:
    """Return where the cache keeps a synthetic checkpoint."""
    return _cached() / f"{_cached_name(made.name)}-{made.key}"


def _cached() -> Path:
    return cache_dir() / "synthetic"


def _cached_name(model: str) -> str:
    return model.replace("/", "--")


def fetch_synthetic(source: Source, report: Report = silent, precision: str | None = None) -> Path:
    """Return the synthetic twin of a model from the cache; write it if it is not there, in the form of a precision if one is given.

    Raises:
        UsageError, CheckpointError: as `describe` and `write`.
    """
    return make_cached(describe(source, precision=precision), report)


def make_cached(made: Synthetic, report: Report = silent) -> Path:
    """Return a synthetic checkpoint from the cache; write it if it is not there, once if several runs ask for it.

    Raises:
        UsageError: the disk has no room.
    """
    there = cached_path(made)
    if is_synthetic(there):
        return there
    with _alone(there, report, "FITMATRIX_CACHE"):
        if not is_synthetic(there):  # another run may have written it while this one waited
            _write(made, there, hollow=False, report=report, variable="FITMATRIX_CACHE")
    return there


def remove(source: Source) -> list[tuple[Path, int]]:
    """Remove every synthetic twin of a model from the cache; return where they were and their bytes."""
    ours, gone = re.compile(rf"{re.escape(_cached_name(source.name))}-[0-9a-f]{{16}}"), []
    for there in sorted(_cached().glob("*")):
        if ours.fullmatch(there.name):
            with _alone(there, silent, "FITMATRIX_CACHE"):
                size = sum(file.stat().st_size for file in there.iterdir())
                shutil.rmtree(there)
            gone.append((there, size))
    return gone


def is_synthetic(directory: Path) -> bool:
    """Say whether a directory holds a whole synthetic checkpoint; its weights are random, and what it answers means nothing."""
    return (directory / SYNTHETIC_MARK).is_file()
