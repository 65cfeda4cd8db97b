"""The worker's own work, on a tiny real model: load by the printed code, count, time tokens, score."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import accelerate.big_modeling
import msgspec
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from harness.core.placements import PLACEMENTS
from harness.core.precisions import PRECISIONS
from harness.measure import system_counters
from harness.measure.beacon import Pulse, last_beat
from harness.measure.protocol import Generate, Load, Score
from harness.measure.quality import PROBE
from harness.planning.code import Destination, loading_code
from harness.planning.feasibility import gate
from harness.worker import accelerators, prefault, quality_probe
from harness.worker import model as work
from harness.worker.model import Model
from tests.support import builders, small_models

VOCABULARY = 96
LAYERS = 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of a few hundred kB, without a tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    directory = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def speaking(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a tokenizer of single characters."""
    directory = tmp_path_factory.mktemp("speaking")
    shutil.copytree(tiny, directory, dirs_exist_ok=True)
    small_models.write_letters(directory, VOCABULARY)
    return directory


class Phases:
    def __init__(self) -> None:
        self.names: list[str] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.names.append(name)
        yield


def load(
    directory: Path, precision: str, placement: str = "cpu", *, tokenizer: bool = False, **limits: int
) -> tuple[Model, dict[str, float], Phases]:
    row = PRECISIONS[precision]
    code = loading_code(row, PLACEMENTS[placement], row.dtype, Destination(max_memory=limits or None))
    phases = Phases()
    loaded, seconds = work.load(Load(model=str(directory), code=code, imports=row.needs, tokenizer=tokenizer), phases)
    return loaded, seconds, phases


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> Model:
    return load(tiny, "fp32")[0]


def runs_here(precision: str) -> bool:
    """Say whether a checkpoint that is not quantized can be held so, on the CPU and with the packages that are here."""
    return PRECISIONS[precision].requires_checkpoint is None and gate(builders.case(precision, "cpu"), builders.machine()) is None


@pytest.mark.parametrize("precision", [name for name in PRECISIONS if runs_here(name)])
def test_every_precision_takes_effect_on_the_cpu(tiny: Path, precision: str) -> None:
    found = work.loaded_facts(load(tiny, precision)[0])
    assert set(found.linear_dtype_bytes) == {PRECISIONS[precision].linear_dtype}
    assert found.tier_bytes.keys() == {"cpu"}
    assert found.model_class == "LlamaForCausalLM"


def test_tied_weights_count_once(loaded: Model) -> None:
    total = sum(work.loaded_facts(loaded).dtype_bytes.values())
    assert total == sum(parameter.numel() for parameter in loaded.module.parameters()) * 4


def test_a_result_tells_the_threads_that_torch_computes_with(loaded: Model) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert work.loaded_facts(loaded).threads == threads
    finally:
        torch.set_num_threads(before)


def test_steps_of_loading_are_timed_apart(tiny: Path) -> None:
    _, seconds, phases = load(tiny, "int8")
    assert phases.names == ["import", "load"]
    assert 0 < seconds["weights_s"] <= seconds["load_s"]


def test_libraries_are_left_as_they_were(tiny: Path) -> None:
    before = torch.nn.Module.to
    load(tiny, "fp32")
    assert torch.nn.Module.to is before


def test_dispatch_times_its_placing(tiny: Path) -> None:
    found, seconds, _ = load(tiny, "bf16", "dispatch")
    assert seconds["weights_s"] > 0
    assert seconds["dispatch_s"] > 0
    assert set(work.loaded_facts(found).linear_dtype_bytes) == {"bfloat16"}


def test_disk_placement_leaves_blocks_on_the_disk(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    embedding, block = VOCABULARY * 64 * 2, 64 * 64 * 2 * 2
    found = work.loaded_facts(load(tiny, "bf16", "disk", cpu=embedding * 2 + block * 6)[0])
    assert found.tier_bytes["disk"] > 0
    assert found.tier_bytes["cpu"] > 0
    assert "disk" in found.device_map.values()


@pytest.mark.parametrize(("prompt_tokens", "new_tokens", "batch"), [(5, 7, 1), (300, 3, 2), (1, 2, 3)])
def test_generates_exactly_what_was_asked(loaded: Model, prompt_tokens: int, new_tokens: int, batch: int) -> None:
    done = work.generate(loaded, Generate(prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch))
    assert done["prompt_tokens"] == prompt_tokens
    assert done["new_tokens"] == new_tokens == len(done["token_s"])
    assert done["batch"] == batch
    assert done["token_s"] == sorted(done["token_s"])
    assert 0 < done["token_s"][0] < done["token_s"][-1] <= done["total_s"]


def test_several_generations_make_a_round_and_each_is_timed_on_its_own(loaded: Model) -> None:
    done = work.generate(loaded, Generate(prompt_tokens=5, new_tokens=3, batch=1, times=3))
    generations = [done["token_s"], *done["more_token_s"]]
    assert [len(times) for times in generations] == [3, 3, 3]
    assert all(times == sorted(times) for times in generations)
    assert sum(times[-1] for times in generations) <= done["total_s"]


def test_prompts_without_a_tokenizer_are_ids_of_the_vocabulary(loaded: Model) -> None:
    ids = loaded.prompt(200)
    assert len(ids) == 200
    assert len(set(ids)) > VOCABULARY / 2
    assert all(0 <= token < VOCABULARY for token in ids)


@pytest.fixture(scope="module")
def speaker(speaking: Path) -> Model:
    return load(speaking, "fp32", tokenizer=True)[0]


def test_a_model_agrees_with_itself(speaker: Model, tmp_path: Path) -> None:
    kept = tmp_path / "reference.npy"
    first = quality_probe.score(speaker, Score(keep=str(kept)))
    again = quality_probe.score(speaker, Score(reference=str(kept)))
    assert first["agree"] is None
    assert again["agree"] == again["positions"] == first["positions"]
    assert 0 <= again["kl"] < 1e-3
    assert np.load(kept).shape == (first["positions"], VOCABULARY)


def test_likelihood_is_that_of_torch(speaker: Model) -> None:
    loss, positions = 0.0, 0
    for passage in PROBE.passages:
        ids = torch.tensor([speaker.tokenizer(passage.text)["input_ids"]])
        with torch.inference_mode():
            loss += float(speaker.module(ids, labels=ids).loss) * (ids.shape[1] - 1)
        positions += ids.shape[1] - 1
    done = quality_probe.score(speaker, Score())
    assert done["positions"] == positions
    assert done["nll"] == pytest.approx(loss, rel=1e-4)


def test_every_question_gets_an_answer(speaker: Model) -> None:
    answers = quality_probe.score(speaker, Score())["answers"]
    assert [answer.question for answer in answers] == [question.prompt for question in PROBE.questions]
    assert not any(answer.correct for answer in answers)


def test_another_model_disagrees(speaker: Model, speaking: Path, tmp_path: Path) -> None:
    kept = tmp_path / "reference.npy"
    quality_probe.score(speaker, Score(keep=str(kept)))
    other, _, _ = load(speaking, "fp32", tokenizer=True)
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter.normal_()
    done = quality_probe.score(other, Score(reference=str(kept)))
    assert done["agree"] < done["positions"]
    assert done["kl"] > 0.1


@pytest.mark.parametrize("broken", [False, True])
def test_without_a_tokenizer_only_finiteness_is_told(tiny: Path, broken: bool) -> None:
    found, _, _ = load(tiny, "fp32")
    if broken:
        with torch.no_grad():
            next(found.module.parameters()).fill_(float("nan"))
    done = quality_probe.score(found, Score())
    assert done["finite"] is not broken
    assert (done["positions"], done["answers"]) == (0, [])


def test_equal_favorites_agree() -> None:
    ours = torch.log_softmax(torch.tensor([[3.0, 3.0, 0.0], [0.0, 1.0, 2.0]]), dim=-1)
    theirs = np.array([[-1.0, -0.5, -3.0], [-0.1, -3.0, -3.0]], dtype=np.float16)
    assert quality_probe._compare(ours, theirs)[0] == 1


def test_who_watches_is_told_of_tokens_in_the_cache(loaded: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded, "pulse", Pulse(tmp_path, accelerators.torch_memory))
    work.generate(loaded, Generate(prompt_tokens=8, new_tokens=5, batch=2))
    beat = last_beat(tmp_path)
    assert beat is not None
    assert (beat.tokens, beat.made, beat.vram) == (8 + 5 - 1, 2 * 5, {})  # the last token is never fed back


def test_a_card_that_holds_nothing_has_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes initializes CUDA when it is imported, beside int8 on the processor as well."""
    held = {0: 0, 1: 5}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda index: held[index])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda index: 2 * held[index])
    assert accelerators.vram_peaks() == ({"gpu:1": 5}, {"gpu:1": 10})
    held[1] = 0
    assert accelerators.vram_peaks() == ({}, {})


def test_what_torch_has_on_the_cards_now_is_told_of_those_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert accelerators.torch_memory() == {}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda index: index)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: 2 * index)
    assert accelerators.torch_memory() == {"gpu:1": (1, 2), "gpu:2": (2, 4)}


@pytest.mark.skipif(not system_counters.LINUX, reason="pagemap is Linux's")
@pytest.mark.parametrize("refused", [False, True])
def test_own_leaves_nothing_shared_with_the_parent_or_says_how_much(monkeypatch: pytest.MonkeyPatch, refused: bool) -> None:
    if refused:
        monkeypatch.setattr(prefault, "_advise", lambda *_: None)
    held = bytearray(os.urandom(16 << 20))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        shared = [sum(length for _, length in prefault.shared_runs())]
        shared.append(prefault.own())
        shared.append(sum(length for _, length in prefault.shared_runs()))
        os.write(writer, msgspec.json.encode(shared))
        os._exit(len(held) == 0)
    os.close(writer)
    assert os.waitpid(child, 0)[1] == 0
    before, said, after = msgspec.json.decode(os.read(reader, 1000))
    os.close(reader)
    assert before > 16 << 20
    assert after > 16 << 20 if refused else after < 1 << 20
    assert said == pytest.approx(after, abs=1 << 20)


@pytest.mark.parametrize("count", [0, 1])
def test_a_limit_on_a_card_that_torch_does_not_see_is_no_limit(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    work.cap_vram(1 << 30, (), 0)
    with pytest.raises(RuntimeError, match=f"no CUDA-capable device gpu:1, which --vram limits: torch sees {count}"):
        work.cap_vram(1 << 30, (0, 1), 0)


def test_a_card_that_holds_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting would make a context there."""
    waited: list[int] = []
    stubs = {
        "is_initialized": lambda: True,
        "device_count": lambda: 3,
        "memory_reserved": {0: 0, 1: 2 << 20, 2: 0}.get,
        "synchronize": waited.append,
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    work.synchronize()
    assert waited == [1]


@pytest.mark.skipif(not system_counters.LINUX, reason="pagemap is Linux's")
def test_replay_maps_pages_that_were_present() -> None:
    runs = prefault.resident_runs()
    assert sum(length for _, length in runs) > 10 << 20  # torch alone is more
    prefault.replay()


def test_a_step_inside_another_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's dispatch_model moves modules itself: what Module.to takes there is in the seconds of dispatch_model already."""
    now = iter(float(second) for second in range(100))
    monkeypatch.setattr("harness.worker.model.time.perf_counter", lambda: next(now))
    small = torch.nn.Linear(2, 2)
    monkeypatch.setattr(accelerate.big_modeling, "dispatch_model", lambda module: module.to("cpu"))
    seconds: dict[str, float] = {}
    with work._parts_timed(seconds):
        accelerate.big_modeling.dispatch_model(small)
        small.to("cpu")
    assert seconds == {"dispatch_s": 2.0}  # two steps, of a second between the looks at a clock that each takes


def test_the_steps_of_loading_take_no_longer_than_loading(tiny: Path) -> None:
    for placement in ("dispatch", "cpu", "disk"):
        _, seconds, _ = load(tiny, "bf16", placement)
        assert seconds.get("weights_s", 0.0) + seconds.get("dispatch_s", 0.0) <= seconds["load_s"]
