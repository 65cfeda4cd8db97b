"""A case must load, the way it was asked for."""

import pytest

from harness.runner import Run
from harness.verify import OK

pytestmark = pytest.mark.stage(1)


def test_load(loaded: Run) -> None:
    wrong = {name: said for name, said in loaded.checks.items() if said != OK}
    assert not wrong, "; ".join(wrong.values())
