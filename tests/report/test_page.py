"""The page of results: what it says, in which order, and that it says nothing the store does not."""

import base64
import hashlib
import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import msgspec
import pytest

from harness.core import units
from harness.core.errors import StoreError
from harness.core.metrics import METRICS, format_metric
from harness.core.placements import PLACEMENTS
from harness.core.records import Answer, Interference, Machine, Outcome, Phase, Quality, Result, Tier, Timeline, Verdict, Workload
from harness.core.text import visible
from harness.core.units import GIB
from harness.report.page import charts, render, view
from harness.results import needed, selection, store
from tests.support import builders

GOLDEN = Path(__file__).parents[1] / "data/results-v1.jsonl"
GPU_MODEL, CPU_MODEL = "chatglm-6b", "smollm2-135m"
VOID = {"meta", "link", "br", "use", "path", "rect", "line", "input"}
replace = msgspec.structs.replace


@dataclass
class Node:
    """An element of a page with its text."""

    tag: str
    attrs: dict[str, str]
    children: list["Node | str"] = field(default_factory=list)

    @property
    def text(self) -> str:
        """What a reader gets of it, with a blank between elements but none before a point."""
        if self.tag in ("script", "style"):
            return ""
        said = " ".join("".join(child if isinstance(child, str) else f" {child.text} " for child in self.children).split())
        return re.sub(r" (?=[,.:;)])", "", said)

    def all(self, tag: str, **wanted: str) -> list["Node"]:
        """Find the elements below with this tag and these attributes; `look` is one of the classes."""
        look, by_key = wanted.pop("look", ""), {key.replace("_", "-"): value for key, value in wanted.items()}
        return [
            node
            for node in self.below()
            if node.tag == tag
            and by_key.items() <= node.attrs.items()
            and (not look or look in node.attrs.get("class", "").split())
        ]

    def below(self) -> Iterator["Node"]:
        for child in self.children:
            if isinstance(child, Node):
                yield child
                yield from child.below()


def programs(root: Node) -> list[Node]:
    """Find the scripts of a page that run: those with a type are blocks of data."""
    return [node for node in root.all("script") if "type" not in node.attrs]


class Reader(HTMLParser):
    """Builds the tree of a page, and fails on tags that do not close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open = [Node("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {key: value or "" for key, value in attrs})
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Node(tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop().tag == tag, f"</{tag}> closes another element, at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read(html: str) -> Node:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert len(reader.open) == 1
    return reader.open[0]


def rendered(results: list[Result], **options: Any) -> Node:
    return read(render.render(results, **options))


@pytest.fixture(scope="module")
def golden() -> list[Result]:
    return [store.decode(line) for line in GOLDEN.read_bytes().splitlines()]


@pytest.fixture(scope="module")
def root(golden: list[Result]) -> Node:
    return rendered(golden)


@pytest.fixture
def result(golden: list[Result]) -> Result:
    """A case that works on a GPU, with everything recorded."""
    return next(r for r in reversed(golden) if r.case.id == f"{GPU_MODEL}/int8/direct")


def variant(result: Result, precision: str, placement: str = "direct", **changes: Any) -> Result:
    case = replace(result.case, precision=precision, placement=placement, workload=changes.pop("workload", result.case.workload))
    return replace(result, id=case.id, case=case, **changes)


def details_of(root: Node, result: Result) -> Node:
    name = result.case.id.replace("/", "-")
    return root.all("details", id=f"case-{name}")[0]


def cell_of(root: Node, result: Result) -> Node:
    name = result.case.id.replace("/", "-")
    return next(cell for cell in root.all("td", look="cell") if cell.all("a", href=f"#case-{name}"))


def test_the_golden_covers_every_outcome_and_verdict(golden: list[Result]) -> None:
    assert {result.outcome for result in golden} == set(Outcome)
    assert {result.verdict for result in golden} == set(Verdict)


def test_every_figure_on_the_page_is_the_stored_one(golden: list[Result], root: Node) -> None:
    for result in selection.newest(golden):
        shown = details_of(root, result).all("data")
        metrics = {figure.attrs["data-key"]: figure for figure in shown if figure.attrs.get("data-key") in METRICS}
        assert {key: float(figure.attrs["value"]) for key, figure in metrics.items()} == result.metrics
        assert {key: figure.text for key, figure in metrics.items()} == {
            key: format_metric(key, value) for key, value in result.metrics.items()
        }


def test_real_and_synthetic_results_of_a_case_stand_side_by_side() -> None:
    ok = builders.result(metrics={"decode_tok_s": 1.0})
    twin = replace(ok, weights="synthetic", run="random")
    assert selection.newest([ok, twin]) == [ok, twin]
    assert [(block.synthetic, len(block.matrices[0].cells)) for block in view.blocks([ok, twin])] == [
        (False, 1),
        (True, 1),
    ]
    assert [head.text for head in rendered([ok, twin]).all("h2")][:3] == [
        "As the plan said 2 models",
        ok.case.model,
        f"{ok.case.model} synthetic weights",
    ]


def test_what_a_case_showed_stands_against_a_later_plan_of_the_same_versions() -> None:
    ok = builders.result(environment={"torch": "2.13"})
    planned = replace(ok, outcome=Outcome.SKIPPED, verdict=Verdict.TOO_BIG, stage="plan", run="later")
    newer = replace(planned, environment={"torch": "2.14"})
    assert selection.newest([ok, planned]) == [ok]
    assert selection.newest([planned, ok]) == [ok]
    assert selection.newest([ok, newer]) == [newer]


def test_the_cells_show_memory_ready_time_speed_and_quality(golden: list[Result], root: Node) -> None:
    for result in selection.newest(golden):
        if result.outcome is not Outcome.OK:
            continue
        shown = {figure.attrs.get("data-key", ""): float(figure.attrs["value"]) for figure in cell_of(root, result).all("data")}
        need = needed.need_of(result)
        assert need
        memory = {"" if need.how else need.key: need.bytes}
        assert shown == memory | {key: result.metrics[key] for key in ("ready_s", "decode_tok_s")}
        assert result.quality
        assert result.quality.verdict in cell_of(root, result).text


def test_the_last_result_of_a_case_counts(golden: list[Result], root: Node) -> None:
    first, *_, last = (result for result in golden if result.case.id == f"{GPU_MODEL}/int4/direct")
    assert first.metrics["decode_tok_s"] != last.metrics["decode_tok_s"]
    assert details_of(root, last).all("data", data_key="decode_tok_s")[0].attrs["value"] == str(last.metrics["decode_tok_s"])
    assert "58 results read, 56 cases shown" in root.text


def judged(verdict: str) -> Quality:
    return Quality(probe="1", verdict=verdict, why="", answers=[Answer(question="2 + 2 =", answer="5", correct=False)])


def test_the_machine_is_shown_as_the_newest_result_found_it(result: Result) -> None:
    fuller = replace(result.machine, tiers=(replace(result.machine.tiers[0], free_bytes=5 << 30), *result.machine.tiers[1:]))
    root = rendered([result, variant(result, "fp16"), replace(result, machine=fuller)])
    assert "12.0 GiB 5.00 GiB" in root.all("table", look="tiers")[0].text


def test_every_machine_and_model_has_a_block_and_an_entry_in_the_contents(result: Result) -> None:
    other = replace(result, machine=replace(result.machine, name="another machine"))
    small = replace(result, case=replace(result.case, model="small"))
    noisy = [replace(one, noisy={"decode_tok_s": "another program"}) for one in (result, other, small)]
    names = [f"{GPU_MODEL} on {result.machine.name}", f"{GPU_MODEL} on another machine", f"small on {result.machine.name}"]
    root = rendered(noisy)
    assert [head.text for head in root.all("h2")][:-1] == ["Worth a look 3 models", *names]
    links = [link.attrs["href"][1:] for link in root.all("nav")[0].all("a")]
    assert links == [block.attrs["id"] for block in root.all("section", look="block") if "id" in block.attrs]
    root = rendered([noisy[0], other, small])
    assert [head.text for head in root.all("h2")][:-1] == [
        "Worth a look 1 model",
        "As the plan said 2 models",
        *names[1:],
        names[0],
    ]


def lines_of(root: Node) -> list[str]:
    """The models that are folded, as their lines read."""
    return [model.all("summary")[0].text for model in root.all("details", look="model")]


def test_a_model_whose_cases_work_as_planned_is_one_line_with_its_answer(result: Result) -> None:
    small = replace(result, case=replace(result.case, model="small"))
    root = rendered([result, small])
    assert not root.all("nav")
    memory = f"{units.format_size(result.metrics['vram_process_peak_bytes']).split()[0]} of 11.6 GiB VRAM"
    answer = f"works int8 with placement direct {memory} 21.0 s ready 8.94 tokens/s"
    assert lines_of(root) == [f"{GPU_MODEL} {answer}", f"small {answer}"]
    assert all("open" not in model.attrs for model in root.all("details", look="model"))
    assert not rendered([result]).all("details", look="model")  # the only model is what the page is about


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"outcome": Outcome.OOM, "stage": "load"}, "1 × out of memory 1 false fit"),
        ({"outcome": Outcome.OOM, "stage": "load", "verdict": Verdict.TOO_BIG}, "1 × out of memory"),
        ({"outcome": Outcome.CRASH, "stage": "load"}, "1 × crashed"),
        ({"outcome": Outcome.SKIPPED, "stage": "plan", "verdict": Verdict.TOO_BIG, "metrics": {}}, "nothing works"),
        ({"verdict": Verdict.TOO_BIG}, "1 false refusal"),
        ({"noisy": {"decode_tok_s": "others"}}, "1 noisy figure"),
        ({"quality": judged("degraded")}, "1 × answers degraded"),
        ({"quality": judged("broken")}, "1 × answers broken"),
        ({"checks": {"placement": "on the cpu"}}, "1 × check failed"),
    ],
)
def test_what_failed_is_noisy_or_surprises_is_open_and_says_so(result: Result, changes: dict[str, object], said: str) -> None:
    small = replace(result, case=replace(result.case, model="small"))
    root = rendered([replace(result, **changes), small])
    (entry,) = root.all("nav")[0].all("li")
    assert (entry.all("a")[0].text, entry.all("span", look="doubts")[0].text) == (GPU_MODEL, said)
    assert [line.split()[0] for line in lines_of(root)] == ["small"]


def test_what_the_plan_left_out_does_not_open_a_model(result: Result) -> None:
    small = replace(result, case=replace(result.case, model="small"))
    for verdict in (Verdict.TOO_BIG, Verdict.INVALID, Verdict.UNAVAILABLE):
        left_out = variant(result, "fp32", outcome=Outcome.SKIPPED, verdict=verdict, stage="plan", metrics={})
        assert len(lines_of(rendered([result, left_out, small]))) == 2


def test_every_anchor_is_unique_and_every_link_leads_somewhere(golden: list[Result], result: Result) -> None:
    twins = [replace(result, case=replace(result.case, model=name)) for name in ("a b", "a/b", "a-b")]
    root = rendered([*golden, *twins])
    ids = [node.attrs["id"] for node in root.below() if "id" in node.attrs]
    assert len(ids) == len(set(ids))
    assert {link.attrs["href"][1:] for link in root.all("a")} <= set(ids)


def test_rows_and_columns_follow_the_tables_and_unknown_names_come_last(result: Result) -> None:
    names = [("int3", "direct"), ("int4", "cpu"), ("fp32", "tape"), ("bf16", "auto"), ("int8", "direct")]
    table = rendered([variant(result, *pair) for pair in names]).all("table", look="matrix")[0]
    heads = {scope: [head.text.split()[0] for head in table.all("th", scope=scope)] for scope in ("col", "row")}
    assert heads == {"col": ["direct", "auto", "cpu", "tape"], "row": ["fp32", "bf16", "int8", "int4", "int3"]}


def test_every_size_of_a_limit_is_a_column(result: Result) -> None:
    sizes = [("direct", None), ("cpu", None), ("direct", 12 * GIB), ("direct", 8 * GIB)]
    under = [replace(one := variant(result, "bf16", name), case=replace(one.case, vram_bytes=size)) for name, size in sizes]
    table = rendered(under).all("table", look="matrix")[0]
    assert [head.text for head in table.all("th", scope="col")] == ["8 GiB VRAM", "12 GiB VRAM", "no limit", "no limit"]
    groups = table.all("th", scope="colgroup")
    assert [(group.text.split()[0], group.attrs["colspan"]) for group in groups] == [("direct", "3"), ("cpu", "1")]


WORDS = [
    (Outcome.OK, Verdict.FITS, "works"),
    (Outcome.OOM, Verdict.TIGHT, "out of memory"),
    (Outcome.TIMEOUT, Verdict.FITS, "timed out"),
    (Outcome.CRASH, Verdict.FITS, "crashed"),
    (Outcome.UNSUPPORTED, Verdict.UNKNOWN, "not supported"),
    (Outcome.SKIPPED, Verdict.TOO_BIG, "too big"),
    (Outcome.SKIPPED, Verdict.INVALID, "unsupported combination"),
    (Outcome.SKIPPED, Verdict.UNAVAILABLE, "unavailable"),
    (Outcome.SKIPPED, Verdict.FITS, "skipped"),
]


@pytest.mark.parametrize(("outcome", "verdict", "word"), WORDS)
def test_a_cell_says_its_verdict_in_a_word_beside_an_icon(result: Result, outcome: Outcome, verdict: Verdict, word: str) -> None:
    stage = "load" if outcome is not Outcome.SKIPPED else "plan"
    changed = variant(result, "fp16", outcome=outcome, verdict=verdict, stage=stage)
    link = cell_of(rendered([result, changed]), changed).all("a")[0]
    assert link.text == word
    icon = link.all("use")[0].attrs["href"]
    assert rendered([result]).all("symbol", id=icon[1:])


def test_a_combination_that_was_refused_without_running_cannot_work(result: Result) -> None:
    refused = variant(result, "fp16", outcome=Outcome.UNSUPPORTED, verdict=Verdict.INVALID, stage="plan", metrics={}, estimate=None)
    refused = replace(refused, why="a rule forbids it")
    root = rendered([result, refused])
    assert cell_of(root, refused).text == "unsupported combination a rule forbids it"
    assert "Not run." in details_of(root, refused).text


def test_placements_that_need_a_gpu_fold_into_one_line(golden: list[Result]) -> None:
    laptop = [result for result in golden if not result.machine.gpus]
    root = rendered(laptop)
    line = "3 placements need a GPU: direct, ram-to-gpu, gpu+cpu"
    (fold,) = root.all("details", look="fold")
    assert fold.all("summary")[0].text == line
    assert [cell.text for cell in fold.all("li", look="cell")][:2] == ["fp32 direct unavailable", "bf16 direct unavailable"]
    columns = [head.text.split()[0] for head in root.all("table", look="matrix")[0].all("th", scope="col")]
    assert columns == ["auto", "dispatch", "disk", "cpu"]
    group = root.all("details", look="group")[0]
    assert group.all("summary")[0].text == line
    assert len(group.all("details", look="case")) == 9


def test_a_page_without_any_possible_case_has_no_empty_matrix(golden: list[Result]) -> None:
    root = rendered([result for result in golden if result.verdict is Verdict.UNAVAILABLE])
    assert not root.all("table", look="matrix")
    assert "None of the 13 cases works here: 13 × unavailable." in root.all("p", look="say")[0].text


def speed(tokens: float) -> dict[str, float]:
    return {"decode_tok_s": tokens, "vram_peak_bytes": 4 << 30, "ready_s": 2.5}


def test_the_fastest_sound_case_is_recommended(result: Result) -> None:
    slow = variant(result, "fp16", metrics=speed(5.0))
    fast = variant(result, "int8", metrics=speed(9.0), quality=None)
    degraded = variant(result, "int4", metrics=speed(20.0), quality=judged("degraded"))
    unlike = variant(result, "fp32", metrics=speed(25.0), checks={"precision": "did not take effect"})
    broken = variant(result, "int4", "auto", metrics=speed(30.0), quality=judged("broken"))
    dead = variant(result, "fp16", "auto", metrics=speed(40.0), outcome=Outcome.CRASH, stage="score")
    assert selection.best_result([slow, broken, degraded, fast, unlike, dead]) is fast
    assert selection.best_result([degraded, broken, dead]) is degraded
    assert selection.best_result([broken, dead]) is None


def test_of_two_that_are_as_fast_the_undisturbed_is_recommended(result: Result) -> None:
    calm, half = (variant(result, "fp16", metrics=speed(tokens)) for tokens in (10.0, 5.0))
    loud = variant(result, "int8", metrics=speed(11.0), noisy={"decode_tok_s": "others used 1 of 2 cores"})
    assert selection.best_result([calm, loud]) is calm
    assert selection.best_result([half, loud]) is loud


def test_what_is_a_little_slower_in_much_less_memory_is_recommended(result: Result) -> None:
    wide = variant(result, "fp32", metrics=speed(10.0))
    half = variant(result, "bf16", metrics={**speed(9.4), "vram_peak_bytes": 2 << 30})
    assert selection.best_result([wide, half]) is half
    for slower, bytes_needed in ((8.8, 2 << 30), (9.4, (4 << 30) - 1)):
        other = variant(result, "bf16", metrics={**speed(slower), "vram_peak_bytes": bytes_needed})
        assert selection.best_result([wide, other]) is wide
    loud = variant(result, "bf16", metrics={**speed(9.4), "vram_peak_bytes": 2 << 30}, noisy={"decode_tok_s": "others"})
    assert selection.best_result([wide, loud]) is wide


def test_a_plainer_call_for_the_same_is_recommended(result: Result) -> None:
    held = builders.loaded(tiers={"gpu:0": 1008})
    longer = variant(result, "fp16", "dispatch", metrics=speed(10.0), loaded=held)
    plain = variant(result, "fp16", "direct", metrics=speed(9.4), loaded=held)
    assert selection.best_result([longer, plain]) is plain
    split = builders.loaded(tiers={"gpu:0": 500, "cpu": 508})
    for other in (
        variant(result, "fp16", "direct", metrics=speed(8.8), loaded=held),
        variant(result, "fp16", "direct", metrics=speed(9.4), loaded=split),
        variant(result, "bf16", "direct", metrics=speed(9.4), loaded=held),
        variant(result, "fp16", "direct", metrics={**speed(9.4), "vram_peak_bytes": 6 << 30}, loaded=held),
        variant(result, "fp16", "direct", metrics=speed(9.4), loaded=held, noisy={"decode_tok_s": "others"}),
    ):
        assert selection.best_result([longer, other]) is longer


def test_the_answer_comes_first_with_its_figures_and_the_code(result: Result) -> None:
    root = rendered([variant(result, "fp16", metrics=speed(5.0)), result])
    answer = root.all("div", look="answer")[0]
    capacity = result.machine.gpus[0].capacity_bytes
    need = needed.need_of(result)
    assert capacity
    assert need
    assert answer.all("p", look="say")[0].text == (
        f"{GPU_MODEL} fits this machine: int8 on gpu:0 (placement direct, straight to the GPU), "
        f"{units.format_gib(need.bytes)} of {units.format_size(capacity)} VRAM, "
        f"{units.format_rate(result.metrics['decode_tok_s'])}, ready in {units.format_seconds(result.metrics['ready_s'])}, "
        "answers intact."
    )
    assert "".join(str(child) for child in answer.all("code")[0].children) == result.code
    assert "Uses the least memory: fp16 with placement direct, derived 4.34 of 11.6 GiB VRAM, 5.00 tokens/s" in answer.text


def test_where_nothing_works_the_answer_says_how_it_ended_and_what_was_nearest(golden: list[Result]) -> None:
    failed = [r for r in selection.newest(golden) if r.outcome is not Outcome.OK and r.machine.gpus]
    answer = rendered(failed).all("div", look="answer")[0]
    assert answer.text.startswith(
        "None of the 19 cases works here: 2 × out of memory, 3 × timed out, 1 × crashed, 1 × not supported"
    )
    assert "Closest to fitting: bf16 with placement direct" not in answer.text
    assert "Closest to fitting: bf16 with placement ram-to-gpu, predicted to need 12.1 of 11.6 GiB VRAM." in answer.text


def test_answers_that_are_broken_everywhere_are_no_recommendation(result: Result) -> None:
    answer = rendered([replace(result, quality=judged("broken"))]).all("div", look="answer")[0]
    assert answer.text == "1 case can be loaded here, but the answers are broken."


def test_how_often_it_was_measured_makes_no_matrix_and_no_case_of_its_own(result: Result) -> None:
    fewer, more = (replace(result.case.workload, repeats=repeats) for repeats in (3, 7))
    found = [variant(result, "fp16", workload=fewer), result, variant(result, result.case.precision, workload=more)]
    (block,) = view.blocks(found)
    (matrix,) = block.matrices
    assert len(matrix.cells) == 2
    assert matrix.caption.endswith("3 to 7 warm rounds")
    assert {cell.result.case.workload.repeats for cell in matrix.cells} == {3, 7}


def test_each_answer_of_several_workloads_says_what_it_is_for(result: Result) -> None:
    longer = replace(result.case.workload, prompt_tokens=512)
    root = rendered([result, variant(result, "int8", workload=longer)])
    heads = [head.text for head in root.all("h3") if head.text.startswith("Answer ")]
    assert len(heads) == len(root.all("div", look="answer")) == 2
    assert any("512 tokens in" in head for head in heads)


def test_workloads_are_not_mixed_in_one_matrix(result: Result) -> None:
    longer = Workload(prompt_tokens=1024, new_tokens=256)
    root = rendered([variant(result, "fp16"), result, variant(result, "int8", workload=longer, metrics=speed(99.0))])
    tables = root.all("table", look="matrix")
    assert [len(table.all("td", look="cell")) for table in tables] == [2, 1]
    assert ["1,024 tokens in, 256 out" in table.text for table in tables] == [False, True]
    assert "99.0 tokens/s" not in root.all("p", look="say")[0].text


def test_a_figure_that_is_missing_everywhere_is_left_out_and_one_that_was_predicted_says_why(result: Result) -> None:
    bare = replace(result, metrics={"load_s": 3.0}, machine=Machine(name="no GPU", tiers=(Tier(name="cpu", kind="cpu"),)))
    bare = replace(bare, quality=None)
    cell = cell_of(rendered([bare]), bare)
    assert not cell.all("span", look="none")
    assert [term.text for term in cell.all("dt")] == ["answers"]
    died = replace(result, metrics={"load_s": 3.0}, outcome=Outcome.TIMEOUT, stage="cold")
    rows = {row.all("th")[0].text: row.text for row in details_of(rendered([died]), died).all("tr") if row.all("td")}
    assert "perplexity" not in rows
    assert "not measured: timed out during cold round" in rows["time to first token"]
    assert "not measured" not in rows["decode"]  # said once


def test_details_have_no_dashes_and_no_empty_rows_and_columns(golden: list[Result]) -> None:
    for details in rendered(golden).all("details", look="case"):
        for table in details.all("table", look="figures"):
            rows = [[cell.text for cell in row.all("td")] for row in table.all("tr") if row.all("td")]
            assert all(any(cells) for cells in rows), details.attrs
            assert all(any(column) for column in zip(*rows, strict=True)), details.attrs
            assert not any(cell in ("–", "-") for cells in rows for cell in cells), details.attrs


def test_phases_of_one_name_are_one_row(result: Result) -> None:
    phases = [
        Phase(name=name, start_s=at, end_s=at + took, ram_peak_bytes=peak)
        for name, at, took, peak in (("load", 0, 2, GIB), ("warm", 2, 1, GIB), ("warm", 3, 3, 2 * GIB), ("score", 6, 1, GIB))
    ]
    shown = replace(result, phases=phases)
    rows = [row.text for row in details_of(rendered([shown]), shown).all("table", look="figures")[1].all("tr")]
    assert rows == [
        "phase time peak RAM, resident",
        "loading 2.00 s 1.00 GiB",
        "warm round ×2 1.00 s to 3.00 s 2.00 GiB",
        "quality probe 1.00 s 1.00 GiB",
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_is_no_number_is_missing(result: Result, value: float) -> None:
    root = rendered([replace(result, metrics={"decode_tok_s": value, "ready_s": 1.0}, samples={"decode_tok_s": [value, 1.0]})])
    assert not root.all("data", data_key="decode_tok_s")


def test_zero_is_shown_as_a_figure(result: Result) -> None:
    shown = details_of(rendered([result]), result).all("data", data_key="kl")
    zero = replace(result, metrics=result.metrics | {"kl": 0.0})
    assert shown[0].text != "0"
    assert details_of(rendered([zero]), zero).all("data", data_key="kl")[0].text == "0"


def test_doubtful_figures_are_marked_in_words(result: Result) -> None:
    phases = [replace(phase, sampled=True) for phase in result.phases]
    doubtful = replace(result, noisy={"decode_tok_s": "the neighbors compile"}, phases=phases)
    root = rendered([doubtful])
    assert cell_of(root, doubtful).all("em")[0].text == "noisy"
    assert cell_of(root, doubtful).all("em")[0].attrs["title"] == "the neighbors compile"
    details = details_of(root, doubtful)
    assert "the neighbors compile" in details.text
    row = next(row for row in details.all("tr") if row.text.startswith("peak RAM "))
    assert "sampled" in row.text
    assert "loading (sampled)" in details.text


def test_disturbed_rounds_are_listed_by_their_number(result: Result) -> None:
    names = ("load", "cold", "warm", "warm", "score")
    whys = ("", "", "", "others used <b>0.9 of 2 cores", "4.00 GiB were swapped")
    windows = [Interference(phase=name, start_s=0, end_s=1, why=why) for name, why in zip(names, whys, strict=True)]
    shown = details_of(rendered([replace(result, interference=windows)]), result).text
    assert "warm round 2: others used <b>0.9 of 2 cores" in shown
    assert "quality probe: 4.00 GiB were swapped" in shown
    assert "warm round 1:" not in shown
    assert "Disturbed" not in details_of(rendered([result]), result).text


def test_prediction_stands_beside_measurement(result: Result) -> None:
    assert result.estimate
    row = next(row for row in details_of(rendered([result]), result).all("tr") if row.text.startswith("decode "))
    measured, predicted = row.all("data")
    assert float(measured.attrs["value"]) == result.metrics["decode_tok_s"]
    assert float(predicted.attrs["value"]) == result.estimate.decode_tok_s.best
    assert units.format_rate(result.estimate.decode_tok_s.low) in row.text


def test_a_case_that_was_too_big_shows_what_it_needs(golden: list[Result], root: Node) -> None:
    result = next(r for r in golden if r.case.id == f"{GPU_MODEL}/fp16/direct")
    assert result.estimate
    tier = result.estimate.tiers["gpu:0"]
    cell = cell_of(root, result)
    values = [int(figure.attrs["value"]) for figure in cell.all("data")]
    assert values == [needed.predicted_need(tier).best, tier.capacity_bytes]
    assert cell.all("rect", look="guess")
    assert cell.all("line", look="limit")


def test_a_surprise_is_counted_and_named(golden: list[Result], root: Node) -> None:
    refused = next(r for r in golden if r.case.id == f"{GPU_MODEL}/int8/ram-to-gpu")
    assert "plan too big" in cell_of(root, refused).text
    assert "Plan: too big (a false refusal)." in details_of(root, refused).text
    assert "The memory prediction was wrong 3 times: 2 false fits, 1 false refusal." in root.text


def test_what_was_found_wrong_after_loading_shows_in_the_cell(golden: list[Result], root: Node) -> None:
    result = next(r for r in reversed(golden) if r.case.id == f"{GPU_MODEL}/int4/auto")
    assert "checks 1 failed" in cell_of(root, result).text
    assert result.checks["precision"] in details_of(root, result).text


def test_the_details_hold_reason_code_command_answers_map_and_log(golden: list[Result], root: Node) -> None:
    died = next(r for r in golden if r.case.id == f"{GPU_MODEL}/bf16/direct")
    text = details_of(root, died).text
    for said in (died.why, died.command, died.environment["torch"], died.run, died.at, "during cold round"):
        assert said
        assert said in text
    assert died.log_tail.rstrip() in "".join(str(child) for child in details_of(root, died).all("pre")[-1].children)
    spilled = next(r for r in reversed(golden) if r.case.id == f"{GPU_MODEL}/fp16/disk")
    details = details_of(root, spilled)
    assert "transformer.layers.0-11 gpu:0" in details.text
    assert "transformer.layers.12-20 cpu" in details.text
    assert "transformer.layers.21-27 disk" in details.text
    assert len(details.all("svg", look="timeline")) == 1
    assert [item.attrs["class"] for item in details.all("ul", look="answers")[0].all("li")].count("right") == 9


def test_the_page_says_how_it_was_measured_and_what_was_set_aside(golden: list[Result]) -> None:
    root = rendered(golden, problems=["results.jsonl:17: the line is cut off"])
    for key in {key for one in golden for key in one.metrics}:
        assert " ".join(METRICS[key].how.split()) in root.text
    assert "Lines of the results file that were ignored: results.jsonl:17: the line is cut off" in root.text
    assert "3 runs" in root.text
    assert "set aside" not in rendered(golden).text


def test_the_machine_is_described_by_its_tiers_and_versions(golden: list[Result]) -> None:
    shown = [result for result in golden if result.machine.gpus]
    older = replace(shown[-1], case=replace(shown[-1].case, precision="fp8"), environment={"torch": "2.8.0"})
    root = rendered([older, *shown])
    table = root.all("table", look="tiers")[0]
    assert "gpu:0 NVIDIA GeForce RTX 3060 12.0 GiB 11.6 GiB 360 GB/s" in table.text
    assert [head.text for head in table.all("th", scope="col")] == ["tier", "total", "free at start", "speed"]
    assert "torch 2.9.1, 2.8.0" in root.all("dl", look="facts")[0].text


def test_the_title_is_the_case_of_a_single_block_unless_given(golden: list[Result], result: Result) -> None:
    assert rendered([result]).all("h1")[0].text == f"{GPU_MODEL} on {result.machine.name}"
    assert rendered(golden).all("h1")[0].text == "What fits where"
    assert rendered(golden, title="Our <lab>").all("title")[0].text == "Our <lab> · fitmatrix"


def test_a_page_without_results_says_how_to_get_some() -> None:
    assert "No results yet" in rendered([]).text


def test_the_page_names_no_other_file_or_host(golden: list[Result], root: Node) -> None:
    targets = [node.attrs[name] for node in root.below() for name in ("href", "src", "action", "style") if name in node.attrs]
    assert {target for target in targets if not target.startswith("#")} == {"data:,"}
    assert "url(" not in render.render(golden)
    policy = root.all("meta", http_equiv="Content-Security-Policy")[0].attrs["content"]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", render.render(golden), re.DOTALL)
        assert f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy


def test_headings_go_down_one_step_at_a_time_and_tables_have_heads(root: Node) -> None:
    levels = [int(node.tag[1]) for node in root.below() if node.tag in {"h1", "h2", "h3", "h4", "h5", "h6"}]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all("scope" in head.attrs for head in root.all("th"))
    assert root.all("html")[0].attrs["lang"] == "en"


def poisoned(value: object, poison: str) -> Any:
    """Append poison to every text of a decoded result, keys included."""
    if isinstance(value, str):
        return value + poison
    if isinstance(value, list):
        return [poisoned(item, poison) for item in value]
    if isinstance(value, dict):
        return {key: poisoned(item, poison) for key, item in value.items()}
    return value


def test_no_text_of_a_result_becomes_markup(golden: list[Result]) -> None:
    poison = "\"'></code><script>x</script><b onclick=x>\u202e\u2066\x00\x1b[2J\ud800"
    fixed = {"schema", "outcome", "verdict"}
    for result in selection.newest(golden):
        plain = msgspec.to_builtins(result)
        bad = {key: value if key in fixed else poisoned(value, poison) for key, value in plain.items()}
        for key in ("environment", "checks", "samples", "noisy", "metrics"):
            bad[key] = bad.get(key, {}) | {poison: 1.0 if key == "metrics" else [1.0] if key == "samples" else poison}
        bad["device_map"] = {poison: poison}
        html = render.render([msgspec.convert(bad, Result)], title=poison, problems=[poison])
        root = read(html)
        assert len(programs(root)) == 1
        assert not [node for node in root.below() if "onclick" in node.attrs]
        assert not set(html) & set("\u202e\u2066\x00\x1b\ud800")
        html.encode()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("naïve 中文 👩\u200d🚀\tx\n", "naïve 中文 👩\u200d🚀\tx\n"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("10%\r20%\r\n", "10%\n20%\n"),
        ("a\x00\x07\x7f", "a␀␇‹U+007F›"),
        ("\u202eevil\u2069", "‹U+202E›evil‹U+2069›"),
        ("\ud800", "‹U+D800›"),
    ],
)
def test_what_cannot_be_seen_is_spelled_out(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_a_page_is_written_whole_with_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "new/page.html"
    render.write(file, "<p>中文</p>")
    render.write(file, "<p>second</p>")
    assert file.read_text(encoding="utf-8") == "<p>second</p>"
    assert [entry.name for entry in file.parent.iterdir()] == ["page.html"]


def test_a_page_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    (tmp_path / "folder").mkdir()
    for file, reason in ((tmp_path / "taken/page.html", "Not a directory|File exists"), (tmp_path / "folder", "Is a directory")):
        with pytest.raises(StoreError, match=f"the page cannot be written: ({reason}). Give another file with --html"):
            render.write(file, "<p>")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "taken"]


def many(results: list[Result], cases: int) -> list[Result]:
    copies = range(cases // len(results) + 1)
    return [replace(r, case=replace(r.case, model=f"{r.case.model}-{i}")) for i in copies for r in results][:cases]


def unpacked(html: str) -> str:
    """Put packed details in their place, as the script of the page does."""

    def inflated(data: str) -> str:
        return zlib.decompress(base64.b64decode(data), -zlib.MAX_WBITS).decode()

    def whole(line: str) -> str:
        if not line.startswith("\1"):
            return line
        _, number, *slots = line.split("\1")
        return "".join(piece + slot for piece, slot in zip_longest(patterns[int(number, 16)].split("\1"), slots, fillvalue=""))

    (shared,) = re.findall(r'<script type="application/octet-stream" id="patterns">([^<]*)</script>', html)
    patterns = inflated(shared).split("\n")
    block = re.compile(r'<button[^>]*>[^<]*</button><script type="application/octet-stream">([^<]*)</script>')
    return block.sub(lambda match: "\n".join(map(whole, inflated(match[1]).split("\n"))), html)


def test_a_page_of_500_results_stays_below_2_megabytes(golden: list[Result]) -> None:
    size = len(render.render(many(golden, 500)).encode())
    assert size < 2_000_000
    assert size < render.most_bytes(500, 0)


def test_packed_details_are_those_of_a_small_page(golden: list[Result]) -> None:
    packed = render.render([*golden, *many(golden, 58)])
    assert packed.count("application/octet-stream") == 4 + 1  # and what they share
    assert "<h5>Loading code" not in packed
    small, large = (rendered(golden), read(unpacked(packed)))
    for result in selection.newest(golden):
        assert details_of(large, result) == details_of(small, result)


def test_a_small_page_is_not_packed(root: Node) -> None:
    assert not root.all("script", type="application/octet-stream")
    assert not root.all("noscript")


@pytest.mark.parametrize("length", [1, 2, 399, 400, 401, 5000])
def test_a_long_series_is_thinned_without_losing_its_peak(length: int) -> None:
    values = [i % 7 for i in range(length)]
    values[length // 3] = 1000
    kept = charts.decimate(range(length), values, 400)
    assert len(kept) == min(length, 400)
    assert max(value for _, value in kept) == 1000
    assert (kept[0][0], kept[-1][0]) == (0, length - 1)
    assert kept == sorted(kept)


def test_the_timeline_names_phases_peaks_and_axes() -> None:
    phases = [
        Phase(name="load", start_s=0.0, end_s=4.0, ram_peak_bytes=3 << 30),
        *(Phase(name="warm", start_s=4.0 + i, end_s=5.0 + i) for i in range(3)),
    ]
    samples = Timeline(t_s=[0.0, 3.5, 7.0], ram_bytes=[1 << 30, 2 << 30, 2 << 30], vram_bytes={"gpu:0": [0, 1 << 30, 1 << 30]})
    drawn = read(charts.timeline(samples, phases) or "")
    assert drawn.all("title")[0].text == "Memory over 7.00 s: RAM up to 2.00 GiB, gpu:0 up to 1.00 GiB"
    assert [text.text for text in drawn.all("text", look="phase")] == ["loading", "warm round ×3"]
    assert [text.text for text in drawn.all("text", look="size")] == ["0", "1 GiB", "2 GiB", "3 GiB"]
    assert [text.text for text in drawn.all("text", look="time")] == ["0 s", *(f"{i} s" for i in range(1, 8))]
    assert len(drawn.all("path", look="peak")) == 1
    assert not drawn.all("path", look="anon")


def test_nothing_recorded_draws_nothing() -> None:
    assert charts.timeline(None, []) is None
    assert charts.timeline(Timeline(), []) is None
    assert charts.timeline(Timeline(t_s=[1.0], ram_bytes=[0]), []) is not None


def test_what_nobody_measures_draws_nothing() -> None:
    phase = Phase(name="load", start_s=0.0, end_s=1.0)
    assert charts.timeline(Timeline(t_s=[], ram_bytes=[1]), []) is None
    assert "not sampled" in (charts.timeline(Timeline(t_s=[0.0], ram_bytes=[1, 2]), [phase]) or "")
    assert charts.timeline(None, [replace(phase, start_s=-1e308, end_s=1e308)]) is None
    assert charts.timeline(None, [replace(phase, end_s=1e308)]) is None
    assert charts.timeline(None, [replace(phase, start_s=1e308, end_s=1e308)]) is None
    assert charts.timeline(Timeline(t_s=[0.0], ram_bytes=[10**400]), []) is None


def test_consecutive_blocks_of_one_tier_become_one_group() -> None:
    device_map = {"model.embed": "gpu:0", **{f"model2.layers.{i}": "gpu:0" if i < 9 else "cpu" for i in range(12)}, "head": "disk"}
    found = [(group.modules, group.count, group.tier, group.look) for group in charts.groups(device_map)]
    assert found == [
        ("model.embed", 1, "gpu:0", "gpu"),
        ("model2.layers.0-8", 9, "gpu:0", "gpu"),
        ("model2.layers.9-11", 3, "cpu", "cpu"),
        ("head", 1, "disk", "disk"),
    ]
    assert [group.modules for group in charts.groups({"": "cpu"})] == ["the whole model"]


def test_a_bar_never_leaves_its_frame() -> None:
    drawn = read(charts.bar(15, 10, firm=20))
    assert [rect.attrs["width"] for rect in drawn.all("rect")] == ["100%", "100%"]
    (tick,) = drawn.all("line", look="limit")
    assert tick.attrs["x1"] == tick.attrs["x2"] == "66.7%"
    assert not read(charts.bar(5, 10)).all("line")


def test_a_bar_tells_what_must_fit_from_what_may_be_dropped() -> None:
    widths = {rect.attrs["class"]: rect.attrs["width"] for rect in read(charts.bar(6, 10, firm=4)).all("rect")}
    assert widths == {"track": "100%", "all": "60%", "firm": "40%"}


def test_unknown_tables_do_not_break_an_old_result(result: Result) -> None:
    odd = variant(result, "fp2", "tape", metrics=result.metrics | {"warp_factor": 9.5})
    root = rendered([odd])
    assert "tape" not in PLACEMENTS
    assert "warp_factor 9.50" in details_of(root, odd).text
