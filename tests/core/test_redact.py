"""Results to publish: nobody's name, machine, folders or secrets, and every word that is none of these."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest

from harness.core import redact
from harness.core.records import Answer, Quality, Result, encode_record
from harness.core.redact import clean, clean_text
from tests.support import builders

TOKEN = "hf_" + "aBcDeFgHiJ" * 3


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # noqa: ARG001 tmp_path is made before all is changed
    """A user, a host, folders and secrets to look for."""
    for name in list(os.environ):
        monkeypatch.delenv(name)
    for name, value in {
        "USER": "marvin",
        "HOME": "/people/marvin",
        "HF_TOKEN": TOKEN,
        "DB_PASSWORD": "sesame",
        "PROJECT": "operation overlord 7",
        "LANG": "en_US.UTF-8",
        "TERM": "xterm-256color",
        "KIND": "transformers",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "gethostname", lambda: "deep-thought.galaxy.example")
    monkeypatch.setattr(tempfile, "tempdir", "/scratch/of-marvin/tmp")


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("cannot read /people/marvin/models/x", "cannot read ~/models/x"),
        ("/people/marvin", "~"),
        ("file:///people/marvin/x.", "file://~/x."),
        ("/people/marvin-2/x", "/people/<user>-2/x"),
        ("/home/zaphod/x and C:\\Users\\Zaphod\\x", "~/x and ~\\x"),
        ("/scratch/of-marvin/tmp/fitmatrix-1/offload", "<tmp>/fitmatrix-1/offload"),
        ("by marvin on deep-thought.galaxy.example", "by <user> on <host>"),
        ("deep-thought: marvin_x marvin's", "<host>: <user>_x <user>'s"),
        ("marvinism, Amarvin, deep-thoughts", "marvinism, Amarvin, deep-thoughts"),
        (f"token={TOKEN}", "token=<$HF_TOKEN>"),
        ("another hf_ZyXwVuTsRqPoNmLk", "another <token>"),
        ("sesame, open", "<$DB_PASSWORD>, open"),
        ("operation overlord 7 begins", "<$PROJECT> begins"),
        ("https://me:secret@example.org/x", "https://<token>@example.org/x"),
        ("Authorization: Bearer abcdefghijkl", "Authorization: Bearer <token>"),
        ("ghp_0123456789abcdefABCD AKIAIOSFODNN7EXAMPLE", "<token> <token>"),
        # What is everybody's stays.
        ("xterm-256color en_US.UTF-8 transformers", "xterm-256color en_US.UTF-8 transformers"),
        ("hf_hub_download hf_quantizer sk-learn eyJ", "hf_hub_download hf_quantizer sk-learn eyJ"),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", "CUDA out of memory. Tried to allocate 2.00 GiB"),
        ('File "/usr/lib/python3.11/json/decoder.py", line 1', 'File "/usr/lib/python3.11/json/decoder.py", line 1'),
        ("/tmp/x and /dev/shm", "/tmp/x and /dev/shm"),
    ],
)
def test_what_is_private_is_replaced_by_what_it_was(text: str, cleaned: str) -> None:
    assert clean_text(text) == cleaned
    assert clean_text(cleaned) == cleaned


@pytest.mark.parametrize("user", ["root", "user", "test", "max", "me", "a", "torch", "Model", ""])
def test_a_name_that_is_half_the_worlds_is_left(monkeypatch: pytest.MonkeyPatch, user: str) -> None:
    monkeypatch.setenv("USER", user)
    monkeypatch.setenv("HOME", f"/people/{user}")
    monkeypatch.setattr(socket, "gethostname", lambda: user)
    text = f"root user test max_memory me a torch.nn model Model; {user} layers"
    assert clean_text(text) == text


def test_a_short_name_is_no_part_of_an_identifier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "zaph")
    assert clean_text("load_in_4zaph n_zaph zaph") == "load_in_4zaph n_zaph <user>"


@pytest.mark.parametrize("cut", [1, 8, 20])
def test_a_secret_that_was_cut_short_is_found(cut: int) -> None:
    words = "x" * 600
    assert clean_text(f"{words} {TOKEN[:-cut]}") == f"{words} <$HF_TOKEN>"
    assert clean_text(f"{TOKEN[cut:]} {words}") == f"<$HF_TOKEN> {words}"


def test_the_directory_one_stands_in_and_that_of_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(redact.sys, "prefix", "/opt/somewhere/venv")  # type: ignore[attr-defined]
    assert clean_text(f"{tmp_path}/a, /opt/somewhere/venv/lib/b.py") == "<here>/a, <python>/lib/b.py"


def planted_result() -> Result:
    """A result with everything everywhere."""
    said = f"marvin@deep-thought /people/marvin /scratch/of-marvin/tmp/x /data/models/tiny {TOKEN} sesame, operation overlord 7"
    return builders.result(
        why=said,
        noisy={"decode_tok_s": said},
        quality=Quality(probe="v1", verdict="broken", why=said, answers=[Answer(question="?", answer=said, correct=False)]),
        checks={"dtype": said, said: said},
        code='tokenizer(gguf_file="marvin-\\"q4\\".gguf",)',
        command=said,
        remote_code=[said],
        log_tail=f"{said}\nTraceback\n{said}",
    )


def test_no_field_of_a_result_tells() -> None:
    text = encode_record(clean(planted_result(), Path("/data/models/tiny"))).decode()
    for told in ("marvin", "deep-thought", "/people", "/scratch", "/data", TOKEN, "sesame", "overlord"):
        assert told not in text
    assert "~ <tmp>/x <model> <$HF_TOKEN> <$DB_PASSWORD>, <$PROJECT>" in text


def test_a_result_without_secrets_stays_as_it_is() -> None:
    plain = builders.result(why="no /usr/lib/x here", metrics={"decode_tok_s": 1.5}, environment={"torch": "2.13"}, log_tail="a\nb")
    assert clean(plain, Path("/data/models/tiny")) == plain


def test_what_the_case_is_called_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_ID", "org/model-7b")
    monkeypatch.setenv("USER", "orgmodel")
    of = builders.case(model="org/model-7b")
    assert clean(builders.result(of, command="--model org/model-7b")).command == "--model org/model-7b"


def test_what_is_only_a_part_of_what_the_case_is_called_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "mist")
    monkeypatch.setenv("PROJECT", "istral-7b")
    of = builders.case(model="mistral-7b")
    assert clean(builders.result(of, why="mist: mistral-7b of istral-7b")).why == "<user>: m<$PROJECT> of <$PROJECT>"


def test_loading_code_and_modules_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "BASE_MODEL": "HuggingFaceTB/SmolLM2-135M",
        "DTYPE": "bfloat16",
        "MAX_TOKENS": "100000",
        "USER": "norm",
    }.items():
        monkeypatch.setenv(name, value)
    code = (
        'MODEL = "HuggingFaceTB/SmolLM2-135M"\n\nmodel = from_pretrained(MODEL, dtype="bfloat16", device_map={"model.norm": 0})\n'
    )
    modules = {"model.norm": "gpu:0"}
    plain = builders.result(
        code=code, device_map=modules, loaded=builders.loaded(device_map=modules), why="bfloat16, 100000 of 1000000"
    )
    assert clean(plain) == plain


def test_the_name_of_a_model_is_no_secret_because_a_variable_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_NAME", "SmolLM2-135M")
    assert redact.clean_name("SmolLM2-135M") == "SmolLM2-135M"
    assert redact.clean_name(f"{TOKEN} marvin sesame") == "<$HF_TOKEN> <user> <$DB_PASSWORD>"


@pytest.mark.parametrize(
    "texts",
    [
        {"why": "plain"},
        {"why": "at /home/somebody/model"},
        {"log_tail": "x" * 600 + "\nfile: /home/somebody/x"},
        {"checks": {"/home/somebody/a": "ok"}},
        {"noisy": {"decode_tok_s": "hf_abcDEF0123456789"}},
        {"remote_code": ["/Users/somebody/code.py"]},
        {"why": "one", "command": "two"},
    ],
)
def test_a_result_is_clean_exactly_where_cleaning_changes_nothing(texts: dict[str, Any]) -> None:
    result = builders.result(**texts)
    assert redact.is_clean(result) == (redact.clean(result) == result)
