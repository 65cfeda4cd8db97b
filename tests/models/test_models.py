"""Our own architectures agree with the published ones: fixtures made once with the reference code, on the CPU in float32."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GlmConfig, GlmForCausalLM

import harness.models
from harness.measure.protocol import Generate, Score
from harness.models.cache_argument import CACHE, kv_cache_of
from harness.models.chatglm import ChatGLMForCausalLM, anchors, positions
from harness.models.packed import GroupScaledLinear, RowScaledLinear
from harness.worker import model as work
from harness.worker import quality_probe

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CHATGLM, INT4, MOSS = GOLDEN / "chatglm_l2_h64", GOLDEN / "chatglm_l2_h64_int4", GOLDEN / "moss_tiny"
NEAR = 1e-5

Arrays = Mapping[str, NDArray[Any]]


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


def golden(folder: Path) -> Arrays:
    with np.load(folder / "golden.npz") as arrays:
        return dict(arrays)


def load(folder: Path, **arguments: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32} | arguments).eval()


def ids(array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(array)


def distance(ours: torch.Tensor, theirs: NDArray[Any]) -> float:
    assert ours.shape == theirs.shape
    return float((ours - torch.from_numpy(theirs)).abs().max())


@pytest.fixture(scope="module")
def chatglm() -> Any:
    return load(CHATGLM)


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    return golden(CHATGLM)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_chatglm_agrees_layer_by_layer(attention: str, arrays: Arrays) -> None:
    model = load(CHATGLM, attn_implementation=attention)
    assert type(model) is ChatGLMForCausalLM
    output = model(ids(arrays["input_ids"]), output_hidden_states=True, use_cache=True)
    assert distance(output.logits, arrays["logits"]) < NEAR
    for layer, hidden in enumerate(output.hidden_states):
        assert distance(hidden, arrays[f"hidden_{layer}"]) < NEAR
    for layer, kept in enumerate(kv_cache_of(output).layers):
        assert distance(kept.keys, arrays[f"past_k_{layer}"]) < NEAR
        assert distance(kept.values, arrays[f"past_v_{layer}"]) < NEAR


def test_chatglm_attends_as_the_reference(arrays: Arrays) -> None:
    output = load(CHATGLM, attn_implementation="eager")(ids(arrays["input_ids"]), output_attentions=True)
    for layer, weights in enumerate(output.attentions):
        assert distance(weights, arrays[f"attn_{layer}"]) < NEAR
        assert not weights[0, 0][torch.from_numpy(arrays["attention_mask_bool_masked"][0, 0])].any()


def test_chatglm_fills_a_mask_in_the_middle(chatglm: Any, arrays: Arrays) -> None:
    assert distance(chatglm(ids(arrays["mask_input_ids"])).logits, arrays["mask_logits"]) < NEAR


def test_chatglm_pads_on_the_left(chatglm: Any, arrays: Arrays) -> None:
    prompts = ids(arrays["batch_input_ids"])
    visible = (prompts != chatglm.config.pad_token_id).long()
    logits = chatglm(prompts, attention_mask=visible).logits
    assert torch.isfinite(logits).all()
    assert distance(logits[visible.bool()], arrays["batch_logits"][visible.bool().numpy()]) < NEAR


@pytest.mark.parametrize("batch", ["", "batch_"])
def test_chatglm_places_tokens_as_the_reference(chatglm: Any, arrays: Arrays, batch: str) -> None:
    prompts = ids(arrays[f"{batch}input_ids"])
    visible = (prompts != chatglm.config.pad_token_id).long()
    padding = visible.argmax(dim=1)
    tokens = torch.arange(prompts.shape[1]) - padding[:, None]
    found = positions(anchors(chatglm.config, prompts, visible), tokens)
    assert torch.equal(found, ids(arrays[f"{batch}position_ids"]))
    given = chatglm(prompts, attention_mask=visible, position_ids=found).logits
    assert torch.equal(given, chatglm(prompts, attention_mask=visible).logits)


def test_chatglm_decodes_from_its_cache_without_being_given_positions(chatglm: Any, arrays: Arrays) -> None:
    output = chatglm(ids(arrays["input_ids"])[:, :9], use_cache=True)
    steps = []
    for _ in range(8):
        steps.append(output.logits[:, -1])
        output = chatglm(steps[-1].argmax(-1)[:, None], **{CACHE: kv_cache_of(output)}, use_cache=True)
    assert distance(torch.stack(steps, dim=1), arrays["decode_logits"]) < NEAR


@pytest.mark.parametrize("cached", [True, False])
def test_chatglm_generates_the_same_tokens(chatglm: Any, arrays: Arrays, cached: bool) -> None:
    prompt = ids(arrays["input_ids"])[:, :9]
    made = chatglm.generate(prompt, max_length=17, do_sample=False, use_cache=cached)
    assert made.tolist() == arrays["generate_ids"].tolist()


def test_chatglm_generates_for_a_padded_row_as_for_that_row_alone(chatglm: Any, arrays: Arrays) -> None:
    prompts = ids(arrays["batch_input_ids"])
    visible = (prompts != chatglm.config.pad_token_id).long()
    both = chatglm.generate(prompts, attention_mask=visible, max_length=16, do_sample=False)
    for row in range(2):
        alone = chatglm.generate(
            prompts[row : row + 1, int(visible[row].argmax()) :], max_new_tokens=7, max_length=None, do_sample=False
        )
        assert both[row, 9:].tolist() == alone[0, -7:].tolist()


def test_chatglm_searches_beams(chatglm: Any, arrays: Arrays) -> None:
    """Beams are reordered between steps, and every beam keeps its positions."""
    prompts = ids(arrays["batch_input_ids"])
    visible = (prompts != chatglm.config.pad_token_id).long()
    with_cache, without = (
        chatglm.generate(prompts, attention_mask=visible, max_length=14, num_beams=3, do_sample=False, use_cache=cached)
        for cached in (True, False)
    )
    assert with_cache.tolist() == without.tolist()


def test_chatglm_counts_on_through_the_answer_without_two_dimensions() -> None:
    config = AutoConfig.from_pretrained(CHATGLM, position_encoding_2d=False)
    gmask, mask, begin = config.gmask_token_id, config.mask_token_id, config.bos_token_id
    rows = torch.tensor([[5, 6, gmask, begin, 7, 8], [5, mask, 6, begin, 7, 8]])
    first = positions(anchors(config, rows, None), torch.arange(6).expand(2, 6))[:, 0]
    assert first.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 1, 1, 1]]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    cached = model.generate(rows, max_length=12, do_sample=False)
    assert cached.tolist() == model.generate(rows, max_length=12, do_sample=False, use_cache=False).tolist()


def test_chatglm_says_what_a_prompt_lacks(chatglm: Any) -> None:
    with pytest.raises(ValueError, match=r"needs \[gMASK\] or \[MASK\].*append \[120, 123\]"):
        chatglm(torch.tensor([[5, 6, 7]]))


def test_chatglm_reads_its_own_int4_format() -> None:
    arrays, model = golden(INT4), load(INT4)
    layer = model.transformer.layers[1].mlp.dense_4h_to_h
    assert isinstance(layer, RowScaledLinear)
    assert layer.weight.dtype == torch.int8
    assert layer.weight.shape == (64, 128)
    assert distance(model(ids(arrays["input_ids"])).logits, arrays["logits"]) < NEAR


def test_chatglm_reads_its_own_int8_format(tmp_path: Path, arrays: Arrays) -> None:
    """Written here by the published rule: a scale a row, the largest weight at 127."""
    tensors, packed = load_file(CHATGLM / "model.safetensors"), {}
    for name, tensor in tensors.items():
        if name.endswith((".dense.weight", ".query_key_value.weight", ".dense_h_to_4h.weight", ".dense_4h_to_h.weight")):
            scale = tensor.abs().amax(dim=1) / 127
            packed[f"{name}_scale"] = scale.half()
            packed[name] = torch.round(tensor / scale[:, None]).to(torch.int8)
        else:
            packed[name] = tensor
    save_file(packed, tmp_path / "model.safetensors")
    config = json.loads((CHATGLM / "config.json").read_text()) | {"quantization_bit": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    logits = load(tmp_path)(ids(arrays["input_ids"])).logits
    assert 1e-6 < distance(logits, arrays["logits"]) < 0.05


def test_chatglm_of_the_first_release_has_tokens_of_images(tmp_path: Path) -> None:
    """The first files have 20,000 more rows; their config names no masks, and the ids are the class's defaults."""
    config = {"model_type": "chatglm", "hidden_size": 64, "inner_hidden_size": 128, "num_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = AutoConfig.from_pretrained(tmp_path)
    assert read.vocab_size == 150528
    assert (read.mask_token_id, read.gmask_token_id, read.bos_token_id, read.eos_token_id) == (150000, 150001, 150004, 150005)


def test_chatglm_loads_published_shards_of_mixed_dtypes(tmp_path: Path, arrays: Arrays) -> None:
    """As published: .bin, several shards, float16 with float32 norms, rotary buffers, no word of AutoModelForCausalLM."""
    tensors = load_file(CHATGLM / "model.safetensors")
    half = {name: tensor if "layernorm" in name else tensor.half() for name, tensor in tensors.items()}
    names = sorted(half)
    index: dict[str, Any] = {"metadata": {"total_size": 1}, "weight_map": {}}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: half[name] for name in part}, tmp_path / file)
        index["weight_map"] |= dict.fromkeys(part, file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    config = json.loads((CHATGLM / "config.json").read_text())
    remote = {"AutoConfig": "configuration_chatglm.ChatGLMConfig", "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"}
    config |= {"architectures": ["ChatGLMModel"], "auto_map": remote, "torch_dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load(tmp_path, dtype="auto", device_map={"": "cpu"})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    logits = model.float()(ids(arrays["input_ids"])).logits
    assert 0 < distance(logits, arrays["logits"]) < 0.05
    assert type(AutoModel.from_pretrained(tmp_path)) is harness.models.ChatGLMModel


def test_chatglm2_is_glm_under_other_names(tmp_path: Path) -> None:
    ours = GlmConfig(
        vocab_size=128, intermediate_size=96, num_hidden_layers=2, num_key_value_heads=2, rms_norm_eps=1e-5, pad_token_id=0,
        eos_token_id=2, max_position_embeddings=64, hidden_size=64, num_attention_heads=4, head_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    glm = GlmForCausalLM(ours).eval()
    save_file(as_published(glm.state_dict()), tmp_path / "model.safetensors")
    published = {
        "model_type": "chatglm", "architectures": ["ChatGLMModel"], "padded_vocab_size": 128,
        "ffn_hidden_size": 96, "num_layers": 2,
        "multi_query_attention": True, "multi_query_group_num": 2, "kv_channels": 16, "seq_length": 64, "layernorm_epsilon": 1e-5,
        "rmsnorm": True, "original_rope": True, "add_bias_linear": False, "add_qkv_bias": True, "tie_word_embeddings": False,
        "eos_token_id": 2, "pad_token_id": 0, "hidden_size": 64, "num_attention_heads": 4, "torch_dtype": "float16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(published))
    model, report = load_with_report(tmp_path)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    prompt = torch.arange(3, 20)[None]
    assert torch.equal(model(prompt).logits, glm(prompt).logits)
    base, report = load_with_report(tmp_path, AutoModel)
    assert type(base) is harness.models.ChatGLM2Model
    assert not report["missing_keys"]
    assert torch.equal(base(prompt).last_hidden_state, glm.model(prompt).last_hidden_state)
    with pytest.raises(ValueError, match="add_bias_linear is true"):
        harness.models.ChatGLM2Config.from_published(published | {"add_bias_linear": True})
    with pytest.raises(ValueError, match="quantization_bit is 4: ChatGLM2's own integer files are not supported"):
        harness.models.ChatGLM2Config.from_published(published | {"quantization_bit": 4})


def load_with_report(folder: Path, auto: Any = AutoModelForCausalLM) -> tuple[Any, dict[str, Any]]:
    loaded: Any = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return loaded[0].eval(), loaded[1]


def as_published(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the tensors of Glm to those of ChatGLM2, with query, key and value in one."""
    names = {
        "model.embed_tokens": "transformer.embedding.word_embeddings", "model.norm": "transformer.encoder.final_layernorm",
        "lm_head": "transformer.output_layer", "model.layers": "transformer.encoder.layers",
        "self_attn.o_proj": "self_attention.dense",        "gate_up_proj": "dense_h_to_4h", "down_proj": "dense_4h_to_h",
    }  # fmt: skip
    made: dict[str, torch.Tensor] = {"transformer.rotary_pos_emb.inv_freq": torch.ones(4)}
    for name, tensor in tensors.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        parts = (
            [tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")] if ".q_proj." in name else [tensor]
        )
        for theirs, published in names.items():
            name = name.replace(theirs, published)
        made[name.replace("self_attn.q_proj", "self_attention.query_key_value")] = torch.cat(parts)
    return made


def test_moss_agrees() -> None:
    arrays, model = golden(MOSS), load(MOSS)
    assert model.config.model_type == "moss"
    assert distance(model(ids(arrays["input_ids"])).logits, arrays["logits"]) < NEAR
    seen = arrays["pad_mask"].astype(bool)
    padded = model(ids(arrays["input_ids"]), attention_mask=ids(arrays["pad_mask"]), position_ids=ids(arrays["pad_position_ids"]))
    assert distance(padded.logits[torch.from_numpy(seen)], arrays["pad_logits"][seen]) < NEAR
    made = model.generate(ids(arrays["input_ids"])[:1], max_length=24, do_sample=False)
    assert made.tolist() == arrays["generate_ids"].tolist()


@pytest.mark.parametrize("bits", [4, 8])
def test_moss_unpacks_as_the_reference(bits: int) -> None:
    with np.load(MOSS / "gptq.npz") as found:
        given = {
            name.removeprefix(f"b{bits}_"): torch.from_numpy(found[name]) for name in found.files if name.startswith(f"b{bits}_")
        }
    layer = GroupScaledLinear(256, 64, bits, 128)
    layer.load_state_dict({name: given[name] for name in ("qweight", "qzeros", "scales", "g_idx", "bias")}, assign=True)
    layer = layer.float()
    assert distance((layer(torch.eye(256)) - layer.bias).T, given["dense_weight_fp32"].numpy()) < 1e-4
    assert distance(layer(given["x"]), given["y"].numpy()) < NEAR


def packed_moss(folder: Path, bits: int, group: int = 32, **config: Any) -> None:
    """Write a packed checkpoint as MOSS's are: one .bin without an index, qkv, out_proj, fc_in and fc_out packed."""
    made: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(MOSS / "model.safetensors").items():
        path = name.removesuffix(".weight")
        if not path.endswith(("qkv_proj", "out_proj", "fc_in", "fc_out")):
            made[name] = tensor
            continue
        columns = tensor.T.reshape(-1, group, tensor.shape[0])  # [groups, inputs of a group, outputs]
        scales = (columns.amax(1) - columns.amin(1)) / (2**bits - 1)
        zeros = torch.round(-columns.amin(1) / scales).clamp(1, 2**bits - 1)
        whole = torch.round(columns / scales[:, None] + zeros[:, None]).clamp(0, 2**bits - 1).flatten(0, 1)
        made |= {
            f"{path}.qweight": packed(whole.T, bits).T.contiguous(), f"{path}.qzeros": packed(zeros - 1, bits),
            f"{path}.scales": scales.half(), f"{path}.g_idx": torch.arange(tensor.shape[1], dtype=torch.int32) // group,
        }  # fmt: skip
    torch.save(made, folder / "pytorch_model.bin")
    published = json.loads((MOSS / "config.json").read_text()) | {"wbits": bits, "groupsize": group} | config
    (folder / "config.json").write_text(json.dumps(published))


def packed(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack unsigned numbers [rows, columns] along the columns into int32, the lowest bits first."""
    words = fields.to(torch.int64).unflatten(1, (-1, 32 // bits))
    joined = (words << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(joined >= 2**31, joined - 2**32, joined).to(torch.int32)


@pytest.mark.parametrize(("bits", "said", "near"), [(8, 8, 0.05), (8, 4, 0.05), (4, 4, 0.8), (4, 32, 0.8)])
def test_moss_loads_packed_files_whatever_their_config_says_of_bits(tmp_path: Path, bits: int, said: int, near: float) -> None:
    """One published repository says wbits 4 of weights that have 8."""
    packed_moss(tmp_path, bits, wbits=said)
    arrays, model = golden(MOSS), load(tmp_path)
    assert model.config.wbits == bits
    assert isinstance(model.transformer.h[1].mlp.fc_in, GroupScaledLinear)
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert 1e-6 < distance(model(ids(arrays["input_ids"])).logits, arrays["logits"]) < near
    base, report = load_with_report(tmp_path, AutoModel)  # in 2023 it loaded random weights that were not packed
    assert type(base) is harness.models.MossModel
    assert not report["missing_keys"]
    prompt = ids(arrays["input_ids"])
    assert torch.equal(base(prompt).last_hidden_state, model.transformer(prompt).last_hidden_state)


def test_models_are_saved_and_loaded_again(tmp_path: Path, arrays: Arrays) -> None:
    for folder in (CHATGLM, INT4, MOSS):
        before = load(folder)
        before.save_pretrained(tmp_path / folder.name)
        after = load(tmp_path / folder.name)
        prompt = ids(arrays["input_ids"])
        assert torch.equal(before(prompt).logits, after(prompt).logits)


@pytest.mark.parametrize("folder", [CHATGLM, MOSS])
def test_no_code_of_a_published_repository_runs(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    bad = "raise SystemExit('ran')"
    for name in ("configuration_chatglm.py", "modeling_chatglm.py", "tokenization_chatglm.py"):
        (tmp_path / "model" / name).write_text(bad)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_chatglm.C", "AutoModelForCausalLM": "modeling_chatglm.M"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert load(tmp_path / "model").config.model_type == config["model_type"]


def test_the_worker_asks_chatglm_as_it_wants_to_be_asked() -> None:
    """Prompts of token ids end in what asks for an answer, and a text is scored as an answer, which sees nothing that follows."""
    own = work.Model(load(CHATGLM), None)
    prompt = own.prompt(9)
    assert prompt[-2:] == [120, 123]
    assert not {120, 123} & set(prompt[:-2])
    done = work.generate(own, Generate(prompt_tokens=9, new_tokens=4, batch=2))
    assert (done["prompt_tokens"], done["new_tokens"], done["batch"]) == (9, 4, 2)
    assert quality_probe.score(own, Score())["finite"]
    changed = [5, 6, 7, 9]
    first, second = (quality_probe._log_probabilities(own, ids) for ids in ([5, 6, 7, 8], changed))
    assert torch.equal(first, second)
