"""The pytest plugin: translates hooks and fixtures to `harness.run.session`, and decides nothing itself."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from _pytest.terminal import TerminalReporter

from harness.core.errors import HarnessError, UsageError
from harness.core.options import OPTIONS
from harness.core.records import Case, Machine, Outcome, Plan, Result, Verdict
from harness.core.text import line, plural
from harness.fleet.shard_run import ShardRun
from harness.fleet.shards import own_config, read_shard, run_options
from harness.machine import atomic
from harness.results.store import settle
from harness.run.case_result import CaseEnded
from harness.run.live import LiveLine, summary
from harness.run.options import Options, following_names, read_config
from harness.run.resume import Kept, describe_stop, since
from harness.run.runner import Run
from harness.run.session import CaseSubset, Session

SESSION: pytest.StashKey[Session] = pytest.StashKey()
_LIVE: pytest.StashKey[LiveLine] = pytest.StashKey()
_SHARD: pytest.StashKey[ShardRun] = pytest.StashKey()
_LEAST_ROOM = 30  # columns for a verdict behind its case

# What a test shows if its case ended: category of the summary, letter and word. The others fail or are skipped as usual.
_STATUS = {Outcome.OOM: ("oom", "M", "OOM"), Outcome.TIMEOUT: ("timeout", "T", "TIMEOUT")}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fitmatrix", "ways of loading a language model")
    for option in OPTIONS:
        how: dict[str, Any] = {"action": "store_true"} if option.switch else {"metavar": option.metavar}
        if option.repeat:
            how["action"] = "append"
        group.addoption(option.flag, dest=f"fitmatrix_{option.key}", default=None, help=option.help, **how)


def pytest_configure(config: pytest.Config) -> None:
    _take_following_names(config)
    given = {option.key: config.getoption(f"fitmatrix_{option.key}") for option in OPTIONS}
    with _sentence(pytest.UsageError):
        own = read_config(config.rootpath)
        if given["shard"] is None:
            config.stash[SESSION] = Session(Options(config=own, given=given))
            return
        shard = read_shard(Path(given["shard"]))
        options = Options(config=own_config(own), given=run_options(shard, given))
        config.stash[SESSION] = session = Session(options, CaseSubset(cases=frozenset(shard.cases), since=shard.since))
        config.stash[_SHARD] = run = ShardRun(shard, options.results)
        session.on_result = run.add


def _take_following_names(config: pytest.Config) -> None:
    """Give an option the names that follow its value, as the commands do: argparse alone takes them for files."""
    for key, names in following_names(config.invocation_params.args).items():
        taken = [name for name in names if name in config.args and not (config.invocation_params.dir / name).exists()]
        config.getoption(f"fitmatrix_{key}").extend(taken)
        for name in taken:
            config.args.remove(name)
    if not config.args:  # what pytest runs where no file is named
        config.args += config.getini("testpaths") or [str(config.invocation_params.dir)]


@contextmanager
def _sentence(kind: type[Exception]) -> Iterator[None]:
    """Raise what is wrong with the request or with a file as pytest's own error, of one sentence."""
    try:
        yield
    except (HarnessError, OSError) as error:
        raise kind(_said(error)) from None


def _said(error: BaseException) -> str:
    where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    return line(f"{where}{getattr(error, 'strerror', None) or error}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "plan" in metafunc.fixturenames:
        with _sentence(pytest.Collector.CollectError):
            cases = metafunc.config.stash[SESSION].cases()
        metafunc.parametrize("plan", cases, ids=[case.id for case in cases], indirect=True, scope="session")


def _case_of(item: pytest.Item) -> Case | None:
    callspec = getattr(item, "callspec", None)
    case = callspec.params.get("plan") if callspec else None
    return case if isinstance(case, Case) else None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Run all tests of a case together, in the order of the cases and of their stages; without a baseline, none against it."""
    session = config.stash[SESSION]
    if session.options.baseline is None:
        items[:] = [item for item in items if "worse" not in getattr(item, "fixturenames", ())]
    yield  # other plugins deselect here
    order = {case.id: index for index, case in enumerate(session.cases())}
    found = {item: case for item in items if (case := _case_of(item)) is not None}
    places = [index for index, item in enumerate(items) if item in found]
    stable = sorted((items[index] for index in places), key=lambda item: (order[found[item].id], _stage(item)))
    for index, item in zip(places, stable, strict=True):
        items[index] = item
        # Not an error of the test: the case ended before there was a round to time.
        item.add_marker(pytest.mark.filterwarnings("ignore:Benchmark fixture was not used at all"))


def _stage(item: pytest.Item) -> int:
    marker = item.get_closest_marker("stage")
    return int(marker.args[0]) if marker else 99


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Fetch models and start the fork server before the first case; a usage error ends the run here."""
    config = session.config
    cases = [case for item in session.items if (case := _case_of(item)) is not None]
    if not cases or config.option.collectonly or hasattr(config, "workerinput"):
        return
    if session.testsfailed and not config.option.continue_on_collection_errors:
        return  # pytest ends the run
    ours = config.stash[SESSION]
    ours.interrupts.install()
    # Before the session prepares anything; and only between tests does the descriptor lead to the terminal: during them pytest
    # captures it.
    if config.pluginmanager.has_plugin("terminalreporter"):
        live = LiveLine(config.get_terminal_writer()._file, total=len({case.id for case in cases}))
        ours.on_sample = config.stash[_LIVE] = live
    reporter: TerminalReporter | None = config.pluginmanager.get_plugin("terminalreporter")
    shard = config.stash.get(_SHARD, None)
    with (
        _sentence(pytest.UsageError),
        shard.begun(ours.machine, ours.context.environment, ours.cases()) if shard else nullcontext(),
    ):
        ours.prepare(cases, lambda said: reporter.write_line(line(said)) if reporter is not None else None)
    if reporter is not None:
        for notice in ours.notices():
            reporter.write_line(line(notice))
    _write_by_case(session)


def _write_by_case(session: pytest.Session) -> None:
    """Let the terminal show one line per case, its tests' letters between its name and its figures; -v and -q do not change."""
    reporter: TerminalReporter | None = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and reporter.verbosity == 0:
        reporter.showfspath = False
        session.config.pluginmanager.register(_ByCase(session, reporter), "fitmatrix-by-case")


class _ByCase:
    """The hooks that begin and end the line of a case."""

    def __init__(self, session: pytest.Session, reporter: TerminalReporter) -> None:
        cases = [(item.nodeid, case) for item in session.items if (case := _case_of(item)) is not None]
        self._ours, self._reporter = session.config.stash[SESSION], reporter
        self._cases = dict(cases)
        self._first = {case: nodeid for nodeid, case in reversed(cases)}
        self._last = {case: nodeid for nodeid, case in cases}
        self._width = max(len(line(case.id)) for case in self._last)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        case = self._cases.get(nodeid)
        if case is not None and self._first[case] == nodeid:
            self._end_line()
            self._reporter.write(f"{line(case.id):<{self._width}}  ")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        case = self._cases.get(nodeid)
        if case is None or self._last[case] != nodeid or (result := self._ours.shown(case)) is None:
            return
        kept = f"{since(result)}: " if case in self._ours.kept else ""
        self._reporter.write(f"  {self._wrapped(kept + summary(result))}")
        self._end_line()

    def _wrapped(self, text: str) -> str:
        """Wrap a verdict below its own beginning on a terminal; a log has it in one line, and neither cuts it."""
        column = self._reporter._tw.width_of_current_line + 2
        room = self._reporter._tw.fullwidth - column - 1
        if not self._reporter.isatty or len(text) <= room:
            return text
        return f"\n{' ' * column}".join(textwrap.wrap(text, max(room, _LEAST_ROOM), break_long_words=False))

    def _end_line(self) -> None:
        if self._reporter._tw.width_of_current_line:
            self._reporter.write("\n")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: Sequence[str]) -> None:
    """Refuse to measure cases in parallel. pytest-xdist calls this in the only process that can still report it."""
    cases = [case.id.encode("unicode_escape").decode() for case in node.config.stash[SESSION].cases()]  # as pytest writes an id
    ours = re.compile(rf"[\[-]({'|'.join(map(re.escape, cases))})[-\]]")  # and not as a part of one
    if cases and any(map(ours.search, ids)):
        raise pytest.UsageError("cases cannot be measured in parallel: run pytest cases/ without -n (pytest-xdist)")


def _show_live(item: pytest.Item) -> Generator[None, object, object]:
    """Show the live line while a test runs; between its steps the terminal belongs to pytest."""
    live = item.config.stash.get(_LIVE, None)
    try:
        with live.shown() if live else nullcontext():
            return (yield)
    except KeyboardInterrupt:
        # Its fixtures end outside of any test, where pytest-benchmark's warning of a fixture not used may be an error.
        if (benchmark := getattr(item, "funcargs", {}).get("benchmark")) is not None:
            benchmark.skipped = True
        raise


pytest_runtest_setup = pytest_runtest_call = pytest.hookimpl(wrapper=True)(_show_live)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """End a case with the last of its tests: from then on its result is safe."""
    yield from _show_live(item)
    session, case = item.config.stash[SESSION], _case_of(item)
    run = session.current
    if run is not None and run.plan.case == case and (nextitem is None or _case_of(nextitem) != case):
        session.finish(run)
    return None


@pytest.fixture(scope="session")
def machine(request: pytest.FixtureRequest) -> Machine:
    """This machine."""
    return request.config.stash[SESSION].machine


@pytest.fixture(scope="session")
def plan(request: pytest.FixtureRequest) -> Plan:
    """The plan of one case; tests that use it run once for every case."""
    return request.config.stash[SESSION].plan(request.param)


@pytest.fixture(scope="session")
def _run(request: pytest.FixtureRequest, plan: Plan) -> Iterator[Run | Kept | None]:
    session = request.config.stash[SESSION]
    run = session.start(plan)
    yield run
    if isinstance(run, Run) and session.current is run:  # its last test did not finish
        session.finish(run)


@pytest.fixture
def loaded(request: pytest.FixtureRequest, _run: Run | Kept | None, plan: Plan) -> Run:
    """A case in its own process, with the model loaded in it."""
    fault = request.config.stash[SESSION].models.fault(plan.case.model, plan.case.precision)
    if fault is not None:
        raise UsageError(fault)
    if _run is None:
        refused = request.config.stash[SESSION].shown(plan.case)
        pytest.skip(line(f"{refused.verdict.value}: {refused.why}") if refused else "not run")
    if _run.ended is not None:
        pytest.skip(line(f"not measured: {_run.ended.why}"))
    if isinstance(_run, Kept):
        raise _run.end()
    _run.load()
    return _run


@pytest.fixture
def result(loaded: Run) -> Result:
    """The result of the case so far, generation included."""
    loaded.first_round()
    return loaded.result()


@pytest.fixture
def worse(request: pytest.FixtureRequest, _run: Run | Kept | None, plan: Plan) -> tuple[str, ...]:
    """What got worse since the baseline, a sentence each; the earlier tests have measured it."""
    found = request.config.stash[SESSION].against_baseline(plan.case)
    if found is None:
        pytest.skip("not in the baseline")
    if found.unjudged and not found.failures:
        pytest.skip(f"not judged: {'; '.join(found.unjudged)}")
    return found.failures


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn the end of a case into the test's outcome, and record a failure in the result of the case."""
    report = yield
    case = _case_of(item)
    if case is None or call.excinfo is None:
        return report
    if isinstance(call.excinfo.value, HarnessError | OSError):
        report.longrepr = _said(call.excinfo.value)
    elif isinstance(call.excinfo.value, CaseEnded):
        _report_end(item, call.excinfo.value, report)
    if report.failed:
        item.config.stash[SESSION].failed(case, item.name.partition("[")[0])
    return report


def _report_end(item: pytest.Item, ended: CaseEnded, report: pytest.TestReport) -> None:
    """Report the end of a case: what does not fit is a finding, not a failure, and so is OK of a kept result."""
    why = line(str(ended))
    report.longrepr = why
    finding = ended.outcome is not Outcome.CRASH
    if ended.outcome is Outcome.OOM and _was_to_fit(item):
        finding = False
        report.longrepr = f"{why}; the plan predicted that it fits"
    if finding and not (ended.outcome is Outcome.OOM and item.config.stash[SESSION].options.fail_on_oom):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), (item.location[1] or 0) + 1, why)
    for properties in (report.user_properties, item.user_properties):  # of this step, and of later ones, which JUnit XML reads
        properties.append(("outcome", ended.outcome.value))


def _was_to_fit(item: pytest.Item) -> bool:
    """Say whether the plan of an item's case promised that it fits, that of its time if it is kept: else there is no surprise."""
    case, session = _case_of(item), item.config.stash[SESSION]
    return case is not None and (session.kept.get(case) or session.plan(case)).verdict is Verdict.FITS


def pytest_report_teststatus(report: pytest.TestReport | pytest.CollectReport) -> tuple[str, str, Any] | None:
    outcome = dict(getattr(report, "user_properties", ())).get("outcome")
    for known, (category, letter, word) in _STATUS.items():
        if outcome == known.value and report.skipped:
            return category, letter, (word, {"yellow": True})
    return None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> Iterator[None]:
    """Clean up once everything is measured, and render the page; its path is the last line of the run."""
    ours = session.config.stash[SESSION]
    ours.interrupts.hold()
    stops_between_tests = session.shouldstop or session.shouldfail
    ours.interrupted = exitstatus == pytest.ExitCode.INTERRUPTED and not stops_between_tests
    try:
        yield
        if any(_case_of(item) is not None for item in session.items):
            _name_no_host(session.config.getoption("xmlpath", None))
    finally:
        _wind_up(session, ours)


def _name_no_host(junit: str | None) -> None:
    """Take the machine's name out of the JUnit XML that pytest has written, which is published as results are."""
    if junit is not None and (path := Path(junit)).is_file():
        try:
            text = path.read_text(encoding="utf-8")
            atomic.write_text(path, re.sub(r'(<testsuite [^>]*\bhostname=")[^"]*', r"\1localhost", text))
        except OSError as error:
            raise pytest.UsageError(line(f"--junit-xml {path}: {error.strerror}, so it still names this machine")) from None


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Leave the machine's name out of what pytest-benchmark writes."""
    machine_info["node"] = "localhost"


def _wind_up(session: pytest.Session, ours: Session) -> None:
    """Leave results, a page and nothing else, even if pytest's own last output failed (its terminal may be gone)."""
    if live := session.config.stash.get(_LIVE, None):
        live.close()
    ours.close()
    settled = settle(ours.store)
    try:
        if shard := session.config.stash.get(_SHARD, None):
            shard.end(int(session.exitstatus), settled)
        page = ours.render()
    except (HarnessError, OSError) as error:
        raise pytest.UsageError("; ".join(filter(None, [settled, _said(error)]))) from None
    finally:
        ours.interrupts.restore()
    if ours.interrupts.exit_status is not None:
        session.exitstatus = ours.interrupts.exit_status
    reporter: TerminalReporter | None = session.config.pluginmanager.get_plugin("terminalreporter")
    if settled is not None and reporter is not None:
        reporter.write_line(line(settled), red=True)
    if ours.interrupted and reporter is not None:
        reporter.write_line(describe_stop(ours.options.resume))
    if page is not None and reporter is not None:
        if resumed := ours.resumed():
            reporter.write_line(line(resumed))
        if disturbed := ours.disturbed():
            reporter.write_line(line(disturbed), yellow=True)
        reporter.write_line(f"{plural(ours.added + len(ours.kept), 'result')} in {line(str(ours.store.path))}")
        for problem in ours.problems:
            reporter.write_line(line(str(problem)), yellow=True)
        reporter.write_line(f"page: {line(str(page))}")
