"""What a worker answers is the last line that it prints, whatever packages print while they are imported."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from harness.architecture import ask_worker
from harness.architecture.ask_worker import CONFIG_REFUSED, RefusedConfig

pytestmark = pytest.mark.starts_workers


def finish(monkeypatch: pytest.MonkeyPatch, status: int, out: bytes, err: bytes = b"") -> None:
    def run(*_: Any, **__: Any) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess([], status, out, err)

    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.parametrize("noise", [b"", b"No gemlite installation, slow inference!\n", b"{}\n\n"])
def test_the_answer_is_the_last_line(noise: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(monkeypatch, 0, noise + b'{"blocks": []}\n')
    assert ask_worker.ask_worker("build_skeleton", {}, "no skeleton", 1) == b'{"blocks": []}'


def test_a_config_that_is_refused_is_told_in_the_words_of_transformers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    finish(monkeypatch, CONFIG_REFUSED, b"", b'a warning\ntransformers 5 refuses it: "ValueError: no"\n')
    with pytest.raises(RefusedConfig, match=r'^transformers 5 refuses it: "ValueError: no"$'):
        ask_worker.ask_worker("build_skeleton", {}, "no skeleton", 1)
