"""The pytest plugin: translates hooks and fixtures to `harness.session`, and decides nothing itself."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest
from _pytest.terminal import TerminalReporter

from harness.case import Case, Machine, Outcome, Plan, Result
from harness.errors import HarnessError
from harness.live import LiveLine
from harness.options import OPTIONS, Options, read_config
from harness.runner import CaseEnded, Run
from harness.session import Session

SESSION: pytest.StashKey[Session] = pytest.StashKey()

# What a test shows whose case ended: category of the summary, letter and word. The others fail or are skipped as usual.
_STATUS = {Outcome.OOM: ("oom", "M", "OOM"), Outcome.TIMEOUT: ("timeout", "T", "TIMEOUT")}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fitmatrix", "ways of loading a language model")
    for option in OPTIONS:
        how: dict[str, Any] = {"action": "store_true"} if option.switch else {"metavar": option.metavar}
        if option.repeat:
            how["action"] = "append"
        group.addoption(option.flag, dest=f"fitmatrix_{option.key}", default=None, help=option.help, **how)


def pytest_configure(config: pytest.Config) -> None:
    given = {option.key: config.getoption(f"fitmatrix_{option.key}") for option in OPTIONS}
    try:
        config.stash[SESSION] = Session(Options(config=read_config(config.rootpath), given=given))
    except HarnessError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "plan" in metafunc.fixturenames:
        cases = metafunc.config.stash[SESSION].cases()
        metafunc.parametrize("plan", cases, ids=[case.id for case in cases], indirect=True, scope="session")


def _case_of(item: pytest.Item) -> Case | None:
    callspec = getattr(item, "callspec", None)
    case = callspec.params.get("plan") if callspec else None
    return case if isinstance(case, Case) else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run all tests of a case together, in the order of the cases and of their stages; and prepare what they need."""
    session = config.stash[SESSION]
    order = {case.id: index for index, case in enumerate(session.cases())}
    found = {item: case for item in items if (case := _case_of(item)) is not None}
    places = [index for index, item in enumerate(items) if item in found]
    stable = sorted((items[index] for index in places), key=lambda item: (order[found[item].id], _stage(item)))
    for index, item in zip(places, stable, strict=True):
        items[index] = item


def _stage(item: pytest.Item) -> int:
    marker = item.get_closest_marker("stage")
    return int(marker.args[0]) if marker else 99


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Fetch models and start the fork server before the first case; a user's mistake ends the run here."""
    cases = [case for item in session.items if (case := _case_of(item)) is not None]
    if not cases or session.config.option.collectonly:
        return
    ours = session.config.stash[SESSION]
    try:
        _refuse_xdist(session.config)
        if ours.on_sample is None:
            ours.on_sample = LiveLine(session.config.get_terminal_writer(), total=len({case.id for case in cases}))
        ours.prepare(cases)
    except HarnessError as error:
        raise pytest.UsageError(str(error)) from None


def _refuse_xdist(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("cases cannot be measured side by side: run pytest cases/ without -n (pytest-xdist)")


@pytest.fixture(scope="session")
def machine(request: pytest.FixtureRequest) -> Machine:
    """This machine."""
    return request.config.stash[SESSION].machine


@pytest.fixture(scope="session")
def plan(request: pytest.FixtureRequest) -> Plan:
    """The plan of one case; tests that use it run once for every case."""
    return request.config.stash[SESSION].plan(request.param)


@pytest.fixture(scope="session")
def _run(request: pytest.FixtureRequest, plan: Plan) -> Iterator[Run | None]:
    session = request.config.stash[SESSION]
    run = session.start(plan)
    yield run
    if run is not None:
        session.finish(run)


@pytest.fixture
def loaded(_run: Run | None, plan: Plan) -> Run:
    """A case in its own process, with the model loaded in it."""
    if _run is None:
        pytest.skip(f"{plan.verdict.value}: {plan.why}")
    if _run.ended is not None:
        pytest.skip(f"not measured: {_run.ended.why}")
    _run.load()
    return _run


@pytest.fixture
def result(loaded: Run) -> Result:
    """What the case has shown, generation included."""
    loaded.first_round()
    return loaded.result()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn the end of a case into the test's outcome: what does not fit is a finding, not a failure."""
    report = yield
    if call.excinfo is None or not isinstance(call.excinfo.value, CaseEnded):
        return report
    ended, session = call.excinfo.value, item.config.stash[SESSION]
    report.longrepr = str(ended)
    finding = ended.outcome in (Outcome.OOM, Outcome.TIMEOUT, Outcome.UNSUPPORTED)
    if finding and not (ended.outcome is Outcome.OOM and session.options.fail_on_oom):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), (item.location[1] or 0) + 1, str(ended))
    report.user_properties.append(("outcome", ended.outcome.value))
    return report


def pytest_report_teststatus(report: pytest.TestReport | pytest.CollectReport) -> tuple[str, str, Any] | None:
    outcome = dict(getattr(report, "user_properties", ())).get("outcome")
    for known, (category, letter, word) in _STATUS.items():
        if outcome == known.value and report.skipped:
            return category, letter, (word, {"yellow": True})
    return None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Render the page once everything is measured; its name is the last line of the run."""
    yield
    ours = session.config.stash[SESSION]
    ours.close()
    try:
        page = ours.render()
    except HarnessError as error:
        raise pytest.UsageError(str(error)) from None
    reporter: TerminalReporter | None = session.config.pluginmanager.get_plugin("terminalreporter")
    if page is not None and reporter is not None:
        reporter.write_line(f"{len(ours.results)} results in {ours.store.path}")
        reporter.write_line(f"page: {page}")
