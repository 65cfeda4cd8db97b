"""The files of a run's models: one set for each model, and synthetic ones in each form that a precision reads alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.architecture import synthetic as synth
from harness.catalog import resolve
from harness.core.errors import CheckpointError, UsageError
from harness.core.precisions import PRECISIONS
from harness.core.records import Verdict
from harness.planning.planner import Planner
from harness.run import model_set
from harness.run.model_set import ModelSet
from tests.strangers.stored_forms import SMALL
from tests.support import small_models
from tests.support.bad_models import BAD, write_bad
from tests.support.builders import case, machine

CONFIGS = {
    "llama": {**SMALL, "hidden_size": 256, "intermediate_size": 512},
    "gpt2": {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 256, "n_layer": 1, "n_head": 4},
    "odd": {**SMALL, "intermediate_size": 300},
    "chatglm": {
        "model_type": "chatglm", "architectures": ["ChatGLMModel"], "hidden_size": 256, "inner_hidden_size": 512, "num_layers": 1,
        "num_attention_heads": 4, "vocab_size": 512, "max_sequence_length": 2048, "position_encoding_2d": True, "bos_token_id": 510,
        "eos_token_id": 511, "mask_token_id": 508, "gmask_token_id": 509, "pad_token_id": 3, "layernorm_epsilon": 1e-5,
    },
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Configs without weights, a cache of one's own, and packages as if they were here."""
    monkeypatch.setenv("FITMATRIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(model_set, "lacking", lambda _: ())
    for name, config in CONFIGS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "precision", "stored"),
    [
        ("llama", "gptq-int4", "gptq 4-bit, groups of 128"),
        ("llama", "gptq-int8", "gptq 8-bit, groups of 128"),
        ("llama", "awq-int4", "awq 4-bit, groups of 128"),
        ("chatglm", "chatglm-int4", "chatglm 4-bit"),
        ("chatglm", "chatglm-int8", "chatglm 8-bit"),
    ],
)
def test_a_model_is_written_in_the_form_that_a_precision_reads(name: str, precision: str, stored: str, folder: Path) -> None:
    models = ModelSet([str(folder / name)], synthetic=True, trust=False)
    files = models.files_of(name, precision)
    models.fetch([name, files], lambda _: None)
    spec = models.spec(files)
    assert (spec.name, spec.stored_as, models.form_of(files)) == (name, stored, PRECISIONS[precision].requires_checkpoint)
    assert models.spec(name).stored_as is None
    assert models.fingerprint(name) != models.fingerprint(files)
    planned = Planner(models.spec(name), machine(), here=False).plan(case(precision))
    written = Planner(spec, machine(), here=False).plan(case(precision))
    assert (planned.verdict, written.verdict) == (Verdict.UNAVAILABLE, Verdict.FITS)
    assert planned.estimate is not None
    assert written.estimate is not None
    assert planned.estimate.tiers["cpu"].weights_bytes == pytest.approx(written.estimate.tiers["cpu"].weights_bytes, rel=0.005)


@pytest.mark.parametrize(
    ("name", "said"), [("gpt2", "how it packs Conv1D is not known here"), ("odd", "300 x 128, does not fill whole words or groups")]
)
def test_what_cannot_be_written_so_is_told_and_the_rest_runs(name: str, said: str, folder: Path) -> None:
    models = ModelSet([str(folder / name)], synthetic=True, trust=False)
    files = models.files_of(name, "awq-int4")
    models.fetch([name, files], lambda _: None)
    assert models.fetched(name)
    assert not models.fetched(files)
    assert said in models.faults[files]
    assert f"{name} cannot be written for --precision awq-int4: " in models.faults[files]


def test_files_are_the_model_s_own_where_no_form_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synthetic = ModelSet([str(folder / "llama")], synthetic=True, trust=False)
    assert synthetic.files_of("llama", "bf16") == "llama"
    assert synthetic.files_of("llama", "mxfp4") == "llama"  # of GPT-OSS alone
    assert synthetic.files_of("llama", "chatglm-int4") == "llama"
    monkeypatch.setattr(model_set, "lacking", lambda needs: needs)
    assert synthetic.files_of("llama", "gptq-int8") == "llama"  # nothing is written that cannot be loaded


def test_a_form_that_a_model_has_not_is_refused(folder: Path) -> None:
    source = resolve.resolve(str(folder / "llama"), weights=False)
    with pytest.raises(UsageError, match="llama has no MXFP4 form: drop --precision mxfp4"):
        synth.describe(source, precision="mxfp4")
    assert synth.form_of(source, PRECISIONS["bf16"]) is None


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small model that is whole, in the current directory."""
    monkeypatch.chdir(tmp_path)
    small_models.save("llama", tmp_path / "good")
    return tmp_path / "good"


def test_bad_models_of_every_kind_hold_up_none_of_the_others(good: Path) -> None:
    """In whatever order: what cannot be found, what cannot be read, what does not generate."""
    named = write_bad(good.parent, good)
    models = ModelSet([*named[:3], "./good", *named[3:]], synthetic=False, trust=False)
    models.fetch(list(models.sources), models.spec)
    assert list(models.sources) == [*list(BAD)[:3], "good", *list(BAD)[3:]]
    assert models.fetched("good")
    assert models.faults.keys() == BAD.keys()
    assert {name: bad.said in models.faults[name] for name, bad in BAD.items()} == dict.fromkeys(BAD, True)


def test_if_no_model_is_left_the_last_fault_is_raised(good: Path) -> None:
    named = write_bad(good.parent, good)
    with pytest.raises(UsageError, match=r"no directory '\./missing'"):
        ModelSet([*named[1:2], named[0]], synthetic=False, trust=False)
    models = ModelSet([named[0], "./cut"], synthetic=False, trust=False)
    with pytest.raises(CheckpointError, match="download it again"):
        models.fetch(["missing", "cut"], models.spec)


@pytest.mark.usefixtures("good")
def test_what_is_not_found_must_not_be_called_as_a_good_model_is() -> None:
    with pytest.raises(UsageError, match=r"two models are called 'good': .*; rename"):
        ModelSet(["./good", "./elsewhere/good/"], synthetic=False, trust=False)
