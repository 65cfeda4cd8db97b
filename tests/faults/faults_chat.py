"""A chat that is killed.

It leaves nothing that the next run does not remove: processes that import gradio, so minutes at worst.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import psutil
import pytest

from harness.machine.scratch import sweep
from tests.cli.test_chat import folder, free_port, serving
from tests.cli.test_chat_door import tree
from tests.support.reporting import Figure

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio, the extra chat")

__all__ = ["folder"]  # a fixture


def test_a_killed_chat_leaves_what_the_next_run_removes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: list[Figure]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with serving(folder, free_port()) as (process, told):
        assert told.startswith("Chat with ")
        left = tree(process.pid)
        process.kill()
        _, alive = psutil.wait_procs(left, timeout=30)
    sweep(tmp_path)
    kept = list(tmp_path.iterdir())
    figures += [
        Figure(what="processes that outlive a killed chat", rows=len(left), found=str(len(alive)), wanted="0"),
        Figure(what="files that it left and the next run did not remove", rows=1, found=str(len(kept)), wanted="0"),
    ]
    assert not alive
    assert not kept
