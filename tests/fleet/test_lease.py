"""The lease of a machine: one holder at a time, a log of who had it, and where it lies."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import pytest

from harness.core.errors import UsageError
from harness.fleet import lease


def test_a_machine_has_one_lease_for_each_user_and_one_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(lease.LEASE, raising=False)
    assert lease.lease_file("n") == Path(tempfile.gettempdir()) / f"fitmatrix-{os.getuid()}.lease"
    monkeypatch.setenv(lease.LEASE, "/shared/{node}/lease")
    assert lease.lease_file("n7") == Path("/shared/n7/lease")


def test_who_holds_it_is_told_to_who_comes_second(tmp_path: Path) -> None:
    """By the last line of the log: those before it have given it back."""
    place = tmp_path / "lease"
    assert lease.is_free(place)
    for holder in ("shard a", "shard b"):
        with lease.leased(holder, place):
            assert not lease.is_free(place)
            with (
                pytest.raises(UsageError, match=rf"measures another shard \(\S+ taken by process {os.getpid()}: {holder}\)"),
                lease.leased("shard c", place),
            ):
                pass
        assert lease.is_free(place)
    log = (tmp_path / "lease.log").read_text(encoding="utf-8").splitlines()
    assert [re.sub(r"^\S+ | by process \d+", "", line) for line in log] == [
        "taken: shard a", "given back: shard a", "taken: shard b", "given back: shard b",
    ]  # fmt: skip


@pytest.mark.parametrize("text", [None, ""])
def test_a_log_that_is_gone_or_empty_holds_nobody_up(text: str | None, tmp_path: Path) -> None:
    place = tmp_path / "lease"
    with lease.leased("shard a", place):
        (tmp_path / "lease.log").unlink()
        if text is not None:
            (tmp_path / "lease.log").write_text(text, encoding="utf-8")
        with pytest.raises(UsageError, match=r"\(its log is gone\); wait for it, or end that run"), lease.leased("shard b", place):
            pass


def test_a_run_that_fails_does_not_say_that_it_gave_the_machine_back_and_yet_it_did(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), lease.leased("shard a", tmp_path / "lease"):
        raise RuntimeError
    assert lease.is_free(tmp_path / "lease")


def test_without_a_place_it_is_that_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lease.LEASE, str(tmp_path / "own"))
    with lease.leased("shard a"):
        assert not lease.is_free()
        assert lease.is_free(tmp_path / "other")
    with lease.leased("shard a", tmp_path / "other"):
        assert lease.is_free()
