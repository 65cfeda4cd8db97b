"""The tests of the live screen run where Textual is installed, the extra watch."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore = ["test_screen.py"] if find_spec("textual") is None else []
