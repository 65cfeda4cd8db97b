"""What is private by its look, and its doubles, which are not; words of ours, which are nobody's."""

from __future__ import annotations

import getpass
import socket
import time
from typing import Any

import msgspec
import pytest

from harness.core import redact
from harness.core.metrics import METRICS
from harness.core.private import looks, own_words
from harness.core.records import Answer, Outcome, Phase, Quality, Result, Verdict, encode_record
from harness.measure import quality
from tests.support import builders

PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7\nbbb\n-----END RSA PRIVATE KEY-----"
PRIVATE: dict[str, tuple[str, str]] = {
    "npm": ("npm_" + "a1B2c3D4e5" * 3 + "f6G7h8", "<token>"),
    "PyPI": ("pypi-AgEIcHlwaS5vcmcCJDU1ZjQ", "<token>"),
    "Google": ("AIzaSyD-abcdefghijklmnopqrstuvwxyz01234", "<token>"),
    "Stripe": ("sk_live_51Habcdefghijkl", "<token>"),
    "Stripe, restricted": ("rk_test_51Habcdefghijkl", "<token>"),
    "GitHub": ("ghp_0123456789abcdefABCD", "<token>"),
    "GitLab": ("glpat-abcdefghij0123456789", "<token>"),
    "Slack": ("xoxb-12345678901-abcdef", "<token>"),
    "PEM": (PEM, "<token>"),
    "PEM cut short": (PEM[:60], "<token>"),
    "Basic": ("Authorization: Basic YWxpY2U6b3BlbnNlc2FtZQ==", "Authorization: Basic <token>"),
    "Bearer": ("Authorization: Bearer abcdefghijkl", "Authorization: Bearer <token>"),
    "user and password": ("https://me:secret@example.org/x", "https://<token>@example.org/x"),
    "token in an address": ("https://0123456789abcdef@example.org/x", "https://<token>@example.org/x"),
    "index": ("pip install -i https://tok3n@pypi.example.org/simple", "pip install -i https://<token>@pypi.example.org/simple"),
    "query": ("GET /v1?api_key=abc123&n=1", "GET /v1?api_key=<token>&n=1"),
    "signed": ("https://x.example/f?X-Amz-Signature=deadbeef0&a=1", "https://x.example/f?X-Amz-Signature=<token>&a=1"),
    "variable": ("WANDB_API_KEY=0123456789abcdef0123 python x.py", "WANDB_API_KEY=<token> python x.py"),
    "e-mail": ("ask alice.b+x@mail.example.org, please", "ask <email>, please"),
    "IPv4": ("connect to 93.184.216.34:443 failed", "connect to <address>:443 failed"),
    "IPv4, inside": ("tcp://192.168.1.17:29500", "tcp://<address>:29500"),
    "IPv4 in a tuple": ("('10.0.0.3', 8080)", "('<address>', 8080)"),
    "IPv4 of a host": ("host 203.0.113.7", "host <address>"),
    "IPv6": ("listening on 2001:db8:85a3::8a2e:370:7334", "listening on <address>"),
    "IPv6, link": ("fe80::1ff:fe23:4567:890a%eth0", "<address>%eth0"),
    "MAC": ("ether 02:42:ac:11:00:02 txqueuelen", "ether <address> txqueuelen"),
    "home": ("/home/alice/x", "~/x"),
    "home on macOS": ("/Users/alice/x", "~/x"),
    "home on Windows": (r"C:\Users\alice\x", r"~\x"),
    "home on Windows in code": (r"C:\\Users\\alice\\x", r"~\\x"),
    "home on Windows in JSON in code": (r"C:\\\\Users\\\\alice\\\\x", r"~\\\\x"),
    "home on Windows with slashes": ("c:/Users/alice/x", "~/x"),
    "home on Windows with a blank": (r"D:\Users\Alice Smith\models", r"~\models"),
}
PLAIN = [
    "torch==2.9.1 nvidia-cublas-cu12==12.1.3.1 pkg>=1.2.3.4",
    "Package Version\n------- -------\nnvidia-cublas-cu12 12.1.3.1\nnvidia-cudnn-cu12  8.9.2.26\ntorch 2.9.1",
    "torch 2.9.1, foo 1.2.3.4, bar 4.3.2.1",
    "driver version 535.104.5.12, CUDA v12.2.140.1, build: 1.2.3.4",
    "libfoo-1.2.3.4.so and foo-1.2.3.4-py3-none-any.whl foo_1.2.3.4.tar.gz",
    "127.0.0.1:7860 0.0.0.0 ::1 255.255.255.0",
    "12:30:45 at::native c10::Error std::bad_alloc 00000000:01:00.0 a:b:c",
    "x@w.weight q@k.mT q@k.to(0) tiny/int8/cpu@ram4GiB tiny/int8/cpu@vram1.5GiB torch@2.9.1 git@github.com:a/b ssh://git@github.com/a",
    "hf_hub_download hf_quantizer sk-learn eyJ npm_config pypi-server sk_live",
    "pad_token_id=0 MAX_TOKENS=100000 EOS_TOKEN=<|endoftext|> tokenizer(key=value) a Basic understanding",
    "/usr/home /homes/x https://example.org/x?page=2 Users\\ C:\\Windows",
    "sha256:0123456789abcdef 2026-11-24T08:00:00Z 1.2.3 1.2.3.4.5 3.14",
]


@pytest.mark.parametrize("name", PRIVATE)
def test_what_is_private_is_known_by_its_look(name: str) -> None:
    text, marked = PRIVATE[name]
    assert looks.private(text) is not None
    assert looks.without(text) == marked
    assert (looks.private(marked), looks.without(marked)) == (None, marked)
    for field in ({"log_tail": text}, {"why": text}, {"checks": {text: "x"}}, {"failed": [text]}, {"remote_code": [text]}):
        result = builders.result(**field)
        if "failed" not in field:  # by which a case is found again
            assert redact.gives_away(encode_record(redact.clean(result)).decode()) is None


@pytest.mark.parametrize("text", PLAIN)
def test_what_only_looks_so_stays(text: str) -> None:
    assert looks.without(text) == text
    assert looks.private(text) is None


@pytest.mark.parametrize(
    "piece",
    [
        "a",
        "a.",
        "1.",
        "a:",
        "A_TOKEN",
        "/home/",
        "C:\\",
        "://",
        "x@",
        "?key=",
        PEM[:31],
        "eyJaaaaaaaaa.",
        "sk-",
        "C:\\Users\\",
        "hf_",
    ],
)
def test_any_text_is_searched_in_time_that_grows_with_it(piece: str) -> None:
    def seconds(length: int) -> float:
        text = piece * (length // len(piece))
        begun = time.perf_counter()
        looks.without(text)
        return time.perf_counter() - begun

    assert min(seconds(160_000) for _ in range(3)) < 64 * max(min(seconds(10_000) for _ in range(3)), 5e-3)


def of_every_word() -> Result:
    """A result in which words of ours stand wherever they can."""
    answers = [Answer(question=item.prompt, answer="Paris", correct=True) for item in quality.PROBE.questions]
    return builders.result(
        why="out of memory during warm round: the kernel killed the process",
        noisy=dict.fromkeys(METRICS, "only torch enforced the limit: the rounds spread by 9 %"),
        quality=Quality(probe="1", verdict="intact", why="all answers are right", answers=answers),
        phases=[Phase(name=name, start_s=0, end_s=1) for name in ("load", "cold", "warm", "score")],
        checks={"precision": "ok", "placement": "ok"},
    )


WORDS = sorted(
    {
        "intact",
        "warm",
        "cold",
        "score",
        "precision",
        "placement",
        "question",
        "answer",
        "France",
        "memory",
        "kernel",
        "rounds",
        "right",
    }
    | {outcome.value for outcome in Outcome}
    | {verdict.value for verdict in Verdict}
    | {word for key in METRICS for word in key.split("_") if len(word) > 2 and word.isalpha()}
)


@pytest.mark.parametrize("name", ["USER", "GIT_AUTHOR_NAME", "DB_PASSWORD", "HOSTNAME_IS", "PROJECT"])
def test_a_word_of_ours_is_nobody_s(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    result = of_every_word()
    for word in WORDS:
        with monkeypatch.context() as patch:
            if name == "HOSTNAME_IS":
                patch.setattr(socket, "gethostname", lambda word=word: word)
            else:
                patch.setenv(name, word)
            assert redact.clean(result) == result, word
            assert redact.is_clean(result), word


def test_a_name_that_is_a_word_of_ours_is_left_out_of_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "warm")
    assert redact.clean_text("/data/warm/models is warm") == "/data/<user>/models is warm"


def test_an_author_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_AUTHOR_NAME", "Zaphod")
    assert redact.clean_text("Zaphod") == "Zaphod"
    monkeypatch.setenv("AUTH_OF_ALL", "Zaphod")
    assert redact.clean_text("Zaphod") == "<$AUTH_OF_ALL>"


@pytest.mark.parametrize(("word", "ours"), [("intact", True), ("France", True), ("marvin", False), ("zaphod", False), ("", False)])
def test_the_sources_are_asked_for_their_words(word: str, ours: bool) -> None:
    assert own_words.is_ours(word) is ours


def test_tuples_tables_and_records_are_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "trillian")
    value: Any = {"trillian": ("trillian", ["trillian"]), "a": Answer(question="trillian", answer="trillian", correct=True)}
    walked = redact._walk(value, redact.cleaner())
    assert "trillian" not in str(walked)
    assert isinstance(walked["<user>"], tuple)
    assert list(redact.texts_in(value)).count("trillian") == 5


def test_the_name_of_this_user_is_taken_out() -> None:
    user = getpass.getuser()
    told = redact.clean_text(f"by {user}")
    assert user in told if redact.COMMON.fullmatch(user) or own_words.is_ours(user) else user not in told


def test_a_phase_of_a_strange_result_is_examined() -> None:
    plain = of_every_word()
    assert not [name for name in plain.__struct_fields__ if redact.gives_away(getattr(plain, name))]
    hidden = msgspec.structs.replace(plain, phases=[Phase(name="hf_abcDEF0123456789", start_s=0, end_s=1)])
    assert redact.gives_away(hidden.phases) == "a secret"
