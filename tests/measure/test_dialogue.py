"""Models with a dialogue of their own are asked in it, and one with tools must use them: on a tiny MOSS that learns its part."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import harness.models
from harness.core.placements import PLACEMENTS
from harness.core.precisions import PRECISIONS
from harness.core.records import Answer, Case, Plan, Result, Verdict
from harness.measure import dialogue, quality
from harness.measure.dialogue import DIALOGUES, Written
from harness.measure.protocol import Load, Score, ScoreDone
from harness.planning.code import loading_code
from harness.run import worker_process
from harness.run.case_result import CaseModel, RunContext
from harness.run.runner import Run
from harness.worker import model as work
from harness.worker import quality_probe
from tests.support import builders, moss_files
from tests.support.moss_files import ANSWER, CALL, ENDS, PLUGIN

assert PLUGIN.tool is not None
TOOL = PLUGIN.tool
NAME = "moss-moon-003-sft-plugin"
THOUGHT = "<|Inner Thoughts|>: I look it up.<eot>\n<|Commands|>: "


# The table


@pytest.mark.parametrize(
    ("model", "tokens", "name"),
    [
        ("moss-moon-003-sft-plugin", ENDS, "moss-plugin"),
        ("fnlp/moss-moon-003-sft-plugin-int4", ENDS, "moss-plugin"),
        ("fnlp/MOSS-moon-003-sft-int8", ENDS, "moss"),
        ("moss-moon-003-sft", ENDS, "moss"),
        ("moss-moon-003-base", ENDS, None),
        ("moss-moon-003-sft-plugin", ("<eom>",), None),
        ("any directory", ("<|endoftext|>", "<|padding|>", "<|SYSTEM|>", "<|USER|>", "<|ASSISTANT|>"), "stablelm-tuned"),
        ("stablelm-base-alpha-7b", ("<|endoftext|>",), None),
        ("chatglm-6b", ("[gMASK]", "<sop>"), "chatglm"),
        ("codegen-16b-mono", ("<|endoftext|>",), None),
        ("", (), None),
    ],
)
def test_name_and_vocabulary_choose_the_dialogue(model: str, tokens: tuple[str, ...], name: str | None) -> None:
    found = dialogue.choose(model, tokens)
    assert (found.name if found else None) == name


@pytest.mark.parametrize("asked", DIALOGUES, ids=lambda one: one.name)
def test_every_dialogue_holds_the_question_and_not_its_answer(asked: dialogue.Dialogue) -> None:
    for question in quality.PROBE.questions:
        prompt = asked.ask(question)
        assert prompt.count(question.prompt) == 1
        assert not quality.is_correct(question, prompt.replace(question.prompt, ""))
        assert "{" not in prompt
    assert set(asked.tokens).issuperset(asked.ends)
    assert set(asked.tokens).issuperset(asked.tool.ends if asked.tool else ())


def test_stablelm_hears_three_parts_and_chatglm_the_question_alone() -> None:
    question = quality.PROBE.questions[0]
    by_name = {one.name: one for one in DIALOGUES}
    stablelm = by_name["stablelm-tuned"].ask(question)
    assert stablelm.startswith("<|SYSTEM|>")
    assert stablelm.endswith(f"<|USER|>{question.prompt}<|ASSISTANT|>")
    assert by_name["chatglm"].ask(question) == question.prompt


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("chatglm", "[Round 0]\n问：a?\n答：b.\n[Round 1]\n问：c?\n答：d.\n[Round 2]\n问：e?\n答："),
        ("chatglm2", "[Round 1]\n\n问：a?\n\n答：b.\n\n[Round 2]\n\n问：c?\n\n答：d.\n\n[Round 3]\n\n问：e?\n\n答："),
        ("chatglm3", "<|user|>\n a?<|assistant|>\n b.<|user|>\n c?<|assistant|>\n d.<|user|>\n e?<|assistant|>"),
        ("stablelm-tuned", "<|USER|>a?<|ASSISTANT|>b.<|USER|>c?<|ASSISTANT|>d.<|USER|>e?<|ASSISTANT|>"),
        ("moss", "<|Human|>: a?<eoh>\n<|MOSS|>: b.<eom>\n<|Human|>: c?<eoh>\n<|MOSS|>: d.<eom>\n<|Human|>: e?<eoh>\n<|MOSS|>:"),
    ],
)
def test_a_conversation_is_written_as_the_model_was_taught(name: str, whole: str) -> None:
    asked = next(one for one in DIALOGUES if one.name == name)
    assert asked.format_prompt("a?", "b.", "c?", "d.", "e?").endswith(whole)


def test_each_turn_of_moss_with_plugins_has_all_its_parts() -> None:
    whole = PLUGIN.format_prompt("a?", "b.", "c?")
    assert whole.startswith(f"{PLUGIN.format_prompt('a?')} b.<eom>\n<|Human|>: c?<eoh>\n<|Inner Thoughts|>: None<eot>\n")
    assert whole.endswith(PLUGIN.format_prompt("c?")[PLUGIN.format_prompt("c?").index("<|Human|>") :])


def test_the_parts_of_moss_stand_in_the_documented_order() -> None:
    parts = ["<|Human|>: ", "<eoh>\n<|Inner Thoughts|>: ", "<eot>\n<|Commands|>: ", "<eoc>\n<|Results|>:", "<eor>\n<|MOSS|>:"]
    plain = PLUGIN.ask(quality.PROBE.questions[0])
    whole = dialogue.second_prompt(PLUGIN, TOOL, CALL)
    for prompt in (plain, whole):
        places = [prompt.index(part) for part in parts]
        assert places == sorted(places)
        assert prompt.endswith(parts[-1])
    switches = ["Web search", "Calculator", "Equation solver", "Text-to-image", "Image edition", "Text-to-speech"]
    assert [line.split(":")[0] for line in plain.splitlines() if line.endswith(": disabled.")] == [
        "- Inner thoughts",
        *(f"- {name}" for name in switches),
    ]
    first = dialogue.first_prompt(PLUGIN, TOOL)
    assert "- Web search: enabled. API: Search(query)\n" in first
    assert first.endswith(f"<|Human|>: {TOOL.question.prompt}<eoh>\n")
    assert whole.startswith(first + CALL.text + "<eoc>\n<|Results|>:\nSearch(")


def test_only_the_results_hold_the_answer() -> None:
    assert not quality.is_correct(TOOL.question, dialogue.first_prompt(PLUGIN, TOOL))
    assert all(answer in dialogue.second_prompt(PLUGIN, TOOL, CALL) for answer in TOOL.question.accept)


def test_every_command_of_a_call_gets_results() -> None:
    two = Written(f'{THOUGHT}Search("cup"), Search("Tollmere 1987")', "<eoc>")
    assert dialogue.fault_of_call(TOOL, two) == ""
    prompt = dialogue.second_prompt(PLUGIN, TOOL, two)
    assert prompt.count('\nSearch("cup") =>\n') == prompt.count('\nSearch("Tollmere 1987") =>\n') == 1


# What can be wrong


@pytest.mark.parametrize(
    ("called", "said"),
    [
        (CALL, ""),
        (Written(CALL.text, None), "it does not stop at <eoc> within 96 tokens"),
        (Written(CALL.text, "<eom>"), "it stops at <eom> instead of <eoc>"),
        (Written("None", "<eoc>"), "it writes 'None' instead of <|Inner Thoughts|>: ...<eot> <|Commands|>: ...<eoc>"),
        (Written("", "<eoc>"), "it writes '' instead of <|Inner Thoughts|>"),
        (Written(f"{THOUGHT}None", "<eoc>"), "its command 'None' is not of the form Search(\"...\")"),
        (Written(f'{THOUGHT}Solve("x = 1")', "<eoc>"), "its command 'Solve(\"x = 1\")' is not"),
        (Written(f"{THOUGHT}Search(cup)", "<eoc>"), "its command 'Search(cup)' is not"),
        (Written(f'{THOUGHT}Search("a"), Find("b")', "<eoc>"), 'its command \'Search("a"), Find("b")\' is not'),
    ],
)
def test_a_wrong_call_is_told_in_a_sentence(called: Written, said: str) -> None:
    fault = dialogue.fault_of_call(TOOL, called)
    assert fault.startswith(said)
    assert bool(fault) == bool(said)
    assert dialogue.mark(TOOL, called, None if said else ANSWER).correct is not bool(said)


@pytest.mark.parametrize(
    ("answered", "said"),
    [
        (ANSWER, ""),
        (Written("Valborg<sup><|1|></sup>", "<eom>"), ""),
        (Written(ANSWER.text, "<eoh>"), "given the results, it stops at <eoh> instead of <eom>"),
        (Written("so " * 64, None), "given the results, it does not stop at <eom> within 64 tokens"),
        (Written("", "<eom>"), "given the results, it writes '' instead of an answer and <eom>"),
        (Written("I do not\nknow.", "<eom>"), "given the results, it answers 'I do not know.', which does not use them"),
        (Written("It was not Valborg.", "<eom>"), "given the results, it answers"),
    ],
)
def test_a_wrong_answer_is_told_in_a_sentence(answered: Written, said: str) -> None:
    marked = dialogue.mark(TOOL, CALL, answered)
    assert marked.correct is not bool(said)
    assert marked.wrong.startswith(f"asked with web search: {said}" if said else "")
    assert marked.question == "Who won the chess cup of Tollmere in 1987? (asked with web search)"


# The verdict


def scored(*answers: Answer, name: str = "moss-plugin") -> ScoreDone:
    return ScoreDone(nll=100.0, positions=100, finite=True, agree=100, kl=0.0, answers=list(answers), phases=[], dialogue=name)


def test_the_verdict_counts_the_question_and_says_what_was_wrong() -> None:
    good, bad = dialogue.mark(TOOL, CALL, ANSWER), dialogue.mark(TOOL, Written("None", "<eom>"), None)
    reference = quality.Reference(case="m/fp16/cpu", perplexity=2.718281828, answers=[good], dialogue="moss-plugin")
    found = quality.judge(scored(bad), real_weights=True, reference=reference)
    assert found.why.endswith("1 answer lost; asked with web search: it stops at <eom> instead of <eoc>")
    assert quality.metrics_of(scored(good))["answers_correct"] == 1
    alone = quality.judge(scored(bad), real_weights=True, is_reference=True)
    assert "0 of 1 answers correct; asked with web search: it stops" in alone.why
    assert "asked" not in quality.judge(scored(bad), real_weights=False).why


def test_answers_to_what_was_asked_otherwise_are_not_compared() -> None:
    good, bad = (Answer(question="?", answer="", correct=correct) for correct in (True, False))
    judged = quality.judge(scored(good), real_weights=True, is_reference=True)
    assert judged.probe == f"{quality.PROBE.version}+moss-plugin"
    kept = builders.result(metrics={"perplexity": 2.718281828}, quality=judged)
    reference = quality.reference_of(kept)
    assert reference is not None
    assert reference.dialogue == "moss-plugin"
    assert "1 answer lost" in quality.judge(scored(bad), real_weights=True, reference=reference).why
    assert "lost" not in quality.judge(scored(bad, name=""), real_weights=True, reference=reference).why
    other = Answer(question="!", answer="", correct=False)
    assert "no answer lost" in quality.judge(scored(other), real_weights=True, reference=reference).why


# A model that says it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / NAME
    folder.mkdir()
    moss_files.teach(folder)
    return folder


def loading() -> str:
    return "import harness.models\n" + loading_code(PRECISIONS["fp32"], PLACEMENTS["cpu"], "float32")


def ask(folder: Path, name: str = NAME) -> tuple[dict[str, Any], Answer]:
    request = Load(model=str(folder), code=loading())
    loaded, _ = work.load(request, lambda _: contextlib.nullcontext())
    done = quality_probe.score(loaded, Score(model=name))
    return done, done["answers"][-1]


def test_the_published_tokenizer_is_ours_and_runs_no_code_of_its_own(folder: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer) is harness.models.MossTokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer("and<eoh>\n")["input_ids"])[-2] == "<eoh>"
    assert tokenizer.eos_token == "<eom>"
    text = "两步 two steps<eoc>\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_model_that_uses_its_tool_answers_right(folder: Path) -> None:
    done, last = ask(folder)
    assert (done["dialogue"], len(done["answers"])) == ("moss-plugin", 11)
    assert (last.correct, last.wrong) == (True, "")
    assert last.answer == f"{CALL.text}<eoc>\n{ANSWER.text.strip()}<eom>"


def test_a_model_that_is_too_slow_for_two_calls_is_not_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_probe, "_CALL_S", 0.0)
    done, _ = ask(folder)
    assert (done["dialogue"], len(done["answers"])) == ("moss-plugin", 10)


def test_the_same_model_by_another_name_is_asked_without_tools(folder: Path) -> None:
    done, _ = ask(folder, "moss-moon-003-sft")
    assert (done["dialogue"], len(done["answers"])) == ("moss", 10)
    done, _ = ask(folder, "moss-moon-003-base")
    assert (done["dialogue"], len(done["answers"])) == ("", 10)


@pytest.mark.parametrize(
    ("call", "answer", "said"),
    [
        (CALL, Written(" Nobody knows.", "<eom>"), "given the results, it answers 'Nobody knows.', which does not use them"),
        (CALL, Written(ANSWER.text, "<eor>"), "given the results, it stops at <eor> instead of <eom>"),
        (Written(f"{THOUGHT}None", "<eoc>"), ANSWER, "its command 'None' is not of the form"),
        (Written("<|MOSS|>: Henrike Valborg.", "<eom>"), ANSWER, "it stops at <eom> instead of <eoc>"),
    ],
    ids=["unused", "wrong-end", "no-command", "no-call"],
)
def test_a_model_that_does_not_is_found_out(tmp_path: Path, call: Written, answer: Written, said: str) -> None:
    moss_files.teach(tmp_path, call, answer)
    _, last = ask(tmp_path)
    assert not last.correct
    assert last.wrong.startswith(f"asked with web search: {said}")


def run(folder: Path, scratch: Path, **changes: Any) -> Result:
    """Judge the model in a worker of its own, as cases/test_quality.py does."""
    setting = RunContext(
        run="a run",
        machine=builders.machine(),
        environment={},
        scratch=scratch,
        worker_main=worker_process.torch_worker,
        timeout_s=100.0,
    )
    plan = Plan(case=Case(model=folder.name, precision="fp32", placement="cpu"), verdict=Verdict.UNKNOWN, code=loading())
    judged = Run(plan, CaseModel(location=folder, native=True, keep_file=scratch / "kept.npy", **changes), setting)
    judged.score()
    return judged.finish()


def test_the_result_of_a_case_tells_it(folder: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path)
    assert result.quality is not None
    assert result.quality.probe == f"{quality.PROBE.version}+moss-plugin"
    assert result.quality.answers[-1].correct
    assert result.metrics["answers_correct"] >= 1


@pytest.mark.parametrize("changes", [{"weights": "synthetic"}, {"tokenizer": False}], ids=["synthetic", "no-tokenizer"])
def test_without_weights_or_words_quality_is_not_measured(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    result = run(folder, tmp_path, **changes)
    assert result.quality is not None
    assert (result.quality.verdict, result.quality.answers) == ("not measured", [])
    assert "asked" not in result.quality.why
    assert "answers_correct" not in result.metrics
