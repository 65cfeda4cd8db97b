"""ChatGLM's tokenizers, over small sentencepiece models: one has the special pieces of ChatGLM-6B, one ChatGLM2's plain ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

import harness.models
from harness.measure import dialogue, quality

TEXT = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs", "你好，世界", "今天天气很好"]
SPECIAL = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
BLANKS = ["<n>", "<|tab|>", *(f"<|blank_{count}|>" for count in range(2, 81))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chatglm")
    (folder / "corpus").write_text("\n".join(TEXT * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.Train(
        input=str(folder / "corpus"), model_prefix=str(folder / "ice_text"), vocab_size=240, pad_id=3, bos_id=-1, eos_id=1,
        unk_id=0, user_defined_symbols=[*SPECIAL, *BLANKS], hard_vocab_limit=False, minloglevel=2, remove_extra_whitespaces=False,
        normalization_rule_name="identity",
    )  # fmt: skip
    config = {"model_type": "chatglm", "hidden_size": 64, "num_attention_heads": 4, "num_layers": 2, "inner_hidden_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    remote = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ChatGLMTokenizer", "auto_map": remote}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def test_it_is_ours_and_asks_for_an_answer(tokenizer: Any) -> None:
    assert type(tokenizer) is harness.models.ChatGLMTokenizer
    ids = tokenizer("the quick fox")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids[-2:]) == ["[gMASK]", "<sop>"]
    pair = tokenizer("the fox", "the dog")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(pair[-1:]) == ["<eop>"]


@pytest.mark.parametrize("text", ["the quick fox", "你好，世界", "a\nb", "a\tb", "a     b", "fox\n\n  dog", "x" + " " * 80 + "y"])
def test_text_comes_back_as_it_was(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_line_ends_and_blanks_are_pieces(tokenizer: Any) -> None:
    assert "<n>" in tokenizer.tokenize("a\nb")
    assert "<|blank_5|>" in tokenizer.tokenize("a     b")


def test_padding_stands_on_the_left(tokenizer: Any) -> None:
    both = tokenizer(["fox", "the quick brown fox"], padding=True)
    assert both["input_ids"][0][0] == tokenizer.pad_token_id
    assert both["attention_mask"][0][0] == 0
    assert [row[-1] for row in both["input_ids"]] == [tokenizer.bos_token_id] * 2


def test_the_first_release_begins_after_the_images(folder: Path, tokenizer: Any) -> None:
    first = AutoTokenizer.from_pretrained(folder, num_image_tokens=20000)
    ids = first("the fox\n")["input_ids"]
    assert ids == [index + 20000 for index in tokenizer("the fox\n")["input_ids"]]
    assert first.decode(ids, skip_special_tokens=True) == "the fox\n"


def test_it_is_saved_and_loaded_again(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("the fox  jumps")["input_ids"] == tokenizer("the fox  jumps")["input_ids"]


# ChatGLM2 and ChatGLM3, whose files name the same class


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("chatglm3")
    (folder / "corpus").write_text("\n".join(TEXT * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.Train(
        input=str(folder / "corpus"), model_prefix=str(folder / "tokenizer"), vocab_size=320, pad_id=-1, bos_id=1, eos_id=2,
        unk_id=0, model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2, remove_extra_whitespaces=False,
        normalization_rule_name="identity",
    )  # fmt: skip
    config = {
        "model_type": "chatglm", "hidden_size": 64, "num_attention_heads": 4, "num_layers": 2, "ffn_hidden_size": 96,
        "kv_channels": 16, "multi_query_group_num": 2, "padded_vocab_size": 400, "seq_length": 128, "add_qkv_bias": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    remote = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ChatGLMTokenizer", "auto_map": remote}))
    return AutoTokenizer.from_pretrained(folder)


def test_the_same_name_loads_chatglm2_by_its_files(plain: Any) -> None:
    assert type(plain) is harness.models.ChatGLM2Tokenizer
    size = plain.sp_model.get_piece_size()
    assert plain.convert_tokens_to_ids(["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]) == list(range(size, size + 5))
    assert plain.convert_tokens_to_ids("<|observation|>") == size + 8
    ids = plain("the quick fox")["input_ids"]
    assert plain.convert_ids_to_tokens(ids[:2]) == ["[gMASK]", "sop"]
    assert ids[2:] == plain.sp_model.encode("the quick fox")
    assert plain("fox", "dog")["input_ids"][-1] == plain.eos_token_id == 2


@pytest.mark.parametrize("text", ["the quick fox", "你好，世界", "a\nb", "猫"])
def test_its_text_comes_back(plain: Any, text: str) -> None:
    assert plain.decode(plain(text)["input_ids"], skip_special_tokens=True).strip() == text


def test_both_are_asked_as_they_were_taught(plain: Any) -> None:
    """A question of ChatGLM2 is its first round; one of ChatGLM3 the pieces of a line end, then of the question, between roles."""
    question, vocabulary = quality.PROBE.questions[0], plain.get_vocab()
    second, third = (dialogue.choose(name, vocabulary) for name in ("THUDM/chatglm2-6b", "chatglm3-6b"))
    assert second is not None
    assert second.ask(question) == f"[Round 1]\n\n问：{question.prompt}\n\n答："
    assert third is not None
    role = plain.convert_tokens_to_ids(["[gMASK]", "sop", "<|user|>", "<|assistant|>"])
    pieces = [plain.sp_model.encode(text) for text in ("\n", question.prompt)]
    assert plain(third.ask(question))["input_ids"] == [*role[:3], *pieces[0], *pieces[1], role[3]]
    assert plain.convert_tokens_to_ids(list(third.ends)) == [role[2], plain.convert_tokens_to_ids("<|observation|>")]
    assert dialogue.choose("chatglm3-6b-base", vocabulary) is None
