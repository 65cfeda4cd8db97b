"""What one architecture does and others do not: each rule of ours beside what the libraries do with a small model of it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes.nn.modules
import pytest
import torch
import transformers
from msgspec.structs import replace
from transformers import AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from harness.architecture import model_spec
from harness.catalog import resolve
from harness.core.placements import PLACEMENTS
from harness.core.precisions import PRECISIONS
from harness.core.quantizers import SCHEMES
from harness.core.records import Verdict
from harness.machine import probe
from harness.measure import verify
from harness.measure.protocol import Generate, Load
from harness.planning import planner
from harness.planning.code import greedy, loading_code
from harness.planning.verdict import Judge
from harness.worker import model as work
from harness.worker import quality_probe
from harness.worker.build_skeleton import build_skeleton
from tests.strangers import architectures
from tests.support import small_models, strangers
from tests.support.builders import case, machine

CONTEXT = 40

# Positions

# How the configs of architectures name the most tokens; those above look positions up, those below compute them.
LOOKED_UP = [
    ("gpt2", "n_positions"), ("gpt_bigcode", "n_positions"), ("gpt_neo", "max_position_embeddings"), ("codegen", "n_positions"),
    ("gptj", "n_positions"), ("opt", "max_position_embeddings"), ("biogpt", "max_position_embeddings"),
]  # fmt: skip
COMPUTED = [
    ("llama", "max_position_embeddings"), ("gpt_neox", "max_position_embeddings"), ("phi", "max_position_embeddings"),
    ("xglm", "max_position_embeddings"), ("mistral", "max_position_embeddings"), ("bloom", "seq_length"),
    ("falcon", "max_position_embeddings"), ("stablelm", "max_position_embeddings"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "setting"), [*LOOKED_UP, *COMPUTED])
def test_what_looks_positions_up_is_what_fails_beyond_them(name: str, setting: str) -> None:
    config = architectures.config_of(name, **{setting: CONTEXT})
    skeleton = build_skeleton({**config.to_dict(), "architectures": None})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(CONTEXT + 3)[None] % 99 + 3
    with torch.no_grad():
        model(ids[:, :CONTEXT])
        try:
            model(ids)
        except (IndexError, RuntimeError):
            fails = True
        else:
            fails = False
    assert skeleton.looks_up_positions(CONTEXT) is fails
    assert fails is ((name, setting) in LOOKED_UP)


def planned(folder: Path, precision: str, **load: Any) -> tuple[Verdict, str | None]:
    spec = model_spec.read_spec(resolve.resolve(str(folder)))
    found = planner.Planner(spec, machine(), here=True).plan(case(precision, **load))
    return found.verdict, found.why


def test_more_tokens_than_positions_are_told_by_the_plan(tmp_path: Path) -> None:
    folder = architectures.save("short context", tmp_path / "short")
    assert planned(folder, "bf16", prompt_tokens=40, new_tokens=8)[0] is Verdict.FITS
    verdict, why = planned(folder, "bf16", prompt_tokens=41, new_tokens=8)
    assert verdict is Verdict.INVALID
    assert why is not None
    assert "has a context of 48 tokens and no positions beyond, and 49 tokens are asked for (41 in, 8 out)" in why


# Quantizers


def test_int8_of_latent_attention_is_refused_on_processors(tmp_path: Path) -> None:
    """Until bitsandbytes multiplies rows of heads there as well, which ends this test."""
    for name in ("deepseek_v2", "deepseek_v3"):
        folder = architectures.save(name, tmp_path / name)
        with pytest.raises(RuntimeError, match="must match the size"):
            work.generate(load(folder, "int8"), Generate(phase="cold", prompt_tokens=64, new_tokens=2, batch=1, times=1))
        verdict, why = planned(folder, "int8")
        assert verdict is Verdict.INVALID
        assert "has rows for each head: take another precision" in str(why)
        assert planned(folder, "int4")[0] is Verdict.FITS


def test_int8_of_what_has_no_linear_of_torch_is_refused(tmp_path: Path) -> None:
    folder = architectures.save("falcon", tmp_path / "falcon")
    real = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map={"": "cpu"}
    )
    assert not any(isinstance(part, bitsandbytes.nn.modules.Linear8bitLt) for part in real.modules())
    assert planned(folder, "int8") == (
        Verdict.INVALID,
        "bitsandbytes packs torch's own Linear, and FalconForCausalLM has none beside its head: all would stay as it is",
    )
    assert planned(folder, "torchao-int8")[0] is not Verdict.INVALID


@pytest.mark.skipif(not probe.probe().avx512_bf16, reason="the processor has no AVX512_BF16")
@pytest.mark.parametrize(
    ("name", "sizes", "runs"),
    [
        ("llama", {"hidden_size": 128, "intermediate_size": 192}, True),
        ("llama", {"hidden_size": 128, "intermediate_size": 176}, False),  # outputs
        (
            "llama",
            {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 4},
            False,
        ),  # inputs
        ("gpt2", {"n_embd": 64, "n_head": 4}, True),
        ("gpt2", {"n_embd": 48, "n_head": 4}, False),
        ("falcon_mamba", {}, False),
    ],
)
def test_sides_that_the_fused_product_of_4_bits_does_not_take_are_refused(
    name: str, sizes: dict[str, Any], runs: bool, tmp_path: Path
) -> None:
    """Until bitsandbytes pads them or unpacks such weights, which ends this test."""
    config = architectures.config_of(name, **sizes)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    request = Generate(phase="cold", prompt_tokens=8, new_tokens=2, batch=1, times=1)
    with contextlib.nullcontext() if runs else pytest.raises((AssertionError, RuntimeError)):
        work.generate(load(tmp_path, "int4", tokenizer=False), request)
    skeleton = build_skeleton(json.loads((tmp_path / "config.json").read_text()))
    spec = SimpleNamespace(skeleton=skeleton)
    fuses = replace(machine(), avx512_bf16=True)
    judge: Any = Judge(spec=spec, machine=fuses, here=True, trust=False)  # type: ignore[arg-type]
    why = judge._unpackable(SCHEMES["int4"])
    assert (why is None) is runs
    assert runs or "bitsandbytes multiplies 4 bits on this processor by 32 outputs and 64 inputs, and " in why
    judge = Judge(spec=spec, machine=replace(fuses, avx512_bf16=False), here=True, trust=False)  # type: ignore[arg-type]
    assert judge._unpackable(SCHEMES["int4"]) is None


def load(folder: Path, precision: str, *, tokenizer: bool = True) -> work.Model:
    row = PRECISIONS[precision]
    code = loading_code(row, PLACEMENTS["cpu"], row.dtype)
    loaded, _ = work.load(Load(model=str(folder), code=code, tokenizer=tokenizer), lambda _: contextlib.nullcontext())
    return loaded


def test_what_takes_the_weight_out_of_a_packed_linear_is_refused(tmp_path: Path) -> None:
    """Until its class calls the Linear, which ends this test."""
    folder = architectures.save("mamba", tmp_path / "mamba")
    with pytest.raises(RuntimeError):
        work.generate(load(folder, "int8"), Generate(phase="cold", prompt_tokens=8, new_tokens=2, batch=1, times=1))
    said = "MambaForCausalLM multiplies by the weight of dt_proj itself, which bitsandbytes packs"
    assert planned(folder, "int8") == planned(folder, "int4") == (Verdict.INVALID, said)


def test_a_router_says_nothing_of_a_quantizer_that_passes_over_it(tmp_path: Path) -> None:
    folder = architectures.save("phimoe", tmp_path / "phimoe")
    assert set(work.loaded_facts(load(folder, "int8")).linear_dtype_bytes) == {"int8"}
    assert set(work.loaded_facts(load(folder, "bf16")).linear_dtype_bytes) == {"bfloat16"}


# Tokens and templates that do not belong to the model


@pytest.mark.parametrize(
    ("tokenizer_pad", "ends", "pad"),
    [(None, 50256, 0), (None, [50256, 9], 9), (3, 50256, 3), (96, None, 0), (None, "</s>", 0), (-1, -1, 0)],
)
def test_a_batch_is_padded_with_what_the_model_has(tokenizer_pad: int | None, ends: Any, pad: int) -> None:
    module = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=ends))
    model: Any = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=tokenizer_pad), module=module, vocabulary=96)
    assert work.pad_id(model) == pad


@pytest.mark.parametrize("pad", [None, "[PAD]"])
def test_questions_are_asked_whatever_a_tokenizer_pads_with(tmp_path: Path, pad: str | None) -> None:
    """GPT-2 has no such token; people add one to the tokenizer, and the model has no row for it."""
    folder = strangers.save_llama(tmp_path / "model")
    small_models.write_letters(folder, strangers.SIZES["vocab_size"])
    if pad is not None:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"pad_token": pad})
        assert tokenizer.pad_token_id >= strangers.SIZES["vocab_size"]
        tokenizer.save_pretrained(folder)
    strangers.change(folder / "generation_config.json", {"eos_token_id": 50256})
    model = load(folder, "bf16")
    batch = quality_probe.encode_text(model, ["The sun", "A"])
    assert batch["attention_mask"].tolist() == [[1] * 7, [0] * 6 + [1]]
    assert quality_probe._continue(model, ["The sun", "A"], 2, ())[1][0]


SAID = [{"role": "user", "content": "What is 2 + 2?"}]


class Templated:
    """A tokenizer with a template, and nothing else."""

    def __init__(self, template: str) -> None:
        self.template = template

    def apply_chat_template(self, said: list[dict[str, Any]], **_: Any) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        done: Any = render_jinja_template([said], chat_template=self.template, add_generation_prompt=True)
        return str(done[0][0])


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}<{{ m.content }}>{% endfor %}", "<What is 2 + 2?>"),
        ("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}", "What is 2 + 2?"),
        (
            "{% if messages[0].content is string %}{{ raise_exception('lists') }}{% endif %}{{ messages[0].content[0].text }}",
            "What is 2 + 2?",
        ),
        ("{{ messages[0].content | upper }}", "WHAT IS 2 + 2?"),
        ("{{ messages[0].content | tojson }}", '"What is 2 + 2?"'),
    ],
)  # fmt: skip
def test_a_template_gets_what_it_wants(template: str, text: str) -> None:
    assert quality_probe.in_template(Templated(template), SAID) == text


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("", "leaves out what is said"),
        ("{# nothing #}", "leaves out what is said"),
        ("Hello, I am a model.", "leaves out what is said"),
        ("{{ raise_exception('roles must alternate') }}", "fails: roles must alternate"),
        ("{{ messages[7].content.parts }}", "fails: .*undefined|fails: .*has no element 7"),
        ("{% for m in messages %}", "fails: Unexpected end of template"),
    ],
)
def test_a_template_that_loses_what_is_said_is_told(template: str, fault: str) -> None:
    with pytest.raises(work.ModelFault, match=f"the chat template of the tokenizer ({fault}).*take the template that belongs"):
        quality_probe.in_template(Templated(template), SAID)


# Generation


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"prompt_lookup_num_tokens": 3},
        {"max_time": 1e-9},
        {"return_dict_in_generate": True, "output_scores": True},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"eos_token_id": [0, 5, 9]},
        {"eos_token_id": 50256, "pad_token_id": 50256, "bos_token_id": 50256},
        {"suppress_tokens": [1, 2], "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"max_length": 4, "min_length": 2, "forced_eos_token_id": 3},
        {"stop_strings": ["a"], "dola_layers": "high", "guidance_scale": 2.0},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_a_case_and_its_printed_code_write_the_same_whatever_the_model_asks_for(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = strangers.save_llama(tmp_path / "model")
    plain = {"eos_token_id": 95}
    (folder / "generation_config.json").write_text(json.dumps(plain), encoding="utf-8")
    request = Generate(phase="warm", prompt_tokens=8, new_tokens=6, batch=1, times=1)
    small_models.write_letters(folder, strangers.SIZES["vocab_size"])
    wanted = work.generate(load(folder, "bf16"), request)["text"]
    (folder / "generation_config.json").write_text(json.dumps({**plain, **settings}), encoding="utf-8")
    model = load(folder, "bf16")
    assert work.generate(model, request)["text"] == wanted
    fresh: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    exec(greedy(), {"model": fresh, "GenerationConfig": GenerationConfig})
    ids = torch.tensor([model.prompt(8)])
    output = fresh.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=6, max_new_tokens=6, pad_token_id=0)
    assert model.tokenizer.decode(output[0, 8:], skip_special_tokens=True) == wanted


# Linear modules of a class of their own


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_torch_s_own_attention_is_left_alone_by_its_class(precision: str, tmp_path: Path) -> None:
    """Of SigLIP's head, in Gemma 3: what it projects by is derived from Linear, which quantizers go by."""
    folder = architectures.save("gemma3", tmp_path / "gemma")
    spec = model_spec.read_spec(resolve.resolve(str(folder)))
    plan = planner.Planner(spec, machine(), here=True).plan(case(precision, prompt_tokens=3, new_tokens=2))
    assert plan.verdict is Verdict.FITS, plan.why
    assert plan.code is not None
    model = work.load(Load(model=str(folder), code=plan.code, tokenizer=False), lambda _: contextlib.nullcontext())[0]
    kinds = {type(part).__name__ for part in model.module.modules()}
    assert "NonDynamicallyQuantizableLinear" in kinds
    assert set(verify.checks(plan, work.loaded_facts(model)).values()) == {verify.OK}
    assert plan.estimate is not None
    assert sum(tier.weights_bytes for tier in plan.estimate.tiers.values()) == small_models.held_bytes(model.module)
