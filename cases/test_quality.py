"""The weights that were just timed must still give sensible answers."""

import pytest

from harness.run.runner import Run

pytestmark = pytest.mark.stage(3)


def test_quality(loaded: Run) -> None:
    loaded.score()
    quality = loaded.quality()
    assert quality is not None
    assert quality.verdict != "broken", quality.why
