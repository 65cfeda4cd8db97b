"""A case must load with the precision and placement that were asked for."""

import pytest

from harness.measure.verify import OK
from harness.run.runner import Run

pytestmark = pytest.mark.stage(1)


def test_load(loaded: Run) -> None:
    wrong = {name: said for name, said in loaded.checks.items() if said != OK}
    assert not wrong, "; ".join(wrong.values())
