"""Register the plugin, and let Ctrl-C end in a sentence while it is imported; from then on pytest answers it."""

import sys

import pytest

from harness.machine import signals

pytest_plugins = ["harness.plugin"]
_heed = signals.end_on_interrupt("nothing was run", lambda: sys.exit(pytest.ExitCode.INTERRUPTED))  # pytest shows what it captured


@pytest.hookimpl(tryfirst=True)
def pytest_configure() -> None:
    _heed()
