"""What `fitmatrix inspect` shows of a checkpoint: one record for the terminal, the page and --json."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from harness.architecture import validate
from harness.architecture.skeleton import Skeleton
from harness.checkpoint.adapter import ADAPTER_WEIGHTS, Adapter
from harness.checkpoint.quantization import packed
from harness.checkpoint.reader import Checkpoint, FileInfo
from harness.checkpoint.size_breakdown import SizePart, Tie, anatomy, ties
from harness.core.records import Record

INSPECT_SCHEMA = 1
# The order in which kinds are listed, which is about the order in which a token meets them.
KIND_ORDER = ("embedding", "attention", "mlp", "norm", "head", "other")


class OnTop(Record, frozen=True, kw_only=True):
    """What an adapter is."""

    base: str
    rank: int
    alpha: float | None
    targets: tuple[str, ...]
    modules: int


class Inspection(Record, frozen=True, kw_only=True):
    """A checkpoint in figures."""

    schema: int = INSPECT_SCHEMA
    name: str
    kind: str  #: what was named: catalog, hub, directory, file or adapter
    source: str  #: where its files are
    architecture: str | None
    parameters: int
    bytes: int
    tensors: int
    dtype_bytes: dict[str, int]
    files: tuple[FileInfo, ...]
    quantization: str | None
    context_length: int | None
    parts: tuple[SizePart, ...]
    ties: tuple[Tie, ...]
    history: str = ""  #: what became of the model since 2023, of those that this project began with
    notes: tuple[str, ...] = ()  #: what would hinder loading it, or looks as if files were mixed
    adapter: OnTop | None = None  #: of an adapter, which has no weights but its own

    @property
    def distinct_parameters(self) -> int:
        """Return the number of parameters that the model has, without those that the files repeat."""
        return self.parameters - sum(tie.extra_parameters for tie in self.ties)

    @property
    def blocks(self) -> dict[str, int]:
        """Return how many blocks there are by what they are in, such as "model.layers"."""
        return count_blocks(self.parts)


class BlockRun(Record, frozen=True, kw_only=True):
    """Parts that belong together: those of alike blocks, or those beside the blocks (`block` is empty)."""

    block: str
    repeats: int
    parts: tuple[SizePart, ...]

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


def inspect(
    checkpoint: Checkpoint, *, name: str, kind: str, source: str, history: str = "", skeleton: Skeleton | None = None
) -> Inspection:
    """Put together all that is shown of a checkpoint; with the skeleton of its config also whether it holds what that asks for."""
    return Inspection(
        name=name,
        kind=kind,
        source=source,
        architecture=checkpoint.architecture,
        parameters=checkpoint.parameters,
        bytes=checkpoint.bytes,
        tensors=len(checkpoint.tensors),
        dtype_bytes=checkpoint.dtype_bytes,
        files=checkpoint.files,
        quantization=checkpoint.quantization,
        context_length=checkpoint.context_length,
        parts=tuple(anatomy(checkpoint)),
        ties=tuple(ties(checkpoint)),
        history=history,
        notes=validate.notes(checkpoint, skeleton, packed(checkpoint.config, checkpoint.tensors)),
    )


def inspect_adapter(adapter: Adapter, *, name: str) -> Inspection:
    """Put together all that is shown of an adapter: its own tensors, and what it is loaded onto."""
    file = FileInfo(name=ADAPTER_WEIGHTS, bytes=adapter.file_bytes, format="safetensors")
    checkpoint = Checkpoint(path=adapter.path, config={}, tensors=adapter.tensors, files=(file,))
    facts = {key: getattr(adapter, key) for key in ("base", "rank", "alpha", "targets")}
    found = inspect(checkpoint, name=name, kind="adapter", source=adapter.path)
    return replace(found, adapter=OnTop(**facts, modules=len(adapter.modules)))


def runs(parts: Iterable[SizePart]) -> list[BlockRun]:
    """Gather neighboring parts of the same blocks, in their order; the kinds of a run come in KIND_ORDER."""
    gathered: list[list[SizePart]] = []
    for part in parts:
        if gathered and gathered[-1][-1].block == part.block:
            gathered[-1].append(part)
        else:
            gathered.append([part])
    for found in gathered:
        found.sort(key=lambda part: KIND_ORDER.index(part.kind))
    return [BlockRun(block=found[0].block, repeats=found[0].repeats, parts=tuple(found)) for found in gathered]


def count_blocks(parts: Iterable[SizePart]) -> dict[str, int]:
    """Count the blocks by what they are in: {"model.layers": 30}."""
    counted: dict[str, int] = {}
    for run in runs(part for part in parts if part.block):
        prefix = run.block.rpartition(".")[0]
        counted[prefix] = counted.get(prefix, 0) + run.repeats
    return counted


def largest(parts: Iterable[SizePart], most: int) -> tuple[SizePart, ...]:
    """Return the `most` largest parts, in their order: a listing must stay readable whatever a file holds."""
    parts = tuple(parts)
    kept = set(sorted(range(len(parts)), key=lambda place: -parts[place].bytes)[:most])
    return tuple(part for place, part in enumerate(parts) if place in kept)


def explain(tie: Tie, size: str = "") -> str:
    """Say in a sentence what a tie means; `size` is what its repetition costs, in words."""
    first, rest = tie.names[0], tie.names[1:]
    if tie.how == "absent":
        return f"{first} is the output head as well, stored once"
    if tie.how == "repeated":
        return f"{' and '.join(rest)} repeats {first}: {size} stored twice"
    others = f"{', '.join(rest[:3])}{f' and {len(rest) - 3} more' if len(rest) > 3 else ''}"
    return f"{others} {'share' if len(rest) > 1 else 'shares'} the bytes of {first}"
