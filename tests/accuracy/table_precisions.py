"""Every precision of the table on smollm2-135m, in RAM: memory, speed and quality of each in one page, reports/precisions.

`tox run -e precisions` runs what smollm2-135m can be loaded in, then copies of it that GPTQ has quantized before.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from harness.catalog import download, resolve
from harness.core.precisions import PRECISIONS
from harness.core.records import Outcome, Result
from harness.results import store
from tests.support.reporting import REPORTS

RESULTS = REPORTS / "precisions"
MODEL = "smollm2-135m"
# Rows of PRECISIONS that take only what is stored that way, and how gptqmodel makes it.
STORED = {"gptq-int8": 8, "gptq-int4": 4}
# Rows of other checkpoints, which nothing makes of this model without a GPU.
OTHERS = {"awq-int4", "chatglm-int8", "chatglm-int4", "gguf"}


def _python(*words: str) -> int:
    return subprocess.run([sys.executable, "-m", *words], check=False, cwd=REPORTS.parent).returncode


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    """Run everything anew."""
    shutil.rmtree(RESULTS, ignore_errors=True)
    folder, plain = tmp_path_factory.mktemp("quantized"), str(download.fetch(resolve.resolve(MODEL)))
    runs = [(MODEL, "all")]
    for precision, bits in STORED.items():
        there = folder / f"{MODEL}-{precision}"
        assert _python("tests.accuracy.quantize", plain, str(there), str(bits)) == 0
        runs.append((str(there), precision))
    for model, precision in runs:
        words = ("--model", model, "--precision", precision, "--placement", "cpu", "--results", str(RESULTS))
        assert _python("pytest", "cases", *words) in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    found, problems = store.read(store.file_of(RESULTS))
    assert not problems
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_is_measured_or_says_why_not(results: list[Result], precision: str) -> None:
    ours = [result for result in results if result.case.precision == precision]
    measured = [result for result in ours if result.outcome is Outcome.OK]
    assert measured or PRECISIONS[precision].unsupported or precision in OTHERS or all(result.why for result in ours)
    for result in measured:
        assert {"ram_peak_bytes", "decode_tok_s", "perplexity"} <= result.metrics.keys()
        assert result.quality
    if precision in STORED:
        assert measured
