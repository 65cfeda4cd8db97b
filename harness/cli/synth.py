"""`fitmatrix synth`: a checkpoint with random weights in a model's true shapes, to measure it before downloading."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.checkpoint.formats.files import quote
from harness.cli.options import add_options
from harness.core.errors import UsageError
from harness.core.units import format_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("model", metavar="MODEL", help="a catalog name, a hub id of the catalog, or a directory with a config.json")
    parser.add_argument(
        "directory", nargs="?", type=Path, metavar="DIR", help="directory to write to (default: the cache, for --weights synthetic)"
    )
    parser.add_argument("--format", choices=("safetensors", "bin"), help="file format (default: as published)")
    add_options(parser, "synth", "shard")
    parser.add_argument(
        "--hollow", action="store_true", help="write sparse files that take no disk space; they can be planned but not run"
    )
    parser.add_argument("--remove", action="store_true", help="remove the checkpoint from the cache instead")


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
        raise UsageError("--hollow needs DIR: the cache keeps only checkpoints that can be run")
    if (given.format or given.shard is not None) and given.directory is None:
        raise UsageError("--format and --shard need DIR: the cache keeps checkpoints as they are published")
    made = synthetic.describe(source, file_format=given.format, shard_bytes=given.shard)
    with show_progress() as report:
        if given.directory is None:
            there = synthetic.make_cached(made, report)
        else:
            there = synthetic.write_synthetic(made, given.directory, hollow=given.hollow, report=report)
    held = f"{format_size(made.bytes)} of random weights in {len(made.shards)} {made.format} file(s)"
    print(f"{line(str(there))}: {line(made.name)}, {held}")
    return 0


def _remove(given: argparse.Namespace) -> int:
    """Empty the cache of a model and say what went; raises UsageError for options of writing."""
    from harness.architecture import synthetic
    from harness.catalog import resolve
    from harness.core.text import line

    if given.directory is not None:
        raise UsageError(f"--remove empties the cache and takes no DIR: drop {quote(str(given.directory))}, or delete it yourself")
    for option in ("format", "shard", "hollow"):
        if getattr(given, option):
            raise UsageError(f"--{option} has no effect with --remove, which writes nothing: drop one of them")
    source = resolve.resolve(given.model, weights=False)
    gone = synthetic.remove(source)
    for there, size in gone:
        print(f"removed {line(str(there))} ({format_size(size)})")
    if not gone:
        print(f"no synthetic {line(source.name)} in the cache")
    return 0
