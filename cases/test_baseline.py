"""No figure of a case may be worse than the baseline, and what worked must still work."""

import pytest

pytestmark = pytest.mark.stage(5)


def test_baseline(worse: tuple[str, ...]) -> None:
    assert not worse, "; ".join(worse)
