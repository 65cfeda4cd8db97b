"""What lies on a GPU only while loading: transformers' loader (`core_model_loading`) tensor by tensor, in its order.

It sorts the names in the files, numbers as numbers, and makes each tensor of the model from what it is stored as. While it does,
the parts of a stack are there beside the stack, and the 16-bit weight beside what a quantizer makes of it. What comes later in the
order is not there yet, so the worst moment is seldom the largest tensor's. Casts are made in the RAM.

Traced on hollow checkpoints by `harness.worker.trace.load`, held against it by `tests/planning/test_load_peak_gpu.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

from harness.architecture.key_mapping import Conversion, Naming
from harness.architecture.skeleton import Skeleton
from harness.planning.calibration import Bytes

# Of transformers' operations, those that leave views or what they were given where they work along the first dimension.
_VIEWS = frozenset(("Split", "Chunk", "SplitModulelist"))
_LITERAL = re.compile(r"\(\?P<g0>\^?((?:[\w.]|\\\.)+)(?:\(\?!\\w\))?\)")


# Rows of 32 weights that transformers unpacks of MXFP4 at once (`convert_moe_packed_tensors` in integrations/mxfp4.py).
_MX_ROWS, _MX_WEIGHTS = 32768 * 1024, 32

# Names as transformers compares them.
SortKey = tuple[tuple[int | str, ...], ...]


class LoadStep(NamedTuple):
    """One tensor of the model as it is loaded: bytes that stay, and at most at once beside them.

    `grows` are those of its bytes that are not there when it is copied ahead: the most of a weight that is unpacked afterward.
    """

    held: int
    passing: float
    grows: float = 0.0


class LoadRun(NamedTuple):
    """Tensors that are loaded one after the other: bytes that stay, and at most at once beside them.

    `beyond` is the most beside them less those of the run that come later; `passing` the most less only what these will have grown
    by. `grows` is how much all of them do.
    """

    held: int
    beyond: float
    passing: float
    grows: float = 0.0


PieceRun = tuple[str, LoadRun]  # the piece of a device map, and tensors of it


@lru_cache(maxsize=4)  # all formats of a model's weights go through the same
def load_order(skeleton: Skeleton, *, as_held: bool) -> list[tuple[str, tuple[str, ...]]]:
    """Return the tensors of a model in the order of their stored names, which are the model's own where files hold it `as_held`.

    Those of one piece of a device map that follow each other stand together: the piece, and their paths in the first piece of its
    kind.
    """
    naming = None if as_held else skeleton.naming
    inside = {kind: [weight.path for module in kind.inside for weight in module.weights] for kind in skeleton.kinds}
    rows = sorted(
        (sort_key(stored_name(f"{piece.path}{path.removeprefix(piece.like.path)}", naming)), piece.path, path)
        for piece in skeleton.pieces
        for path in inside[piece.like]
    )
    return [(piece, tuple(path for _, _, path in run)) for piece, run in groupby(rows, key=itemgetter(1))]


def sort_key(name: str) -> SortKey:
    """Return what transformers sorts stored names by (`core_model_loading.dot_natural_key`)."""
    return tuple(_part(part) for part in name.split("."))


@lru_cache(maxsize=4096)  # a layer has the words of the one before
def _part(part: str) -> tuple[int | str, ...]:
    if part.isdigit():
        return 0, int(part)
    text = part.rstrip("0123456789")
    return (1, text, int(part[len(text) :])) if text != part else (1, text)


def stored_name(path: str, naming: Naming | None) -> str:
    """Return the first of the names by which files hold a tensor of the model, as far as their order hangs on it."""
    if naming is None:
        return path
    made = conversion_of(path, naming)
    if made is not None:
        target = next(target for target in made.targets if target in path)
        path = min((path.replace(target, source.replace("*", "0")) for source in made.sources), key=sort_key)
    for renaming in reversed(naming.renamings):
        if renaming.target in path and not renaming.scopes and (literal := _LITERAL.fullmatch(renaming.pattern)):
            path = path.replace(renaming.target, literal[1].replace("\\", ""), 1)
    return path


def conversion_of(path: str, naming: Naming | None) -> Conversion | None:
    """Return the conversion that makes a tensor of the model, None if it is stored as it is."""
    for step in naming.conversions if naming is not None else ():
        for target in step.targets:
            if target in path:
                return step
    return None


def copies(made: Conversion | None) -> bool:
    """Say whether a conversion leaves another tensor than it was given, both of which are there at once."""
    return made is not None and any(name not in _VIEWS or along for name, along in made.steps)


def unpacked_mxfp4(elements: int) -> float:
    """Return the bytes beside a stack of experts in 16 bits while it is unpacked of MXFP4.

    What is packed, its scales and these in int32; then an index in int32 and what it finds for half of the rows' weights, or at the
    end the stack before it is turned round.
    """
    rows = elements / _MX_WEIGHTS
    packed, scales = elements / 2, rows * (1 + 4)
    return packed + scales + max(min(rows, _MX_ROWS) * _MX_WEIGHTS / 2 * (4 + 2), elements * 2)


def runs_of(order: Sequence[tuple[str, tuple[str, ...]]], steps: Mapping[str, LoadStep]) -> list[PieceRun]:
    """Return the runs of a model that is loaded in an order, by what each tensor takes: what a placement does not split."""
    alike: dict[tuple[str, ...], LoadRun] = {}  # a layer is loaded as the one before
    for _, paths in order:
        if paths not in alike:
            alike[paths] = _run([steps[path] for path in paths])
    return [(piece, alike[paths]) for piece, paths in order]


def _run(steps: Sequence[LoadStep]) -> LoadRun:
    held, grows, beyond, passing = 0, 0.0, -math.inf, -math.inf
    for step in reversed(steps):
        beyond, passing = max(beyond, step.passing - held), max(passing, step.passing - grows)
        held, grows = held + step.held, grows + step.grows
    return LoadRun(held, beyond, passing, grows)


def on_card(runs: Sequence[PieceRun], pieces: Iterable[str] | None, sequential: bool) -> Bytes:
    """Return the bytes beyond the final ones at the worst moment of loading, for the pieces of one GPU; None means all.

    One thread sets tensors in order. Unless it quantizes, or something goes to the disk, four more copy ahead of it: at worst all
    is on the card, as it is stored, while the first stack is made or the first weight unpacked.
    """
    there = None if pieces is None else frozenset(pieces)
    rest, grows, most, ahead = 0.0, 0.0, 0.0, 0.0
    for run in reversed([run for piece, run in runs if there is None or piece in there]):
        most, ahead = max(most, run.beyond - rest), max(ahead, run.passing - grows)
        rest, grows = rest + run.held, grows + run.grows
    found = most if sequential else ahead
    return Bytes(low=most, best=found, high=found)
