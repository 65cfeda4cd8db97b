"""A shard on the machine that runs it: what must be right before it begins, and the receipt that grows with its results."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path

from msgspec.structs import replace

from harness.core.errors import HarnessError, UsageError
from harness.core.records import Case, Machine, Result, encode_record
from harness.fleet import conformity, lease
from harness.fleet.contract import CLOCK_SLACK, Shard, digest_of, parse_utc, utc, write_record
from harness.fleet.receipt import Receipt, digest_of_line, file_name, read_results
from harness.results import store


class ShardRun:
    """One shard, from the check of the machine to the last word of the receipt, which lies in the directory of the results."""

    def __init__(self, shard: Shard, results: Path) -> None:
        self.shard = shard
        self._file = results / store.NAME
        self._place = results / file_name(shard.name)
        self._receipt: Receipt | None = None
        self._held = ExitStack()

    @contextmanager
    def begun(self, machine: Machine, versions: Mapping[str, str], cases: Sequence[Case]) -> Iterator[None]:
        """Take the machine, write the first receipt, and check that the shard can be run here; `cases` are those to come.

        An error within goes into the receipt as well, so that the driver hears of it.

        Raises:
            UsageError: this machine is not what the contract says, or measures another shard.
            OSError: there is no room for the receipt.
        """
        self._held.enter_context(lease.leased(f"shard {self.shard.name} of contract {self.shard.contract[:12]}"))
        now = utc()
        self._receipt = Receipt(
            contract=self.shard.contract,
            shard=self.shard.name,
            shard_digest=digest_of(self.shard),
            attempt=self.shard.attempt,
            machine=conformity.given_name(),
            identity=conformity.machine_identity(self.shard.contract),
            described=machine,
            versions=dict(versions),
            threads=os.environ.get("OMP_NUM_THREADS", ""),
            started_at=now,
            heard_at=now,
            results=self._digests(),
        )
        self._write()
        try:
            self._check(machine, versions, cases)
            yield
        except (HarnessError, OSError) as error:
            self._write(problem=str(error), ended_at=utc())
            raise

    def _check(self, machine: Machine, versions: Mapping[str, str], cases: Sequence[Case]) -> None:
        shard, now = self.shard, datetime.now(timezone.utc)
        if other := conformity.not_of_class(shard.machine_class, machine):
            raise UsageError(f"--shard {shard.name}: this machine {other}; run it on a machine of that class")
        if other := conformity.other_version(shard.versions, versions):
            raise UsageError(f"--shard {shard.name}: {other}; install that version, or plan the fleet anew")
        if parse_utc(shard.made_at) > now + CLOCK_SLACK:
            raise UsageError(
                f"--shard {shard.name}: the clock here says {utc(now)}, before its contract of {shard.made_at}; set it"
            )
        if strange := [case.id for case in shard.cases if case not in cases]:
            raise UsageError(f"--shard {shard.name}: {strange[0]} is no case here ({len(strange)} are not); plan the fleet anew")

    def add(self, result: Result) -> None:
        """Vouch for a result that was just appended. Raises OSError: there is no room for the receipt."""
        if self._receipt is not None and result.case in self.shard.cases:
            self._receipt.results[self.shard.key(result.case)] = digest_of_line(encode_record(result))
            self._write()

    def end(self, exit_status: int, problem: str | None) -> None:
        """Write the last receipt, with all that is in the file by now, and give the machine back; `problem` is one of the disk.

        Raises:
            OSError: there is no room for the receipt.
        """
        with self._held:
            if self._receipt is None:
                return
            self._receipt = replace(self._receipt, results=self._digests())
            self._write(ended_at=utc(), exit_status=exit_status, problem=problem or self._receipt.problem)

    def _digests(self) -> dict[str, str]:
        """Return, by key, the digest of each case's last line in the file of results that is not older than the contract."""
        if not self._file.exists():
            return {}
        cases, since = set(self.shard.cases), self.shard.since
        lines = ((one.result, one.digest) for one in read_results(self._file))
        return {self.shard.key(found.case): digest for found, digest in lines if found.case in cases and found.at >= since}

    def _write(self, **changes: object) -> None:
        assert self._receipt is not None
        self._receipt = replace(self._receipt, heard_at=utc(), **changes)
        write_record(self._place, self._receipt)
