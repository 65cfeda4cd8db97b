"""Run the quality probe on a loaded model: likelihood of the passages, agreement with a reference, short answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import torch
from transformers import QuantizedCache

from harness.checkpoint import reader
from harness.core.records import Answer
from harness.measure import dialogue, quality
from harness.measure.dialogue import Dialogue, Tool, Turn, Written
from harness.measure.protocol import Score
from harness.models.cache_argument import CACHE
from harness.worker.model import Model, ModelFault, pad_id

_ANSWER_TOKENS = 12
# A call with a tool takes many tokens. Weights that come from the disk make them slow, and must not make the case a time-out.
_CALL_S = 120.0
_SYNTHETIC_POSITIONS = 64

Predictions = npt.NDArray[np.float16]


def score(model: Model, request: Score) -> dict[str, Any]:
    """Return the fields of ScoreDone. Without a tokenizer no text can be scored: only whether the logits are finite.

    Next-token log-probabilities [positions, vocabulary] are computed in float32 and kept as float16: their error, below
    0.01 nat at a probability of e**-16, is far under what any quantization does.
    """
    reference = np.load(request.reference, mmap_mode="r") if request.reference else None
    kept: list[Predictions] = []
    nll, positions, finite, agree, kl = 0.0, 0, True, 0, 0.0
    for ids in _texts(model):
        logp = _log_probabilities(model, ids)
        finite = finite and bool(torch.isfinite(logp).all())
        targets = torch.tensor(ids[1:], device=logp.device)
        nll -= float(logp.gather(1, targets[:, None]).sum(dtype=torch.float64))
        if reference is not None:
            same, divergence = _compare(logp, reference[positions : positions + len(targets)])
            agree, kl = agree + same, kl + divergence
        if request.keep:
            kept.append(logp.to(torch.float16).cpu().numpy())
        positions += len(targets)
    if request.keep:
        _write(Path(request.keep), kept)
    compared = reference is not None and positions > 0
    asked = dialogue_of(model, request.model)
    if model.tokenizer is None:
        nll, positions = 0.0, 0
    return {
        "nll": nll if math.isfinite(nll) else 0.0,
        "positions": positions,
        "finite": finite and math.isfinite(nll),
        "agree": agree if compared else None,
        "kl": kl / positions if compared and math.isfinite(kl) else None,
        "answers": _answers(model, asked) if model.tokenizer is not None else [],
        "dialogue": asked.name if asked else "",
    }


def dialogue_of(model: Model, name: str) -> Dialogue | None:
    """Return how the model is asked where it brings no template for it."""
    if model.tokenizer is None or model.tokenizer.chat_template:
        return None
    return dialogue.choose(name, model.tokenizer.get_vocab())


def _texts(model: Model) -> list[list[int]]:
    if model.tokenizer is None:
        return [model.prompt(_SYNTHETIC_POSITIONS)[: -len(model.ending) or None]]
    most = (_context(model) or 1 << 30) - len(model.ending)
    return [model.encode(passage.text)[:most] for passage in quality.PROBE.passages]


def _context(model: Model) -> int | None:
    """Return the most tokens that the model has positions for, if its config says."""
    return reader.context_length(model.module.config.to_dict())


@torch.no_grad()  # in inference mode the tensors of some quantizers cannot be made
def _log_probabilities(model: Model, ids: list[int]) -> torch.Tensor:
    """Return log p(next token), float32 [len(ids) - 1, vocabulary]; the text is scored as an answer, after an empty prompt.

    Keys and values that a cache quantizes are read as they were computed by the pass that computes them, and as they are kept by
    those that follow: then the second half is scored by what is kept of the first.
    """
    tokens = torch.tensor([[*model.ending, *ids]], device=model.device)
    settings = model.cache.get("cache_config")
    if settings is None:
        logits = model.module(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
    else:
        cache: Any = QuantizedCache(config=model.module.config, **settings)
        parts = tokens.split(-(-tokens.shape[1] // 2), dim=1)
        seen = [torch.ones_like(tokens[:, :end]) for end in (parts[0].shape[1], tokens.shape[1])]
        halves = (
            model.module(part, attention_mask=mask, use_cache=True, **{CACHE: cache}).logits
            for part, mask in zip(parts, seen, strict=False)
        )
        logits = torch.cat(list(halves), dim=1)
    return torch.log_softmax(logits[0, len(model.ending) : -1].float(), dim=-1)


def _compare(logp: torch.Tensor, reference: Predictions) -> tuple[int, float]:
    """Return how many positions have the reference's most likely token, and the summed KL(reference || this) in nats.

    Rounded to float16 the reference's probabilities do not add up to 1; the divergence is that of measures (Csiszar 1975),
    sum(p log(p/q) - p + q), which is never negative and the usual one where both do.
    """
    theirs = torch.from_numpy(np.asarray(reference, dtype=np.float32)).to(logp.device)
    # Logits in bfloat16 and a reference in float16 have exact ties; either's favorite counts if the other has none better.
    same = _is_favorite(theirs.argmax(dim=-1), logp) | _is_favorite(logp.argmax(dim=-1), theirs)
    likely = theirs.exp()
    terms = (theirs - logp).mul_(likely).sub_(likely).add_(logp.exp())
    return int(same.sum()), float(terms.clamp_(min=0).sum(dtype=torch.float64))  # less than 0 by rounding alone


def _is_favorite(tokens: torch.Tensor, logp: torch.Tensor) -> torch.Tensor:
    return logp.gather(1, tokens[:, None])[:, 0] == logp.amax(dim=-1)


def _write(path: Path, kept: list[Predictions]) -> None:
    with path.open("wb") as file:
        np.save(file, np.concatenate(kept))


def _answers(model: Model, asked: Dialogue | None) -> list[Answer]:
    """Ask all questions as one batch, and the one that takes a tool where the model was taught to use one."""
    questions, prompts = quality.PROBE.questions, _prompts(model, asked)
    longest = encode_text(model, prompts)["input_ids"].shape[1]
    if longest + _ANSWER_TOKENS > (_context(model) or 1 << 30):
        return []  # no room for an answer
    written = _continue(model, prompts, _ANSWER_TOKENS, asked.ends if asked else ())
    answers = []
    for question, (ids, _) in zip(questions, written, strict=True):
        text = model.tokenizer.decode(ids, skip_special_tokens=True).strip()
        answers.append(Answer(question=question.prompt, answer=text, correct=quality.is_correct(question, text)))
    used = _answer_with_tool(model, asked, asked.tool) if asked is not None and asked.tool is not None else None
    return answers if used is None else [*answers, used]


def _prompts(model: Model, asked: Dialogue | None) -> list[str]:
    questions, tokenizer = quality.PROBE.questions, model.tokenizer
    if asked is not None:
        return [asked.ask(question) for question in questions]
    if not tokenizer.chat_template:
        return [quality.plain_prompt(question) for question in questions]
    return [in_template(tokenizer, quality.messages(question)) for question in questions]


def in_template(tokenizer: Any, said: Sequence[dict[str, str]]) -> str:
    """Put a conversation into the model's own template.

    Templates of models that see or hear want a list of parts where others want text; one that is given text ends in an error, or
    leaves it out.

    Raises:
        ModelFault: it fails with both, or nothing of what is said is in its text.
    """
    *before, last = said
    longer = [*before, {**last, "content": f"{last['content']}?"}]
    texts, fault = [], "leaves out what is said"
    for form in (list, _in_parts):
        try:
            text, other = (str(_put(tokenizer, form(each))) for each in (said, longer))
        except (jinja2.TemplateError, TypeError) as error:
            fault = f"fails: {error}"
        else:
            texts += [text] if text != other else []
    if not texts:
        way = "take the template that belongs to the model, or take it away to ask without"
        raise ModelFault(f"the chat template of the tokenizer {fault}; {way}")
    return next((text for text in texts if last["content"].strip() in text), texts[0])


def _in_parts(said: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    return [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in said]


def _put(tokenizer: Any, said: Sequence[dict[str, Any]]) -> Any:
    return tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)


def _answer_with_tool(model: Model, asked: Dialogue, tool: Tool) -> Answer | None:
    """Ask in two calls: for a command, and for the answer that follows from its results; None if that takes too long here."""
    called = _write_turn(model, dialogue.first_prompt(asked, tool), tool.call, tool.ends)
    if called is None:
        return None
    if dialogue.fault_of_call(tool, called):
        return dialogue.mark(tool, called, None)
    answered = _write_turn(model, dialogue.second_prompt(asked, tool, called), tool.answer, tool.ends)
    return None if answered is None else dialogue.mark(tool, called, answered)


def _write_turn(model: Model, prompt: str, turn: Turn, ends: Sequence[str]) -> Written | None:
    """Return what the model writes in one call; None if its time was up first."""
    [(ids, end)] = _continue(model, [prompt], turn.tokens, ends, seconds=_CALL_S)
    if end is None and len(ids) < turn.tokens:
        return None
    return Written(model.tokenizer.decode(ids, skip_special_tokens=False), end)


def _continue(
    model: Model, prompts: list[str], most: int, ends: Sequence[str], seconds: float | None = None
) -> list[tuple[list[int], str | None]]:
    """Continue prompts greedily, as one left-padded batch, for `seconds` at most.

    Returns the new tokens of each up to the first that ends it, one of `ends` or of the model's own, and the text of that one; None
    where there was none in `most` tokens or in time.
    """
    tokenizer = model.tokenizer
    stops = ending_ids(model, ends)
    batch = encode_text(model, prompts)
    output = model.module.generate(  # type: ignore[operator]  # transformers' stubs take the mixin's method for a tensor
        **batch,
        do_sample=False,
        num_beams=1,
        max_new_tokens=most,
        max_time=seconds,
        pad_token_id=pad_id(model),
        eos_token_id=sorted(stops) or None,
        **model.cache,
    )
    written = []
    for row in output[:, batch["input_ids"].shape[1] :].tolist():
        kept = list(takewhile(lambda token: token not in stops, row))
        written.append((kept, str(tokenizer.convert_ids_to_tokens(row[len(kept)])) if len(kept) < len(row) else None))
    return written


def ending_ids(model: Model, ends: Sequence[str]) -> set[int]:
    """Return the tokens that end what a model says: those of its own config, and `ends` of the dialogue that it was taught."""
    own = model.module.generation_config.eos_token_id
    ids = [one for one in (own if isinstance(own, list) else [own]) if isinstance(one, int)]
    return {*ids, *(model.tokenizer.convert_tokens_to_ids(end) for end in ends)}


def encode_text(model: Model, prompts: list[str]) -> dict[str, torch.Tensor]:
    """Return the inputs of generate for prompts, as one left-padded batch on the model's device.

    Tokenizers pad with tokens that the model may not have, or with none.

    Raises:
        ModelFault: the tokenizer makes tokens that the model does not have, or none.
    """
    special = not model.tokenizer.chat_template
    rows = [model.known(list(model.tokenizer(prompt, add_special_tokens=special)["input_ids"])) for prompt in prompts]
    longest, pad = max(map(len, rows)), pad_id(model)
    if not all(rows):
        raise ModelFault("the tokenizer makes no token of a question: take the one that belongs to the weights, or take it away")
    ids = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids, device=model.device), "attention_mask": torch.tensor(mask, device=model.device)}
