"""The quality probe: its texts and questions, what a model scores on them, and the verdict. Pure functions.

Two things are asked. How well does the model predict four short passages (perplexity), and how near are its predictions to
those of the same model at its reference precision (agreement of the next token, KL divergence)? And does it answer ten easy
questions, put as it was taught (`measure.dialogue`), and one more that takes a tool, if it was taught any? The answers are the only
part that goes through generation with a KV cache and a padded batch, so they notice faults that a single forward pass cannot.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping

import msgspec

from harness.core import units
from harness.core.metrics import FORMATTERS
from harness.core.records import Answer, Quality, Record, Result
from harness.data import DATA
from harness.measure.protocol import ScoreDone

INTACT, DEGRADED, BROKEN = "intact", "degraded", "broken"
NOT_COMPARED, NOT_MEASURED = "not compared", "not measured"


class Passage(Record, frozen=True, kw_only=True):
    """A text to predict."""

    name: str
    language: str
    text: str


class Question(Record, frozen=True, kw_only=True):
    """A question with the answers that count as correct."""

    prompt: str
    accept: tuple[str, ...]


class Probe(Record, frozen=True, kw_only=True):
    """What every model is shown. Results compare only within one `version`."""

    version: str
    passages: tuple[Passage, ...]
    questions: tuple[Question, ...]


class Reference(Record, frozen=True, kw_only=True):
    """What the same model showed at its reference precision; `case` is the id of that case, `dialogue` how it was asked."""

    case: str
    perplexity: float
    answers: list[Answer] = []
    dialogue: str = ""


class Threshold(Record, frozen=True, kw_only=True):
    """Limits of one measure: intact up to the first, degraded up to the second, broken beyond. `say` puts a value in words."""

    say: Callable[[float], str]
    unit: str
    better: str
    intact: float
    degraded: float

    def verdict(self, value: float) -> str:
        """Judge a value; NaN is broken."""
        if self._allows(value, self.intact):
            return INTACT
        return DEGRADED if self._allows(value, self.degraded) else BROKEN

    def complain(self, value: float) -> str:
        """Say the value and the limit that it oversteps."""
        limit = self.degraded if self.verdict(value) == BROKEN else self.intact
        return f"{self.say(value)} (limit {FORMATTERS[self.unit](limit)})"

    def _allows(self, value: float, limit: float) -> bool:
        return value >= limit if self.better == "higher" else value <= limit


def _say_perplexity(excess: float) -> str:
    share = units.format_share(abs(excess))
    return f"perplexity {share} above the reference" if excess >= 0 else f"perplexity {share} below the reference"


def _say_answers(lost: float) -> str:
    return f"{lost:.0f} answers lost" if lost > 1 else "1 answer lost" if lost else "no answer lost"


# "Intact" asks for no measurable loss of quality, as MLPerf Inference does (99 % of the reference's accuracy), with room for the
# error of a sample of some 450 tokens: 1 % for agreement, and sqrt(2 KL / tokens), up to 1.5 %, for the ratio of perplexities.
# "Broken" is what no published way of holding weights at 4 bits or more does to a model. In numbers, all against 16 bits:
#
#                                              perplexity    agreement       KL
#   Llama 3 8B, fp16 / bf16                       +0.04 %       99.7 %  0.00003   llama.cpp, tools/perplexity/README
#   Llama 2 7B / 3 8B, q8_0               +0.07 / +0.04 %  98.8 / 97.7  0.0004 / 0.0014    same
#   Llama 2 7B / 3 8B, q4_K_M               +1.4 / +2.8 %  94.7 / 91.9  0.013 / 0.031      same
#   Llama 2 7B / 3 8B, q2_K                  +11 / +56 %   85.6 / 71.1  0.11 / 0.45        same
#   Llama 3 8B, iq2_XXS / iq1_S             +126 / +830 %            -  0.81 / 2.2         same
#   Llama 2 7B, bitsandbytes int8 / 4 bit   +0.8 / +4.8 %            -        -   HQQ (Badri and Shaji 2023)
#   LLaMA 7B, GPTQ 4 bit / 4 bit rounded     +7 / +11 %              -        -   GPTQ (Frantar et al. 2022)
#
# Small models sit lower in agreement at the same KL, because more of their positions are near ties: SmolLM2-135M against fp32
# shows bf16 97 %, KL 0.001; LLM.int8 90 %, KL 0.026, perplexity unchanged; nf4 66 %, KL 0.31, perplexity +31 %; and with the
# weights of one MLP of 30 shuffled, which must be called broken, 63 %, KL 0.60, +83 % and nine answers of ten lost. Hence the loose
# limit of agreement: perplexity and KL do the work there.
THRESHOLDS: Mapping[str, Threshold] = {
    # Twice the perplexity is one bit lost with every token.
    "perplexity_excess": Threshold(say=_say_perplexity, unit="share", better="lower", intact=0.02, degraded=1.0),
    "top1_agreement": Threshold(
        say=lambda share: f"next-token agreement {units.format_share(share)}",
        unit="share",
        better="higher",
        intact=0.85,
        degraded=0.50,
    ),
    "kl": Threshold(
        say=lambda nats: f"KL divergence {units.significant(nats)}", unit="ratio", better="lower", intact=0.05, degraded=0.50
    ),
    # One answer of ten flips on a near tie between two 16-bit formats.
    "answers_lost": Threshold(say=_say_answers, unit="count", better="lower", intact=1, degraded=6),
}

# Word frequencies alone, without any context, predict the Wall Street Journal with a perplexity of 962 (Jurafsky and Martin,
# Speech and Language Processing, chapter on n-grams), and tokens are easier than words. A model above that has learned nothing,
# or lost it.
PERPLEXITY_LIMIT = 1000.0


def _read_probe() -> Probe:
    return msgspec.toml.decode((DATA / "probe.toml").read_bytes(), type=Probe)


PROBE = _read_probe()
_ASKED_IN = "+"  # between the version of the probe and the dialogue that its questions were put in


def prompt_text() -> str:
    """Return the passages as one text, to cut prompts of a wanted length from (repeat it for long ones)."""
    return "\n".join(passage.text for passage in PROBE.passages)


def messages(question: Question) -> list[dict[str, str]]:
    """Put a question as a conversation for `apply_chat_template`."""
    return [{"role": "user", "content": question.prompt}]


def plain_prompt(question: Question) -> str:
    """Put a question to a model without a chat template."""
    return f"Question: {question.prompt}\nAnswer:"


HEARD = 200
"""Characters of an answer that count."""

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_HAN_NUMERAL = "[零〇一二两三四五六七八九十百千万亿点]"
# A letter or digit of a script that sets words apart; a hyphen joins too ("forty-four").
_LETTER = rf"[^\W{_CJK}]"
_BEFORE = rf"(?<!{_LETTER})(?<!{_LETTER}-)"
_AFTER = rf"(?!{_LETTER})"
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety", "hundred")
_NOT_IN_NUMERAL = "".join(rf"(?<!\b{tens} )" for tens in _TENS)
_CLAUSE_END = re.compile(r"[.,;:!?\n。、]|\b(?:but|rather|instead)\b")
_NEGATIONS = {"not", "never", "neither", "nor", "cannot"}
_MARKUP = str.maketrans({"−": "-", "’": "'", **dict.fromkeys("*_`~#\u200b", "")})


def is_correct(question: Question, answer: str) -> bool:
    """Say whether an answer names an accepted one, as a whole word or number, in its first `HEARD` characters.

    Case, width of characters and Markdown are ignored. "130", "1.3", "-13" and "13 %" do not name 13; "not Paris" does not
    name Paris. Chinese has no spaces between words, so a Chinese answer may stand anywhere, except inside a longer numeral.
    """
    text = _plain(answer[: 2 * HEARD])
    return any(
        match.end() <= HEARD and not _is_negated(text[: match.start()])
        for accepted in question.accept
        for match in _pattern(_plain(accepted)).finditer(text)
    )


def _plain(text: str) -> str:
    """Fold case, width and Markdown, and leave one space where there were several."""
    text = unicodedata.normalize("NFKC", text).casefold().translate(_MARKUP)
    return re.sub(r"[^\S\n]+", " ", text.strip())


def _pattern(accepted: str) -> re.Pattern[str]:
    """Return what finds an accepted answer as a word or number of its own."""
    text = re.escape(accepted)
    if accepted.isdecimal():
        return re.compile(rf"{_BEFORE}(?<!-)(?<!\d[.,/:]){text}(?:\.0+)?{_AFTER}(?![.,/:]\d|\s?%)")
    if re.fullmatch(f"{_HAN_NUMERAL}+", accepted):
        return re.compile(f"(?<!{_HAN_NUMERAL}){text}(?!{_HAN_NUMERAL})")
    if re.search(f"[{_CJK}]", accepted):
        return re.compile(text)
    return re.compile(f"{_BEFORE}{_NOT_IN_NUMERAL}{text}{_AFTER}(?! (?:hundred|thousand|million))")


def _is_negated(before: str) -> bool:
    """Say whether the clause that ends here denies what follows: "is not the city of", "不是"."""
    clause = _CLAUSE_END.split(before)[-1]
    near = clause.split()[-4:]
    return any(word in _NEGATIONS or word.endswith("n't") for word in near) or bool(re.search("[不非没]", clause[-3:]))


def perplexity(nll: float, positions: int) -> float:
    """Return exp of the mean negative log-likelihood (nats a token); infinity where that overflows or nothing was scored."""
    try:
        return math.exp(nll / positions)
    except (OverflowError, ZeroDivisionError):
        return math.inf


def metrics_of(done: ScoreDone, *, real_weights: bool = True) -> dict[str, float]:
    """Return what the probe gives METRICS: nothing for synthetic weights, and no figure that is not finite."""
    if not real_weights:
        return {}
    figures: dict[str, float | None] = {}
    if _is_finite(done) and done.positions:
        figures["perplexity"] = perplexity(done.nll, done.positions)
        figures["top1_agreement"] = None if done.agree is None else done.agree / done.positions
        figures["kl"] = done.kl
    if done.answers:
        figures["answers_correct"] = len(_correct(done.answers))
    return {key: value for key, value in figures.items() if value is not None and math.isfinite(value)}


def reference_of(result: Result) -> Reference | None:
    """Make a reference of a result; None if it cannot serve as one: another probe, no perplexity, broken."""
    found, quality = result.metrics.get("perplexity"), result.quality
    if found is None or quality is None or quality.verdict == BROKEN:
        return None
    version, _, dialogue = quality.probe.partition(_ASKED_IN)
    if version != PROBE.version:
        return None
    return Reference(case=result.case.id, perplexity=found, answers=quality.answers, dialogue=dialogue)


def judge(done: ScoreDone, *, real_weights: bool, reference: Reference | None = None, is_reference: bool = False) -> Quality:
    """Reach a verdict: intact, degraded, broken, not compared (without a reference) or not measured (synthetic weights).

    `reference` is what `done.agree` and `done.kl` were measured against; `is_reference` marks the reference case itself.
    """
    against = reference if real_weights and not is_reference else None
    verdict, why = _judge_alone(done, real_weights) or _judge_beside(done, against, is_reference)
    wrong = [answer.wrong for answer in done.answers if answer.wrong and real_weights]
    return Quality(
        probe=PROBE.version + (_ASKED_IN + done.dialogue if done.dialogue else ""),
        verdict=verdict,
        why="; ".join([why, *wrong]),
        reference=against.case if against else None,
        answers=done.answers if real_weights else [],
    )


def _judge_alone(done: ScoreDone, real_weights: bool) -> tuple[str, str] | None:
    """Return verdict and reason where no reference is needed to see them."""
    if not _is_finite(done):
        return BROKEN, "NaN or infinity among the predictions"
    if not real_weights:
        return NOT_MEASURED, "synthetic weights are checked for NaN and infinity only"
    if not done.positions:
        return NOT_MEASURED, "there is no tokenizer beside the weights, so no text was scored"
    if perplexity(done.nll, done.positions) > PERPLEXITY_LIMIT:
        nats = units.significant(done.nll / done.positions)
        return BROKEN, f"{nats} nats a token are a perplexity above {PERPLEXITY_LIMIT:,.0f}, worse than word frequencies alone"
    return None


def _judge_beside(done: ScoreDone, reference: Reference | None, is_reference: bool) -> tuple[str, str]:
    """Return verdict and reason from the measures that a reference makes possible: the worst of them decides."""
    if reference is None:
        seen = f"perplexity {units.significant(perplexity(done.nll, done.positions))}"
        if done.answers:
            seen += f", {len(_correct(done.answers))} of {len(done.answers)} answers correct"
        return (INTACT, f"is the reference: {seen}") if is_reference else (NOT_COMPARED, f"no reference to compare with: {seen}")
    measured = _compare(done, reference)
    verdicts = {key: THRESHOLDS[key].verdict(value) for key, value in measured.items()}
    worst = max(verdicts.values(), key=[INTACT, DEGRADED, BROKEN].index)
    if worst == INTACT:
        return INTACT, ", ".join(THRESHOLDS[key].say(value) for key, value in measured.items())
    return worst, "; ".join(THRESHOLDS[key].complain(value) for key, value in measured.items() if verdicts[key] == worst)


def _compare(done: ScoreDone, reference: Reference) -> dict[str, float]:
    """Return the measures of THRESHOLDS that both sides allow."""
    measured = {"perplexity_excess": perplexity(done.nll, done.positions) / reference.perplexity - 1}
    if done.agree is not None:
        measured["top1_agreement"] = done.agree / done.positions
    if done.kl is not None:
        measured["kl"] = done.kl
    if done.answers and reference.answers and done.dialogue == reference.dialogue:
        asked = {answer.question for answer in done.answers}  # one that takes long is left out where a model is slow
        measured["answers_lost"] = len((_correct(reference.answers) & asked) - _correct(done.answers))
    return measured


def _is_finite(done: ScoreDone) -> bool:
    return done.finite and math.isfinite(done.nll)


def _correct(answers: list[Answer]) -> set[str]:
    """Return the questions that were answered correctly."""
    return {answer.question for answer in answers if answer.correct}
