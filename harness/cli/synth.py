"""`fitmatrix synth`: a checkpoint of a model's true shape with random weights, to measure before downloading."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.checkpoint.formats.files import quote
from harness.core.errors import UsageError
from harness.core.units import format_size, parse_size

HELP = "Write a checkpoint of a model's true shape, files and dtype with random weights, to measure a fit before downloading it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("model", metavar="MODEL", help="a catalog name, a hub id of the catalog, or a directory with a config.json")
    parser.add_argument(
        "directory", nargs="?", type=Path, metavar="DIR", help="where to write it (default: the cache, for --weights synthetic)"
    )
    parser.add_argument("--format", choices=("safetensors", "bin"), help="file format (default: as the model is published)")
    parser.add_argument("--shard", metavar="SIZE", help="most bytes of one file (default: as the model is published)")
    parser.add_argument("--hollow", action="store_true", help="sparse files that take no disk, to plan with; they cannot be run")
    parser.add_argument("--remove", action="store_true", help="remove it from the cache instead")


def run(given: argparse.Namespace) -> int:
    """Write, or remove, the synthetic checkpoint and say where; raises UsageError, CheckpointError."""
    if given.remove:
        return _remove(given)
    from harness.architecture import synthetic
    from harness.catalog import resolve
    from harness.core.progress import show_progress
    from harness.core.text import line

    source = resolve.resolve(given.model, weights=False)
    if given.hollow and given.directory is None:
        raise UsageError("--hollow needs DIR: the cache is for checkpoints that can be run")
    if (given.format or given.shard) and given.directory is None:
        raise UsageError("--format and --shard need DIR: a run takes what is written as the model is published")
    made = synthetic.describe(source, file_format=given.format, shard_bytes=_shard(given.shard))
    with show_progress() as report:
        if given.directory is None:
            there = synthetic.make_cached(made, report)
        else:
            there = synthetic.write(made, given.directory, hollow=given.hollow, report=report)
    held = f"{format_size(made.bytes)} of random weights in {len(made.shards)} {made.format} file(s)"
    print(f"{line(str(there))}: {line(made.name)}, {held}")
    return 0


def _remove(given: argparse.Namespace) -> int:
    """Empty the cache of a model and say what went; raises UsageError for whatever is about writing."""
    from harness.architecture import synthetic
    from harness.catalog import resolve
    from harness.core.text import line

    if given.directory is not None:
        raise UsageError(
            f"--remove is for the cache and takes no DIR: leave {quote(str(given.directory))} out, or delete it yourself"
        )
    for option in ("format", "shard", "hollow"):
        if getattr(given, option):
            raise UsageError(f"--{option} says how to write, and --remove writes nothing: leave one of them out")
    source = resolve.resolve(given.model, weights=False)
    gone = synthetic.remove(source)
    for there, size in gone:
        print(f"removed {line(str(there))} ({format_size(size)})")
    if not gone:
        print(f"the cache holds no synthetic {line(source.name)}")
    return 0


def _shard(text: str | None) -> int | None:
    try:
        return parse_size(text) if text is not None else None
    except UsageError as error:
        raise UsageError(f"--shard: {error}") from None
