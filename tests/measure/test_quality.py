"""What users rely on in the quality probe: fair marking of answers, and verdicts that explain themselves."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.core.metrics import METRICS
from harness.core.records import Answer, Case, Machine, Outcome, Quality, Result, Verdict
from harness.measure import quality
from harness.measure.protocol import ScoreDone
from harness.measure.quality import BROKEN, DEGRADED, INTACT, NOT_COMPARED, NOT_MEASURED, PROBE, Question, Reference, is_correct

POSITIONS = 447
REFERENCE_NLL = 1270.31


def answers(correct: int) -> list[Answer]:
    """Answer the probe's questions, the first `correct` of them correctly."""
    return [Answer(question=q.prompt, answer="...", correct=i < correct) for i, q in enumerate(PROBE.questions)]


def scored(
    *,
    nll: float = REFERENCE_NLL,
    positions: int = POSITIONS,
    finite: bool = True,
    agree: int | None = None,
    kl: float | None = None,
    correct: int = 10,
) -> ScoreDone:
    return ScoreDone(nll=nll, positions=positions, finite=finite, agree=agree, kl=kl, answers=answers(correct), phases=[])


REFERENCE = Reference(
    case="smol/fp32/cpu", perplexity=quality.perplexity(REFERENCE_NLL, POSITIONS), answers=scored(correct=10).answers
)


def judged(done: ScoreDone) -> Quality:
    return quality.judge(done, real_weights=True, reference=REFERENCE)


def shifted(*, excess: float = 0.0, agreement: float = 1.0, kl: float = 0.0, lost: int = 0) -> ScoreDone:
    """Score as the reference does, but for these losses."""
    nll = REFERENCE_NLL + POSITIONS * math.log1p(excess)
    return scored(nll=nll, agree=round(agreement * POSITIONS), kl=kl, correct=10 - lost)


# The probe itself


def test_the_probe_has_ten_questions_and_passages_in_several_languages() -> None:
    assert len(PROBE.questions) == len({q.prompt for q in PROBE.questions}) == 10
    assert {p.language for p in PROBE.passages} == {"en", "zh", "python"}
    assert len({p.name for p in PROBE.passages}) == len(PROBE.passages)


@pytest.mark.parametrize("question", PROBE.questions, ids=lambda q: q.prompt)
def test_every_accepted_answer_is_found_in_a_sentence(question: Question) -> None:
    for accepted in question.accept:
        assert is_correct(question, accepted)
        assert is_correct(question, f"Sure! The answer is **{accepted.upper()}**.\nAnything else?")


@pytest.mark.parametrize("question", PROBE.questions, ids=lambda q: q.prompt)
def test_a_model_that_echoes_the_question_scores_nothing(question: Question) -> None:
    assert not is_correct(question, question.prompt)
    assert not is_correct(question, "")


@pytest.mark.parametrize("question", PROBE.questions, ids=lambda q: q.prompt)
def test_a_model_that_always_says_the_same_scores_once(question: Question) -> None:
    for accepted in question.accept:
        assert sum(is_correct(other, accepted) for other in PROBE.questions) == 1


def test_prompts_are_cut_from_all_the_passages() -> None:
    assert all(passage.text in quality.prompt_text() for passage in PROBE.passages)


def test_a_question_reaches_the_model_with_and_without_a_chat_template() -> None:
    question = PROBE.questions[0]
    assert quality.messages(question) == [{"role": "user", "content": question.prompt}]
    assert question.prompt in quality.plain_prompt(question)


# Marking


def ask(*accept: str) -> Question:
    return Question(prompt="?", accept=accept)


@pytest.mark.parametrize(
    ("accept", "answer"),
    [
        ("13", "13"),
        ("13", "7 + 6 = 13."),
        ("13", "7+6=13"),
        ("13", "It is **13**!"),
        ("13", "$\\boxed{13}$"),
        ("13", "（１３）"),
        ("13", "答案是13个。"),
        ("13", "13.0"),
        ("13", "13, because 7 and 6 make 13"),
        ("13", "- 13"),
        ("13", "Not 12, 13."),
        ("7", "A week is a 7-day period."),
        ("four", "A dog has FOUR legs."),
        ("four", "\u201cFour\u201d"),
        ("twenty-four", "There are twenty-four hours"),
        ("Paris", "paris, of course"),
        ("Paris", "The capital isn\u2019t Lyon but Paris."),
        ("Paris", "It is not Lyon. Paris is the capital."),
        ("Paris", "Paris's"),
        ("Paris", "**P**aris"),
        ("H2O", "Water is H₂O."),
        ("H2O", "Water is H_2O."),
        ("Pacific", "the Ｐａｃｉｆｉｃ Ocean"),
        ("巴黎", "法国的首都是巴黎。"),
        ("巴黎", "不是伦敦，而是巴黎"),
        ("巴黎", "不是伦敦而是巴黎"),
        ("二十", "等于二十。"),
    ],
)
def test_an_answer_counts_however_it_is_dressed(accept: str, answer: str) -> None:
    assert is_correct(ask(accept), answer)


@pytest.mark.parametrize(
    ("accept", "answer"),
    [
        ("13", "130"),
        ("13", "1.3"),
        ("13", "13.5"),
        ("13", "2.13"),
        ("13", "13,000"),
        ("13", "1,13"),
        ("13", "-13"),
        ("13", "\u221213"),
        ("13", "13 %"),
        ("13", "1/13"),
        ("13", "13:30"),
        ("13", "A13"),
        ("13", "13th"),
        ("13", "It is 14, not 13."),
        ("2", "1+1 = 2.22222"),
        ("four", "fourteen"),
        ("four", "forty-four"),
        ("four", "twenty four"),
        ("four", "four hundred"),
        ("Paris", "Parisian"),
        ("Paris", "The capital of France is not Paris."),
        ("Paris", "It isn\u2019t Paris"),
        ("Paris", "It is never the city of Paris"),
        ("small", "The opposite of big is not a small word."),
        ("Au", "Gold is Aurum"),
        ("巴黎", "首都不是巴黎"),
        ("二十", "二十五"),
        ("二十", "一百二十"),
        ("二", "十二"),
        ("13", ""),
    ],
)
def test_an_answer_that_only_looks_right_does_not_count(accept: str, answer: str) -> None:
    assert not is_correct(ask(accept), answer)


@given(st.integers(0, 200), st.integers(-300, 300))
def test_a_number_is_itself_and_no_other(wanted: int, said: int) -> None:
    assert is_correct(ask(str(wanted)), f"The answer is {said}.") == (wanted == said)


@given(st.text(max_size=400))
def test_any_text_can_be_marked(text: str) -> None:
    assert is_correct(ask("\U0001f600 never in it"), text) is False


def test_only_the_beginning_of_an_answer_counts() -> None:
    assert is_correct(ask("Paris"), "so " * 60 + "Paris")
    assert not is_correct(ask("Paris"), "so " * 70 + "Paris")
    # The cut must not turn 130 into 13.
    assert not is_correct(ask("13"), " ".join(["so"] * 66) + " 130")


# Verdicts


@pytest.mark.parametrize(
    ("done", "verdict"),
    [
        # SmolLM2-135M-Instruct on this probe against its fp32, measured with transformers 5.23 and bitsandbytes 0.50 on a CPU.
        pytest.param(scored(nll=1271.04, agree=434, kl=0.00123, correct=10), INTACT, id="smol-bf16"),
        pytest.param(scored(nll=1270.09, agree=446, kl=0.00002, correct=10), INTACT, id="smol-fp16"),
        pytest.param(scored(nll=1268.03, agree=401, kl=0.0264, correct=10), INTACT, id="smol-int8"),
        pytest.param(scored(nll=1391.16, agree=297, kl=0.309, correct=8), DEGRADED, id="smol-nf4"),
        pytest.param(scored(nll=1541.57, agree=281, kl=0.597, correct=1), BROKEN, id="smol-one-shuffled-layer"),
        pytest.param(scored(nll=11900.2, agree=0, kl=23.5, correct=0), BROKEN, id="smol-all-shuffled"),
        # llama.cpp's tables of Llama 2 7B and Llama 3 8B (tools/perplexity/README), as if its losses were ours.
        pytest.param(shifted(excess=0.0004, agreement=0.997, kl=0.00003), INTACT, id="llama3-fp16-bf16"),
        pytest.param(shifted(excess=0.0004, agreement=0.977, kl=0.0014), INTACT, id="llama3-q8_0"),
        pytest.param(shifted(excess=0.028, agreement=0.919, kl=0.031), DEGRADED, id="llama3-q4_K_M"),
        pytest.param(shifted(excess=0.108, agreement=0.856, kl=0.109), DEGRADED, id="llama2-q2_K"),
        pytest.param(shifted(excess=0.565, agreement=0.711, kl=0.445), DEGRADED, id="llama3-q2_K"),
        pytest.param(shifted(excess=8.3, agreement=0.3, kl=2.2), BROKEN, id="llama3-iq1_S"),
        # Faults that a single measure sees.
        pytest.param(shifted(lost=10), BROKEN, id="generation-broken"),
        pytest.param(shifted(lost=2), DEGRADED, id="two-answers-lost"),
        pytest.param(shifted(agreement=0.8), DEGRADED, id="agreement-low"),
        pytest.param(shifted(agreement=0.4), BROKEN, id="agreement-gone"),
        pytest.param(shifted(excess=0.03), DEGRADED, id="perplexity-up"),
        pytest.param(shifted(excess=1.1), BROKEN, id="perplexity-doubled"),
        pytest.param(shifted(kl=0.06), DEGRADED, id="kl-up"),
        pytest.param(shifted(kl=math.nan), BROKEN, id="kl-nan"),
        pytest.param(shifted(excess=-0.05), INTACT, id="better-than-the-reference"),
    ],
)
def test_the_verdict_fits_what_is_known_of_these_models(done: ScoreDone, verdict: str) -> None:
    assert judged(done).verdict == verdict


def test_a_verdict_names_values_and_limits() -> None:
    found = judged(shifted(excess=0.041, agreement=0.8, kl=0.01))
    assert found.why == "perplexity 4.1 % above the reference (limit 2.0 %); next-token agreement 80.1 % (limit 85.0 %)"
    assert found.reference == "smol/fp32/cpu"
    assert judged(shifted(kl=0.7, lost=3)).why == "KL divergence 0.700 (limit 0.500)"
    assert judged(shifted(lost=3)).why == "3 answers lost (limit 1)"


def test_an_intact_case_says_what_was_compared() -> None:
    found = judged(shifted(excess=-0.004, agreement=0.98, kl=0.002, lost=1))
    assert found.why == "perplexity 0.4 % below the reference, next-token agreement 98.0 %, KL divergence 0.00200, 1 answer lost"


def test_an_answer_lost_is_not_made_up_for_by_one_gained() -> None:
    reference = msgspec.structs.replace(REFERENCE, answers=answers(5))
    swapped = [msgspec.structs.replace(answer, correct=not answer.correct) for answer in answers(5)]
    done = msgspec.structs.replace(scored(), answers=swapped)
    assert quality.judge(done, real_weights=True, reference=reference).why == "5 answers lost (limit 1)"


def test_without_kept_predictions_perplexity_and_answers_still_decide() -> None:
    assert judged(scored(nll=REFERENCE_NLL + 30)).verdict == DEGRADED
    found = judged(scored())
    assert (found.verdict, found.why) == (INTACT, "perplexity 0.0 % above the reference, no answer lost")


LOSSES = st.tuples(st.floats(0, 3), st.floats(0, 1), st.floats(0, 2), st.integers(0, 10))


@given(LOSSES, LOSSES)
def test_losing_more_never_improves_the_verdict(one: tuple[float, float, float, int], two: tuple[float, float, float, int]) -> None:
    rank = [INTACT, DEGRADED, BROKEN].index
    worse = [max(pair) for pair in zip(one, two, strict=True)]
    mild = shifted(excess=one[0], agreement=1 - one[1], kl=one[2], lost=one[3])
    severe = shifted(excess=worse[0], agreement=1 - worse[1], kl=worse[2], lost=int(worse[3]))
    assert rank(judged(severe).verdict) >= rank(judged(mild).verdict)


@pytest.mark.parametrize("real_weights", [True, False])
@pytest.mark.parametrize("done", [scored(finite=False), scored(nll=math.nan), scored(nll=math.inf)], ids=["flag", "nan", "inf"])
def test_nan_is_broken_whatever_the_weights(done: ScoreDone, real_weights: bool) -> None:
    found = quality.judge(done, real_weights=real_weights, is_reference=True)
    assert (found.verdict, found.why) == (BROKEN, "NaN or infinity among the predictions")


def test_synthetic_weights_are_not_measured() -> None:
    done = scored(nll=9000.0, agree=3, kl=8.0, correct=0)
    found = quality.judge(done, real_weights=False, reference=REFERENCE)
    assert (found.verdict, found.reference, found.answers) == (NOT_MEASURED, None, [])
    assert "synthetic weights" in found.why
    assert quality.metrics_of(done, real_weights=False) == {}


def test_nothing_scored_is_not_measured() -> None:
    done = scored(nll=0.0, positions=0)
    assert judged(done).verdict == NOT_MEASURED
    assert "perplexity" not in quality.metrics_of(done)


def test_without_a_reference_nothing_is_claimed() -> None:
    found = quality.judge(scored(correct=9), real_weights=True)
    assert (found.verdict, found.reference) == (NOT_COMPARED, None)
    assert found.why == "no reference to compare with: perplexity 17.1, 9 of 10 answers correct"


def test_the_reference_is_intact_if_it_speaks_at_all() -> None:
    assert quality.judge(scored(), real_weights=True, is_reference=True) == Quality(
        probe=PROBE.version,
        verdict=INTACT,
        why="is the reference: perplexity 17.1, 10 of 10 answers correct",
        answers=answers(10),
    )


@pytest.mark.parametrize("nats", [7.0, 26.6, 800.0, 1e300])
def test_a_model_worse_than_word_frequencies_is_broken_without_a_reference(nats: float) -> None:
    found = quality.judge(scored(nll=nats * POSITIONS), real_weights=True, is_reference=True)
    assert found.verdict == BROKEN
    assert "a perplexity above 1,000" in found.why


# Figures


def test_the_metrics_of_a_score() -> None:
    found = quality.metrics_of(scored(nll=POSITIONS * math.log(8), agree=POSITIONS, kl=0.25, correct=7))
    assert found == {"perplexity": pytest.approx(8.0), "top1_agreement": 1.0, "kl": 0.25, "answers_correct": 7}
    assert found.keys() <= METRICS.keys()


def test_what_was_not_measured_is_absent() -> None:
    assert quality.metrics_of(scored()).keys() == {"perplexity", "answers_correct"}
    silent = msgspec.structs.replace(scored(), answers=[])
    assert quality.metrics_of(silent).keys() == {"perplexity"}


@pytest.mark.parametrize(
    "done",
    [scored(nll=1e300, kl=math.inf), scored(nll=math.nan, agree=1), scored(finite=False, agree=1)],
    ids=["overflow", "nan", "flag"],
)
def test_figures_that_json_cannot_hold_are_left_out(done: ScoreDone) -> None:
    found = quality.metrics_of(done)
    assert found.keys() == {"answers_correct"}
    assert msgspec.json.decode(msgspec.json.encode(found), type=dict[str, float]) == found


# References from the store


def result(*, done: ScoreDone, **changes: object) -> Result:
    kept = Result(
        id="smol/fp32/cpu",
        run="r",
        at="2026-11-24T00:00:00Z",
        case=Case(model="smol", precision="fp32", placement="cpu"),
        weights="real",
        machine=Machine(name="here", tiers=()),
        verdict=Verdict.FITS,
        outcome=Outcome.OK,
        stage="done",
        metrics=quality.metrics_of(done),
        quality=quality.judge(done, real_weights=True, is_reference=True),
    )
    return msgspec.structs.replace(kept, **changes)


def test_a_stored_result_serves_as_reference() -> None:
    assert quality.reference_of(result(done=scored())) == REFERENCE


def test_results_that_cannot_serve_as_reference() -> None:
    other_probe = Quality(probe="0", verdict=INTACT, why="is the reference")
    assert quality.reference_of(result(done=scored(), quality=other_probe)) is None
    assert quality.reference_of(result(done=scored(), quality=None)) is None
    assert quality.reference_of(result(done=scored(), metrics={})) is None
    assert quality.reference_of(result(done=scored(nll=9 * POSITIONS))) is None
