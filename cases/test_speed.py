"""A case must generate exactly the requested number of tokens; pytest-benchmark times the rounds."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from harness.run.runner import Run

pytestmark = pytest.mark.stage(2)


def test_speed(loaded: Run, benchmark: BenchmarkFixture) -> None:
    load = loaded.plan.case.workload
    cold = loaded.first_round()
    benchmark.group = loaded.plan.case.model
    benchmark.pedantic(loaded.round, rounds=load.repeats, iterations=1)
    if benchmark.stats is not None:  # it is None with --benchmark-disable
        for seconds in loaded.extra_rounds():
            benchmark.stats.update(seconds)
    benchmark.extra_info.update(loaded.metrics())
    for done in (cold, *loaded.warm):
        assert done.new_tokens == load.new_tokens == len(done.token_s)
        assert done.prompt_tokens == load.prompt_tokens
        assert done.batch == load.batch
