"""The table of Chinese: nothing that the page says is missing from it, and nothing in it is left from what the page once said."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
from msgspec.structs import replace

from harness.catalog.resolve import CATALOG
from harness.checkpoint.adapter import MOVED, ON_OTHERS, REFUSES
from harness.cli.entry import main
from harness.core.methods.table import FOREIGN, METHODS, OWN, foreign
from harness.core.metrics import METRICS, PHASES
from harness.core.placements import PLACEMENTS
from harness.core.precisions import PRECISIONS
from harness.data import DATA
from harness.machine import accelerators
from harness.measure.outcome import Evidence, classify
from harness.measure.protocol import Failed
from harness.planning.loading.seconds import READY
from harness.report.page.figures import PLANNED, STATUSES
from harness.report.page.language import CHINESE, block, table
from harness.report.page.tradeoff import SHAPES
from harness.results.audit import CHECKED
from tests.support import builders
from tests.support.spoken_chinese import Phrases

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
TEMPLATES = ROOT / "harness" / "report" / "templates"
PAGE = ("page.html.j2", "parts.html.j2", "overview.html.j2")
# Same in both languages.
NAMES = {"fitmatrix", "CPU", "GiB", "tokens/s", "EN", "bfloat16", "Ctrl", "· fitmatrix", "GiB, tokens/s"}
SLOT = re.compile(r"\{(\w+)\}")
SAID = table(CHINESE)
SITE = ("site_parts", "site_lists", "site_more", "site_index", "site_model", "site_card", "site_machine", "site_provenance")
# Without what only results of earlier versions say.
NOW = tomllib.loads((DATA / "zh.toml").read_text(encoding="utf-8").partition("\n# Reasons as results of earlier versions")[0])


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


PAGE_SAYS = Phrases(SAID)
# The texts between the slots, with and without the plural's s.
PIECES = {flat(piece) for key in SAID for form in ("", "s") for piece in SLOT.split(key.replace("(s)", form))[::2]}


def is_said(text: str) -> bool:
    return text in NAMES or PAGE_SAYS.phrase(text) is not None


def fragments(source: str) -> Iterator[str]:
    """Take the texts of a template that a reader sees or hears, as they stand between tags, attributes and expressions."""
    source = re.sub(r"\{#.*?#\}|<(style|script|symbol|code|noscript)\b.*?</\1>", "\0", source, flags=re.S)
    quoted = re.findall(r"\{[{%](.*?)[%}]\}", source, flags=re.S)
    yield from chain.from_iterable(re.findall(r"\boption\('\w*', '([^']+)'\)", expression) for expression in quoted)
    plain = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "\0", source, flags=re.S)
    attributes = re.findall(r'(?:aria-label|title|placeholder)="([^"]*)"', plain)
    texts = re.sub(r"<[^>]*>", "\0", re.sub(r"<(\w+)[^>]*translate=.no.[^>]*>[^<]*</\1>", "\0", plain))
    for text in (*attributes, texts):
        yield from (found for part in text.split("\0") if re.search("[A-Za-z]", found := flat(part)))


def in_words(text: str) -> str:
    """Take from a fragment what stands before and behind the words: the points and brackets around slots."""
    return re.sub(r"^[^A-Za-z]+|[^A-Za-z]+$", "", text)


@pytest.mark.parametrize("name", PAGE)
def test_every_text_of_a_template_is_in_the_table(name: str) -> None:
    words = "\n".join(map(in_words, SAID)) + "\n" + "\n".join(map(in_words, PIECES)) + "\n".join(NAMES)
    found = set(map(in_words, fragments((TEMPLATES / name).read_text(encoding="utf-8"))))
    assert found
    assert [text for text in sorted(found) if text not in words] == []


def test_every_text_of_a_case_is_in_the_table() -> None:
    words = "\n".join(map(in_words, SAID)) + "\n" + "\n".join(map(in_words, PIECES))
    tree = ast.parse((ROOT / "harness/report/page/cases.py").read_text(encoding="utf-8"))
    inside = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node) if part is not node}
    written = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) and node not in inside]
    found = {text for node in written for text in map(in_words, fragments(plain(node)))}
    assert len(found) >= 30
    assert [text for text in sorted(found) if text not in words] == []


def plain(written: ast.JoinedStr) -> str:
    """Return what is between the values of an f-string, as a template has it."""
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "{{ }}" for part in written.values)


@pytest.mark.parametrize("name", SITE)
def test_every_text_of_a_site_is_in_its_table(name: str) -> None:
    keys = [form for key in table(CHINESE, "site") for form in (key.replace("(s)", ""), key.replace("(s)", "s"))]
    words = "\n".join(in_words(flat(piece)) for key in keys for piece in (key, *SLOT.split(key)[::2]))
    found = set(map(in_words, fragments((TEMPLATES / f"{name}.html.j2").read_text(encoding="utf-8"))))
    assert found
    assert [text for text in sorted(found) if text not in words and text not in NAMES] == []


def test_every_text_of_the_planner_is_in_its_tables() -> None:
    said = table(CHINESE, "site", "planner")
    words = "\n".join(in_words(flat(piece)) for key in said for piece in (key, *SLOT.split(key.replace("(s)", ""))[::2]))
    found = set(map(in_words, fragments((TEMPLATES / "planner.html.j2").read_text(encoding="utf-8"))))
    assert len(found) > 8
    assert [text for text in sorted(found) if text not in words] == []
    script = re.search(r"const SAY = \{(.*?)\n  \};", (TEMPLATES / "planner.js").read_text(encoding="utf-8"), flags=re.S)
    assert script
    texts = re.findall(r'^ +\w+: "(.*)",$', script[1], flags=re.M)
    assert len(texts) > 30
    assert [text for text in texts if text not in said and text not in NAMES] == []
    assert READY in texts  # as the terminal says it
    own = tomllib.loads((DATA / "zh_planner.toml").read_text(encoding="utf-8"))
    shown = flat(" ".join((TEMPLATES / f"planner.{form}").read_text(encoding="utf-8") for form in ("js", "html.j2")))
    pieces = [piece.strip() for key in own for piece in SLOT.split(key.replace("(s)", ""))[::2]]
    assert [piece for piece in pieces if re.search("[A-Za-z]", piece) and piece.strip(" ,") not in shown] == []


def test_every_rule_of_a_site_is_in_its_table() -> None:
    assert [rule for rule in CHECKED if rule not in table(CHINESE, "site")] == []


def test_every_text_of_a_site_s_script_is_in_its_table() -> None:
    said = re.search(r"const SAY = \{(.*?)\n  \};", (TEMPLATES / "site.js").read_text(encoding="utf-8"), flags=re.S)
    assert said
    texts = re.findall(r'^ +\w+: "(.*)",$', said[1], flags=re.M)
    assert len(texts) > 4
    assert [text for text in texts if text not in table(CHINESE, "site")] == []


def test_every_text_of_the_script_is_in_the_table() -> None:
    said = re.search(r"const SAY = \{(.*?)\n  \};", (TEMPLATES / "page.js").read_text(encoding="utf-8"), flags=re.S)
    assert said
    texts = re.findall(r'^ +\w+: "(.*)",$', said[1], flags=re.M)
    assert len(texts) > 8
    assert [text for text in texts if re.search("[a-z]", SLOT.sub("", text)) and text not in SAID] == []


@pytest.mark.parametrize(
    "texts",
    [
        [status.word for status in STATUSES],
        [*PLANNED.values(), *SHAPES],
        [metric.label for metric in METRICS.values()],
        [*PHASES.values()],
        [metric.how for metric in METRICS.values()],
        [precision.title for precision in PRECISIONS.values()],
        [placement.title for placement in PLACEMENTS.values()],
        [flat(entry.history) for entry in CATALOG.values() if entry.history],
        [why for row in PRECISIONS.values() for why in (*row.incompatible.values(), row.unsupported) if why],
        [
            why
            for row in (*METHODS.values(), *OWN.values())
            for why in (*row.refuses.values(), *row.cpu_lacks.values(), row.whole_blocks, row.unsupported)
            if why
        ],
        [why for name in (*FOREIGN, "bitsandbytes", "another", "") if (why := foreign(name))],
        [*REFUSES.values(), ON_OTHERS, MOVED],
    ],
    ids=[
        "outcomes",
        "plans",
        "figures",
        "phases",
        "how",
        "precisions",
        "placements",
        "history",
        "refused",
        "refused as stored",
        "foreign",
        "adapters",
    ],
)
def test_every_word_of_our_tables_is_in_the_table(texts: list[str]) -> None:
    assert [text for text in texts if not is_said(text)] == []


# What speaks on a page of cards and of models that are refused: reasons of cases, disturbances, doubts. Of a module all of it, or
# what is called so in it.
SPEAKERS = {
    "architecture/stored/packed_check.py": {"with_blocks", "with_experts"},
    "checkpoint/quantization.py": {"refusal", "_no_layers"},
    "core/methods/compressed.py": {"settings_refusal", "_ANOTHER", "_unloadable"},
    "core/methods/cpu_kernels.py": {"fault", "_refusal", "_said", "_AWAY"},
    "core/methods/table.py": {"foreign"},
    "core/methods/torchao.py": {"UNDIVIDED"},
    "machine/accelerators.py": {"PROBLEMS", "hidden", "title"},
    "measure/interference.py": {"power_capped", "_gpu_others", "_gpu_clock", "_gpu_throttles"},
    "measure/outcome.py": {"TABLE", "_BREACHES", "_SIGNALS", "_last_words"},
    "planning/choice/nearest.py": {"faster_way", "_stored_otherwise", "_unpacked", "_elsewhere", "_named"},
    "planning/feasibility.py": {"gate", "decide", "_beyond", "_too_old"},
    "planning/verdict.py": {"verdict", "_unmapped", "_passed_by", "_unpackable", "_unfusable", "context_refusal"},
    "planning/cost/tensor_parallel.py": {"refusal"},
    "worker/auto_class.py": {"NOUNS", "_sentence"},
    "run/case_result.py": {"_process_vram", "noise"},
    "results/needed.py": {"need_of"},
}
# All that the page quotes: others' words, and names.
QUOTED = {"Fatal Python error", "phase timeout", "Intel GPUs, SYCL", "ROCm's HIP", "gpu SIZE", "ram SIZE"}


def sentences(module: str, owners: set[str]) -> Iterator[str]:
    """Yield the texts of two words and more in what is called so, between the values that are put into them."""
    tree = ast.parse((ROOT / "harness" / module).read_text(encoding="utf-8"))
    for owner in (node for node in ast.walk(tree) if name_of(node) in owners):
        documented = ast.get_docstring(owner, clean=False) if isinstance(owner, ast.FunctionDef) else None
        for node in ast.walk(owner):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value != documented:
                yield from (text for piece in SLOT.split(node.value) if len((text := in_words(flat(piece))).split()) > 1)


def name_of(node: ast.AST) -> str | None:
    if isinstance(node, ast.AnnAssign):
        return node.target.id if isinstance(node.target, ast.Name) else None
    return node.name if isinstance(node, ast.FunctionDef) else None


@pytest.mark.parametrize("module", SPEAKERS)
def test_every_sentence_about_a_card_or_a_refusal_has_its_chinese(module: str) -> None:
    known = "\n".join(flat(form) for key in SAID for form in (key.replace("(s)", ""), key.replace("(s)", "s")))
    found = set(sentences(module, SPEAKERS[module]))
    assert found, f"nothing in {module} is called {SPEAKERS[module]}"
    assert sorted(text for text in found - QUOTED if text not in known) == []


# Small, large, a mixture, packed, coded natively; on a processor, on cards that hold all, some and next to nothing.
PLANNED_MODELS = (
    "chatglm-6b",
    "gpt2",
    "openai/gpt-oss-20b",
    "qwen3-30b-a3b",
    "meta-llama/Llama-3.3-70B-Instruct",
    "codegen-16b-mono",
)
PLANNED_FOR = (
    "--ram 8GiB",
    "--ram 256GiB",
    "--gpu 2GiB --ram 16GiB",
    "--gpu 8GiB --ram 64GiB",
    "--gpu 24GiB --ram 64GiB",
    "--gpu 80GiB --gpu 80GiB --ram 256GiB",
)


@pytest.mark.parametrize("machine", PLANNED_FOR)
@pytest.mark.parametrize("model", PLANNED_MODELS)
def test_every_sentence_of_a_plan_is_said_in_chinese(model: str, machine: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Notes, reasons and what comes nearest, as the planner's page gets them: whoever writes a new one need not be listed here."""
    main(["plan", model, *machine.split(), "--json"])
    plan = json.loads(capsys.readouterr().out)
    said = [*plan["model"].get("notes", ()), plan["model"]["history"], plan.get("nearest"), *plan["machine"].get("assumed", ())]
    said += [one["why"] for one in plan["plans"]]
    planner = Phrases(table(CHINESE, "site", "planner"))
    assert any(said)
    assert [text for text in said if text and planner.phrase(flat(text)) is None] == []


def test_a_slot_takes_what_the_page_lets_it_take() -> None:
    """A table of patterns that match anything would call every sentence known."""
    known = Phrases(
        {"ready in {n}": "{n} 就绪", "ready": "就绪", "{word}: {n}": "{word}：{n}", "{name} ends": "{name} 结束", "yes": "是"}
    )
    assert known.phrase("ready in 3.00 s") == "3.00 s 就绪"
    assert known.phrase("ready: 12") == "就绪：12"
    assert known.phrase("yes; gpu:0 ends, ready") == "是；gpu:0 结束，就绪"
    assert [known.phrase(text) for text in ("ready in a moment", "late: 12", "ready: late", "yes, no")] == [None] * 4


ENDS = [
    Evidence(phase="load", ended_by="protocol"),
    Evidence(phase="load", exit_code=3, log_tail="no way"),
    Evidence(phase="load", exit_code=0),
    Evidence(phase="load", ended_by="fork server"),
    *(Evidence(phase="load", exit_code=-number, log_tail=said) for number in (4, 6, 7, 8, 9, 11, 15) for said in ("", "no way")),
    *(
        Evidence(phase="load", failed=Failed(phase="load", types=(name,), message="no", traceback=""))
        for name in ("ValueError", "ModelFault")
    ),
    Evidence(
        phase="score", rank=1, failed=Failed(phase="score", types=("OSError",), message="No space left on device", traceback="")
    ),
]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: classify(end)[1][:60])
def test_how_a_case_ended_is_said_in_chinese(end: Evidence) -> None:
    """The sentence, and what of ours is put into it."""
    why = classify(end)[1]
    assert is_said(why)
    inside = re.fullmatch(r"the process died during \w+: (.*)", why)
    assert inside is None or is_said(inside[1])


MACHINE = builders.machine(builders.gpu())
BUILDS = [
    accelerators.TorchBuild(version="2.13.0+cpu"),
    accelerators.TorchBuild(version="2.13.0+rocm6.4", hip="6.4"),
    accelerators.TorchBuild(version="2.13.0+xpu", xpu="2025.2"),
    accelerators.TorchBuild(version="2.13.0", cuda="13.0"),
]
CARD = accelerators.TorchDevice(name="RTX 3060", architecture="sm_86")
LOOKS = [
    None,
    accelerators.Seen(error="CUDA driver initialization failed"),
    accelerators.Seen(),
    accelerators.Seen(kind="cuda", cards=(CARD, CARD)),
    accelerators.Seen(kind="cuda", cards=(CARD,), architectures=("sm_100",)),
]


def test_why_torch_cannot_use_a_card_is_said_in_chinese() -> None:
    """Whole sentences, as they are put together: each row of PROBLEMS, and each maker whose GPU is hidden."""
    old = replace(MACHINE, driver="470.1")
    said = {accelerators.problem(machine, build, look) for machine in (MACHINE, old) for build in BUILDS for look in LOOKS}
    none = builders.machine()
    kinds = ("hip", "mps", "xpu", "cuda")
    said |= {accelerators.hidden(none, accelerators.Seen(kind=kind, cards=cards)) for kind in kinds for cards in ((CARD,), ())}
    assert len(said - {None}) >= len(accelerators.PROBLEMS) + 2 * len(kinds) - 1
    assert [text for text in said if text and not is_said(text)] == []


def test_every_text_of_the_table_is_said_somewhere() -> None:
    files = [*(ROOT / "harness").rglob("*.py"), ROOT / "harness" / "data" / "catalog.toml"]
    files += [TEMPLATES / "page.js", *(TEMPLATES / name for name in PAGE)]
    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    code = re.sub(r'"\s*\n\s*f?"|\\\n', "", code).replace("\\N{NO-BREAK SPACE}", " ")
    spoken = flat(code) + flat(re.sub(r"<[^>]*>", " ", code)) + flat(re.sub(r"<[^>]*>", "", code))
    unused = [
        (key, piece)
        for key in NOW
        for part in SLOT.split(key)[::2]
        for piece in map(in_words, re.split(r"\(s\)|[,;:.] |[()]", part))
        if piece not in spoken and piece.removeprefix("placement ") not in spoken
    ]
    assert len(NOW) < len(SAID)
    assert unused == []


@pytest.mark.parametrize("key", [key for key in SAID if "{" in key or "{" in SAID[key]])
def test_a_translation_has_the_slots_of_its_text(key: str) -> None:
    assert sorted(SLOT.findall(SAID[key])) == sorted(SLOT.findall(key))


def test_chinese_has_its_own_points() -> None:
    assert [said for said in SAID.values() if re.search(r"[\u4e00-\u9fff][,;:.?!]|[,;:?!] ?[\u4e00-\u9fff]", said)] == []


def test_nothing_in_the_table_ends_its_block() -> None:
    assert "<" not in block(CHINESE)
