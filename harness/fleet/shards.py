"""Shards: the terms of a contract, cut into parts for machines, and read by the machine that runs one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from harness.core.errors import UsageError
from harness.core.options import OPTION, OPTIONS
from harness.core.records import Case
from harness.fleet.contract import MAP, SHARDS, Contract, Expected, Issued, Shard, Terms, digest_of, read_record, utc, write_record
from harness.machine import atomic

# What a machine decides for itself; the contract decides the rest.
OWN_OPTIONS = ("shard", "results", "html", "baseline", "resume", "calibrate")
CONTRACT_OPTIONS = tuple(option.name for option in OPTIONS if option.name not in OWN_OPTIONS)
_START_S = 1800.0  # for the models to come


def cut(terms: Terms, digest: str, machine_class: str, cases: Sequence[Expected], attempt: int) -> list[Shard]:
    """Cut cases of a class into shards, one for each of its machines at most.

    The cases of a model stay together: its files come to one machine, and its quality is compared with its widest precision there.
    """
    kind = next(one for one in terms.classes if one.name == machine_class)
    by_model: dict[str, list[Case]] = defaultdict(list)
    for one in cases:
        by_model[one.case.model].append(one.case)
    parts: list[list[Case]] = [[] for _ in range(min(max(len(kind.machines), 1), len(by_model)))]
    for group in sorted(by_model.values(), key=len, reverse=True):
        min(parts, key=len).extend(group)
    again = f"-try{attempt}" if attempt > 1 else ""
    return [
        Shard(
            contract=digest,
            name=f"{kind.name}-{number}{again}",
            attempt=attempt,
            made_at=terms.made_at,
            deadline_s=_START_S + terms.case_timeout_s * len(part),
            machine_class=kind,
            models={model: word for model, word in terms.models.items() if any(case.model == model for case in part)},
            options=terms.options,
            versions=terms.versions,
            cases=tuple(part),
        )
        for number, part in enumerate(parts, 1)
    ]


def issue(contract: Contract, keys: Iterable[str]) -> tuple[Contract, list[Shard]]:
    """Hand out the cases of these keys once more: return the contract with the new shards in it, and the shards."""
    wanted = set(keys)
    issued, shards = list(contract.issued), list[Shard]()
    for kind in contract.terms.classes:
        cases = [one for one in contract.terms.cases if one.machine_class == kind.name and one.key in wanted]
        attempt = 1 + max((one.attempt for one in contract.issued if one.machine_class == kind.name), default=0)
        shards += cut(contract.terms, contract.digest, kind.name, cases, attempt) if cases else []
    for shard in shards:
        issued.append(
            Issued(
                shard=shard.name,
                digest=digest_of(shard),
                machine_class=shard.machine_class.name,
                attempt=shard.attempt,
                at=utc(),
                deadline_s=shard.deadline_s,
                keys=tuple(map(shard.key, shard.cases)),
            )
        )
    return replace(contract, issued=tuple(issued)), shards


def write_issued(path: Path, contract: Contract, shards: Iterable[Shard]) -> list[Path]:
    """Write new shards beside the contract, then the contract that knows them; return where the shards are.

    Raises:
        OSError: a file cannot be written; what a machine may have got without the contract knowing it counts for nothing.
    """
    places = []
    for shard in shards:
        places.append(path.parent / SHARDS / f"{shard.name}.json")
        write_record(places[-1], shard)
    write_record(path, contract)
    return places


def read_shard(path: Path) -> Shard:
    """Read a shard file. Raises UsageError: it is none, or names files elsewhere. OSError: it cannot be read."""
    shard = read_record(path, Shard, "shard")
    if Path(shard.name).name != shard.name:
        raise UsageError(f"{path}: {shard.name[:80]!r} is no name of a shard; fetch it again from where it was written")
    return shard


def run_options(shard: Shard, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a shard's run as the command line would give them, with what the machine decides for itself.

    A device map of the shard is written beside the file that `--shard` names, for a run reads it from one.

    Raises:
        UsageError: the command line gives an option that the shard decides.
        OSError: the device map cannot be written.
    """
    for name in CONTRACT_OPTIONS:
        if given.get(OPTION[name].key) is not None:
            raise UsageError(f"--{name} stands beside --shard, and shard {shard.name} decides it: leave --{name} out")
    asked = {name.replace("-", "_"): value for name, value in shard.options.items() if name not in OWN_OPTIONS}
    if (text := shard.options.get(MAP)) is not None:
        place = Path(given["shard"]).with_name(f"{shard.name}.{MAP}.json")
        atomic.write_text(place, str(text))
        asked[OPTION[MAP].key] = str(place)
    own = {name: given[name] for name in OWN_OPTIONS if given.get(name) is not None}
    named = {"precision": "precision", "placement": "placement", "kv": "kv", "attention": "attention"}
    crossed = {key: list(dict.fromkeys(getattr(case, field) for case in shard.cases)) for key, field in named.items()}
    return {**asked, **own, **crossed, "attention": [one for one in crossed["attention"] if one], "model": [*shard.models.values()]}


def own_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `[tool.fitmatrix]` of a machine decides in the run of a shard."""
    return {name: value for name, value in config.items() if name == "gate" or name.replace("_", "-") in OWN_OPTIONS}
