"""The fleet file: which kinds of machines there are, a table `[class.NAME]` each, and the versions that all must have."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.core.errors import UsageError, did_you_mean
from harness.core.records import Record
from harness.core.text import as_written
from harness.core.units import parse_capacity
from harness.fleet.contract import MachineClass
from harness.machine import gpus

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")  # it becomes part of names of files, jobs and artifacts
_LISTS = {"gpu": "gpus", "machines": "machines", "runs-on": "runs_on", "sbatch": "sbatch"}
_KEYS = (*_LISTS, "ram", "threads", "labels")
_TABLES = ("class", "versions")
ANY = "any"


class Fleet(Record, frozen=True, kw_only=True):
    """What a fleet file says. `faults` has a sentence for each class that cannot be used, by its name."""

    classes: tuple[MachineClass, ...]
    versions: dict[str, str]
    faults: dict[str, str]


def read_fleet(path: Path) -> Fleet:
    """Read a fleet file; a class that is wrong holds up none of the others.

    Raises:
        UsageError: it is no fleet file, or no class in it can be used.
    """
    try:
        plain = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UsageError(f"--fleet {path}: there is no such file; write one with a table [class.NAME] for each kind") from None
    except OSError as error:
        raise UsageError(f"--fleet {path} cannot be read: {error.strerror or error}; name a file of TOML") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--fleet {path} is not TOML: {error}") from None
    if unknown := [name for name in plain if name not in _TABLES]:
        raise UsageError(f"--fleet {path}: unknown table [{unknown[0]}]: {did_you_mean(unknown[0], _TABLES)}")
    tables, versions = plain.get("class", {}), plain.get("versions", {})
    if not isinstance(tables, dict) or not tables:
        raise UsageError(f"--fleet {path}: names no class of machines; add a table [class.NAME] with gpu or ram")
    if not isinstance(versions, dict) or not all(isinstance(one, str) for one in versions.values()):
        raise UsageError(
            f'--fleet {path}: [versions] is no table of texts; write lines such as torch = "2.13.0" or torch = "{ANY}"'
        )
    classes, faults = _classes(tables)
    if not classes:
        raise UsageError(f"--fleet {path}: no class can be used: {'; '.join(f'{name}: {why}' for name, why in faults.items())}")
    return Fleet(classes=tuple(classes), versions=versions, faults=faults)


def _classes(tables: Mapping[str, Any]) -> tuple[list[MachineClass], dict[str, str]]:
    """Return the classes of the tables, and why each of the others is none; a machine's name is that of one machine."""
    classes: list[MachineClass] = []
    faults: dict[str, str] = {}
    owner: dict[str, str] = {}
    for name, table in tables.items():
        try:
            found = _class(name, table)
            for machine in found.machines:
                if (other := owner.setdefault(machine, name)) != name or found.machines.count(machine) > 1:
                    raise UsageError(f"two machines are called {machine!r}, in {other} and in {name}; rename one")
            classes.append(found)
        except UsageError as error:
            faults[name] = str(error)
    return classes, faults


def _class(name: str, table: Any) -> MachineClass:
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name for a class: letters, digits, dots and dashes, 60 at most")
    if not isinstance(table, dict):
        raise UsageError(f"[class.{name}] is no table; write its keys below it: {', '.join(_KEYS)}")
    if unknown := [key for key in table if key not in _KEYS]:
        raise UsageError(f"unknown key {unknown[0]!r}: {did_you_mean(unknown[0], _KEYS)}")
    if not {"gpu", "ram"} & table.keys():
        raise UsageError("neither gpu nor ram says what its machines have; add one of them")
    lists = {field: _texts(key, table.get(key, [])) for key, field in _LISTS.items()}
    ram = parse_capacity(str(table["ram"])) if "ram" in table else None
    threads = table.get("threads")
    if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
        raise UsageError(f"threads = {as_written(threads)} is no number of threads; write one such as 8")
    gpus.profile(lists["gpus"], ram)  # refuses unknown cards
    return MachineClass(name=name, ram_bytes=ram, threads=threads, labels=_labels(table.get("labels", {})), **lists)


def _labels(table: Any) -> dict[str, tuple[str, ...]]:
    if not isinstance(table, dict):
        raise UsageError(f'labels = {as_written(table)} is no table; write one such as {{"ray.io/accelerator-type" = "A100"}}')
    return {name: _texts(f"labels: {name}", value) for name, value in table.items()}


def _texts(key: str, value: Any) -> tuple[str, ...]:
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, list) or not all(isinstance(one, str) and one.strip() and one.isprintable() for one in several):
        raise UsageError(f"{key} = {as_written(value)} is neither a text nor a list of texts")
    return tuple(several)
