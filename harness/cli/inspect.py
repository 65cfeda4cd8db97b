"""`fitmatrix inspect MODEL`: the contents of a checkpoint, from its headers alone; `fitmatrix models`: what is known offline."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from harness.cli.options import add_options
from harness.core.errors import UsageError
from harness.core.units import format_count, format_share, format_size
from harness.report.terminal import output

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from harness.architecture.inspection import BlockRun, Inspection
    from harness.architecture.skeleton import Skeleton
    from harness.catalog.listing import KnownModel
    from harness.checkpoint.reader import Checkpoint

MODELS_SCHEMA = 1
MOST_FILES = 8
MOST_SIZE_ROWS = 60
MOST_TIED = 5
BLOCK_LETTERS = 26
OUTSIDE = "outside blocks"
# Another file may be one shard of several.
WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("model", metavar="MODEL", help="a catalog name, a hub id, a directory or a file")
    add_options(parser, "inspect", "file", "revision", "json")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with a treemap")


def run(given: argparse.Namespace) -> int:
    """Show a checkpoint; raises CheckpointError for damaged files, UsageError for a model that is not found."""
    found = look(given.model, given.file, given.revision)
    if given.json:
        output.print_json(found)
    else:
        _show(found)
    if given.html:
        from harness.core.text import line
        from harness.report.page import render, treemap

        render.write(given.html, treemap.render_treemap(found))
        print(f"page: {line(str(given.html))}", file=sys.stderr if given.json else sys.stdout)
    return 0


def look(model: str, file: str | None = None, revision: str | None = None) -> Inspection:
    """Inspect a model by path, catalog name or hub id: of the catalog from what is shipped, of the hub from headers alone.

    A path that exists comes first. A `revision` reads the headers on the hub, whatever the catalog knows.
    """
    path = _path(model)
    if path is not None:
        if revision:
            raise UsageError(f"{model} is not on the hub: drop --revision")
        return _look_at(path / file if file else path, "directory" if path.is_dir() else "file")
    return _look_up(model, file, revision)


def _look_at(place: Path, kind: str) -> Inspection:
    from harness.architecture.inspection import inspect, inspect_adapter
    from harness.catalog.resolve import name_of
    from harness.checkpoint.adapter import is_adapter, read_adapter
    from harness.checkpoint.reader import read

    if is_adapter(place):
        return inspect_adapter(read_adapter(place), name=name_of(place))
    found, path = read(place), place if kind == "file" or place.is_dir() else place.parent
    name = name_of(path) if path.is_dir() else path.name
    return inspect(found, name=name or str(path), kind=kind, source=str(place), skeleton=_skeleton(found))


def _look_up(model: str, file: str | None, revision: str | None) -> Inspection:
    """Inspect what is no path: in the hub's cache, in the catalog, or on the hub."""
    from harness.architecture import model_spec
    from harness.architecture.inspection import inspect
    from harness.architecture.shipped_checkpoint import NOTE, describe_shipped
    from harness.catalog import resolve, shipped
    from harness.catalog.names import read_name
    from harness.checkpoint.reader import read, read_hub

    written = read_name(model, resolve.hub_host())
    file, revision = file or written.file, revision or written.revision
    source = resolve.of_name(written.name, model) if written.name != model else resolve.resolve(model)
    where, known = source.hub_id or source.location, resolve.history(source.name)
    full = resolve.shipped_id(source) if file is None and revision is None else None
    if source.hub_id is None and (file or revision):
        raise UsageError(f"{model} is not on the hub: drop {'--file' if file else '--revision'}")
    here = model_spec.local(source) if full is not None else None
    if full is not None and here is None:
        shown = inspect(describe_shipped(full), name=source.name, kind=source.kind, source=where, history=known)
        return msgspec.structs.replace(shown, notes=(NOTE, *shipped.catalog()[full].doubts, *shown.notes))
    found = read(here) if here is not None else read_hub(where, revision, file)
    return inspect(found, name=source.name, kind=source.kind, source=where, history=known, skeleton=_skeleton(found))


def _skeleton(found: Checkpoint) -> Skeleton | None:
    """Return the skeleton that the config describes, if it is available; a GGUF file has no config."""
    from harness.architecture import skeleton_source
    from harness.machine.cache import cache_dir

    is_whole = len(found.files) > 1 or found.files[0].name in WHOLE_FILES
    return skeleton_source.at_hand(found.config, cache_dir()) if is_whole and "model_type" in found.config else None


def _path(model: str) -> Path | None:
    """Return `model` as a full path; None if nothing is there."""
    if not model:  # it would be the directory one stands in
        return None
    try:
        path = Path(model).expanduser()
        # A file stays where it is named: behind the links of a hub cache it has no ending any more.
        return (path.resolve() if path.is_dir() else path.absolute()) if path.exists() else None
    except (OSError, RuntimeError):  # too long a name, no such home
        return None


def _show(found: Inspection) -> None:
    from harness.report.terminal import tables

    console = tables.screen()
    parts: list[RenderableType] = [tables.title(found.name), tables.facts(_facts(found))]
    if len(found.files) > 1:
        parts.append(_files(found))
    if len(found.dtype_bytes) > 1:
        parts.append(_dtypes(found, console))
    tables.show(*parts, _anatomy(found, console), console=console)
    hidden = len(found.parts) - MOST_SIZE_ROWS
    if hidden > 0:
        print(f"\nand {hidden} smaller parts: --html or --json shows them")


def _facts(found: Inspection) -> Iterator[tuple[str, str | list[str]]]:
    from harness.architecture.inspection import explain
    from harness.report.terminal.tables import line

    if found.architecture:
        yield "architecture", line(found.architecture, 60)
    if found.adapter:
        one = found.adapter
        scale = f", alpha {one.alpha:g}" if one.alpha is not None else ""
        yield "adapter", f"LoRA of rank {one.rank}{scale} on {one.modules} modules: {line(', '.join(one.targets), 200)}"
        yield "base", line(one.base, 200)
    repeated = f", stored as {format_count(found.parameters)}" if found.distinct_parameters < found.parameters else ""
    yield "parameters", f"{format_count(found.distinct_parameters)}{_in_blocks(found)}{repeated}"
    if found.context_length:
        yield "context", f"{found.context_length:,} tokens"
    yield "stored", _stored(found)
    if found.files:
        yield "file" if len(found.files) == 1 else "files", _in_files(found)
    yield "quantized", found.quantization or "no"
    if found.notes:
        yield "note", [line(note, 400) for note in found.notes]
    if found.ties:
        sentences = [line(explain(tie, format_size(tie.extra_bytes)), 200) for tie in found.ties[:MOST_TIED]]
        more = len(found.ties) - MOST_TIED
        yield "tied", [*sentences, *([f"and {more} more"] if more > 0 else [])]
    if found.history:
        yield "history", found.history


def _in_blocks(found: Inspection) -> str:
    from harness.core.text import plural
    from harness.report.terminal.tables import line

    blocks = found.blocks
    if len(blocks) == 1:
        return f" in {plural(next(iter(blocks.values())), 'block')}"
    named = [f"{plural(count, 'block')} of {line(prefix, 30)}" for prefix, count in list(blocks.items())[:3]]
    return f" in {', '.join(named)}" + (f" and {len(blocks) - 3} more kinds" if len(blocks) > 3 else "") if blocks else ""


def _stored(found: Inspection) -> str:
    from harness.core.text import plural

    dtypes = f", all {next(iter(found.dtype_bytes))}" if len(found.dtype_bytes) == 1 else ""
    return f"{format_size(found.bytes)} in {plural(found.tensors, 'tensor')}{dtypes}"


def _in_files(found: Inspection) -> str:
    from harness.report.terminal.tables import line

    formats = " and ".join(sorted({file.format for file in found.files}))
    if len(found.files) == 1:
        return line(found.files[0].name, 60)
    return f"{len(found.files)} of {formats}, {format_size(sum(file.bytes for file in found.files))}"


def _files(found: Inspection) -> Table:
    from harness.report.terminal import tables

    table = tables.table("file", "size")
    for file in found.files[:MOST_FILES]:
        table.add_row(tables.line(file.name, 60), format_size(file.bytes))
    rest = found.files[MOST_FILES:]
    if rest:
        table.add_row(f"and {len(rest)} more", format_size(sum(file.bytes for file in rest)))
    return table


def _dtypes(found: Inspection, console: Console) -> Table:
    from harness.report.terminal import tables

    table = tables.table("dtype", "size", "share", "", left=1)
    width, most = _bar_width(console, 40), max(found.dtype_bytes.values(), default=0) or 1
    for dtype, size in found.dtype_bytes.items():
        share = format_share(size / (found.bytes or 1))
        table.add_row(dtype, format_size(size), share, tables.text_bar(size / most, width, console))
    table.columns[-1].justify = "left"
    return table


def _anatomy(found: Inspection, console: Console) -> Table:
    """Draw a bar for each run of blocks and kind of module; its length is the share of the largest."""
    from harness.architecture.inspection import largest, runs
    from harness.report.terminal import tables

    rows = [row for run in runs(largest(found.parts, MOST_SIZE_ROWS)) for row in zip(_labels(run), run.parts, strict=True)]
    width = _bar_width(console, max((len(label) for label, _ in rows), default=0) + 46)
    most = max((part.bytes for _, part in rows), default=0) or 1
    table = tables.table("block", "kind", "parameters", "size", "share", "", left=2)
    table.columns[-1].justify = "left"
    for label, part in rows:
        bar = tables.text_bar(part.bytes / most, width, console, tables.KIND_COLORS[part.kind])
        share = format_share(part.bytes / (found.bytes or 1))
        table.add_row(label, part.kind, format_count(part.parameters), format_size(part.bytes), share, bar)
    return table


def _bar_width(console: Console, others: int) -> int:
    return min(max(console.width - others, 8), 32)


def _labels(run: BlockRun) -> list[str]:
    """Say what the rows of a run stand for: its blocks in the first, how many and how large in the second."""
    from harness.report.terminal.tables import line

    first = line(run.block, BLOCK_LETTERS) if run.block else OUTSIDE
    each = f"  {run.repeats} x {format_size(run.bytes / run.repeats)}" if run.repeats > 1 else ""
    return [first, each, *[""] * len(run.parts)][: len(run.parts)]


def add_models_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `fitmatrix models`."""
    parser.add_argument("filter", nargs="*", metavar="FILTER", help="words that the name, hub id or form must contain")
    add_options(parser, "models", "json")


def run_models(given: argparse.Namespace) -> int:
    """List the models; raises UsageError if none matches."""
    from harness.catalog.listing import known_models

    found = known_models(" ".join(given.filter))
    if given.json:
        output.print_json({"schema": MODELS_SCHEMA, "models": found})
    else:
        _show_models(found)
    return 0


def _show_models(found: Sequence[KnownModel]) -> None:
    """Print a line for each model. A terminal too narrow for hub ids does without: the name is enough for every command."""
    from harness.report.terminal import tables

    console, whole = tables.screen(), _models_table(found, hub_ids=True)
    if not tables.has_room_for(whole) and console.is_terminal:
        whole = _models_table(found, hub_ids=False)
    elif not console.is_terminal:
        console.width = max(console.width, tables.width_of(whole))
    tables.show(whole, console=console)


def _models_table(found: Sequence[KnownModel], *, hub_ids: bool) -> Table:
    from harness.report.terminal import tables

    names = ("name", "hub id", "form") if hub_ids else ("name", "form")
    table = tables.table(*names, "parameters", "context", left=len(names))
    for row in found:
        middle = (row.hub_id or "made here",) if hub_ids else ()
        context = f"{row.context_length:,}" if row.context_length else "-"
        table.add_row(row.name, *middle, row.form, format_count(row.parameters), context)
    return table
