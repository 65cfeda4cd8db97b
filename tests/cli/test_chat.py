"""`fitmatrix chat`: what it refuses, what a model is shown and says, and the page it serves, over HTTP on a small real model."""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.cli import chat as chat_command
from harness.cli.entry import main
from harness.core.placements import PLACEMENTS
from harness.core.precisions import PRECISIONS
from harness.core.records import Case, Workload
from harness.core.units import GIB
from harness.machine import probe
from harness.machine.gpus import profile
from harness.measure.protocol import Chat, Load
from harness.planning.code import loading_code
from harness.worker import chat, quality_probe
from harness.worker import model as work
from harness.worker.web import page
from tests.support import small_models

ROOT = Path(__file__).parents[2]
LETTERS = 96
TEMPLATE = "{% for one in messages %}{{ one.role[0] }}:{{ one.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama of random weights that speaks in letters."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    small_models.save("llama", folder, vocab_size=LETTERS, max_position_embeddings=200, eos_token_id=0)
    small_models.write_letters(folder, LETTERS)
    return folder


# What is refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nosuchmodel"], "unknown model 'nosuchmodel'"),
        (["chatglm-6b", "int8"], "no case 'int8': write PRECISION/PLACEMENT"),
        (["chatglm-6b", "fp16/tp"], "chat does not support placement tp (several processes or a custom map): use one of"),
        (["chatglm-6b", "fp16/file"], "chat does not support placement file (several processes or a custom map): use one of"),
        (["chatglm-6b", "--port", "0"], "--port: 0 is too small: at least 1"),
        (["chatglm-6b", "--port", "70000"], "--port: 70000 is too large: at most 65535"),
        (["chatglm-6b", "--new-tokens", "1"], "--new-tokens: 1 is too small: at least 2"),
        (["chatglm-6b", "--prompt-tokens", "x"], "--prompt-tokens: 'x' is not a whole number"),
        (["chatglm-6b", "--host", "192.0.2.1"], "--host '192.0.2.1': "),
    ],
)
def test_a_wrong_request_is_one_sentence_and_exit_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    status = main(["chat", *arguments])
    captured = capsys.readouterr()
    assert (status, captured.out) == (2, "")
    assert captured.err.startswith(f"fitmatrix: {said}")
    assert captured.err.count("\n") == 1


def test_a_port_that_is_taken_is_told_and_left_out_when_none_is_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert main(["chat", str(folder), "--port", str(port)]) == 2
        assert f"--port {port}: Address already in use" in capsys.readouterr().err
        monkeypatch.setattr("harness.cli.chat.FIRST_PORT", port)
        monkeypatch.setitem(sys.modules, "gradio", None)
        assert main(["chat", str(folder)]) == 2
        assert "needs the package gradio" in capsys.readouterr().err


def test_nobody_can_share_the_page_and_the_help_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["chat", "chatglm-6b", "--share"])
    with pytest.raises(SystemExit):
        main(["chat", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "There is no option to share the page over the internet: gradio would tunnel" in told


def test_what_does_not_fit_is_refused_in_the_words_of_the_plan(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "probe", lambda: profile([], ram=8 * GIB))
    load = ["--prompt-tokens", "1024", "--new-tokens", "256"]
    assert main(["plan", "chatglm-6b", "--precision", "fp32", "--placement", "cpu", "--json", *load]) == 1
    why = json.loads(capsys.readouterr().out)["plans"][0]["why"]
    assert why.startswith("too big for cpu: needs ")
    assert main(["chat", "chatglm-6b", "fp32/cpu"]) == 1
    way_out = "fitmatrix plan chatglm-6b --prompt-tokens 1024 --new-tokens 256 shows what fits, --anyway loads it all the same"
    assert capsys.readouterr().err == f"fitmatrix: chatglm-6b/fp32/cpu: {why.partition(' Try ')[0].removesuffix('.')}. {way_out}\n"
    assert main(["chat", "chatglm-6b", "int8/direct"]) == 2
    assert "chatglm-6b/int8/direct cannot be loaded: no NVIDIA GPU detected" in capsys.readouterr().err


@pytest.mark.parametrize("case", [[], ["fp32/cpu"]], ids=["nothing fits", "a case does not"])
@pytest.mark.parametrize("more", [[], ["--anyway"]], ids=["", "anyway"])
@pytest.mark.parametrize(
    "given", [[], ["--prompt-tokens", "90", "--new-tokens", "30"], ["--new-tokens", "20", "--trust-remote-code"]], ids=" ".join
)
def test_the_command_that_shows_why_keeps_what_was_asked_and_can_be_pasted(
    folder: Path,
    given: list[str],
    case: list[str],
    more: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if case and more:
        pytest.skip("it is loaded")
    spaced = folder.parent / "a model"  # a name to be quoted
    if not spaced.exists():
        spaced.symlink_to(folder)
    monkeypatch.setattr(probe, "probe", lambda: profile([], ram=GIB // 8))
    assert main(["chat", str(spaced), *case, *given, *more]) == (2 if more else 1)
    said = capsys.readouterr().err
    found = re.search(r"fitmatrix (plan .+?) (?:shows|(?=--all lists))", said)
    assert found, said
    words = shlex.split(found[1])
    assert set(given) <= set(words)
    assert main([*words, "--json"]) == 1
    planned = json.loads(capsys.readouterr().out)
    assert planned["model"]["source"] == str(spaced.resolve())
    asked = {"--prompt-tokens": planned["workload"]["prompt_tokens"], "--new-tokens": planned["workload"]["new_tokens"]}
    assert asked == {name: int(words[words.index(name) + 1]) for name in asked}
    assert sum(asked.values()) <= 200  # of the conversation, not of a run


def test_what_the_plan_doubts_is_loaded_anyway(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "probe", lambda: profile([], ram=GIB // 8))
    served: list[tuple[bool, str]] = []

    def serve(args: argparse.Namespace, case: Case, *_: object) -> int:
        served.append((args.anyway, case.id))
        return 0

    monkeypatch.setattr(chat_command, "_serve", serve)
    assert main(["chat", str(folder), "fp32/cpu"]) == 1
    assert "too big for cpu" in capsys.readouterr().err
    assert main(["chat", str(folder), "fp32/cpu", "--anyway"]) == 0
    assert served == [(True, "tiny/fp32/cpu")]
    assert main(["chat", str(folder), "--anyway"]) == 2
    assert "--anyway loads the case that you name" in capsys.readouterr().err
    assert main(["chat", str(folder), "fp32/direct", "--anyway"]) == 2
    assert "cannot be loaded: no NVIDIA GPU detected" in capsys.readouterr().err


def test_the_conversation_is_as_long_as_fits_unless_it_is_asked_to_be_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the usual length is all that fits, or the model has no more, it stays."""
    served: list[Workload] = []

    def serve(_: object, case: Case, *__: object) -> int:
        served.append(case.workload)
        return 0

    monkeypatch.setattr(chat_command, "_serve", serve)
    for ram, words in ((64, []), (64, ["--prompt-tokens", "99"]), (64, ["--new-tokens", "30"])):
        monkeypatch.setattr(probe, "probe", lambda ram=ram: profile([], ram=ram * GIB))
        assert main(["chat", "qwen2.5-0.5b-instruct", "bf16/cpu", *words]) == 0
    assert [(load.prompt_tokens, load.new_tokens) for load in served] == [(8192 - 256, 256), (99, 256), (8192 - 30, 30)]
    assert main(["chat", "chatglm-6b", "int4/cpu"]) == 0
    assert served[-1].prompt_tokens + served[-1].new_tokens == 2048


def test_without_gradio_the_way_out_is_told_before_anything_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["chat", str(folder), "fp32/cpu"]) == 2
    assert capsys.readouterr().err == "fitmatrix: needs the package gradio: pip install fitmatrix[chat]\n"


def test_a_model_without_words_cannot_be_talked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_models.save("llama", tmp_path / "mute")
    assert main(["chat", str(tmp_path / "mute"), "fp32/cpu"]) == 2
    assert "mute has no tokenizer beside its weights (synthetic weights have none)" in capsys.readouterr().err


# What a model is shown, and what it says


def talk(folder: Path, *, template: str | None = None, prompt_tokens: int = 100, new_tokens: int = 12) -> chat.Talk:
    code = loading_code(PRECISIONS["fp32"], PLACEMENTS["cpu"], "float32")
    loaded, _ = work.load(Load(model=str(folder), code=code), lambda _: contextlib.nullcontext())
    loaded.tokenizer.chat_template = template
    request = Chat(model="tiny", host="127.0.0.1", port=1, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    return chat.Talk(loaded, request)


def greedy(folder: Path, prompt: str, new_tokens: int = 12) -> list[int]:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)
    return list(output[0, inputs["input_ids"].shape[1] :].tolist())


def words(folder: Path, ids: list[int]) -> str:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def test_the_conversation_is_put_by_the_template_and_its_oldest_turns_go_first(folder: Path) -> None:
    one = talk(folder, template=TEMPLATE, prompt_tokens=30)
    said = [("user", "old"), ("assistant", "yes"), ("user", "new"), ("assistant", [{"type": "text", "text": "no"}])]
    history = [{"role": role, "content": content, "metadata": None} for role, content in said]
    assert list(one.answer("why", history))[-1].text == words(folder, greedy(folder, "u:old;a:yes;u:new;a:no;u:why;a:"[12:]))
    roomy = talk(folder, template=TEMPLATE)
    assert list(roomy.answer("why", history))[-1].text == words(folder, greedy(folder, "u:old;a:yes;u:new;a:no;u:why;a:"))


def test_what_was_not_answered_is_left_out(folder: Path) -> None:
    history = [{"role": role, "content": content} for role, content in (("user", "a"), ("user", "b"), ("assistant", "c"))]
    assert list(talk(folder, template=TEMPLATE).answer("d", history))[-1].text == words(folder, greedy(folder, "u:b;a:c;u:d;a:"))


def test_a_system_prompt_is_said_first_and_never_left_out(folder: Path) -> None:
    one = talk(folder, template=TEMPLATE, prompt_tokens=24)
    wish = chat.Wish(system="be")
    assert one.takes_system
    history = [{"role": "user", "content": "old"}, {"role": "assistant", "content": "yes"}]
    reply = list(one.answer("why", history, wish))[-1]
    assert reply.text == words(folder, greedy(folder, "s:be;u:why;a:"))
    assert reply.dropped_turns == 1
    assert not talk(folder).takes_system, "there is no place for it"
    assert list(talk(folder).answer("why", (), wish))[-1].text == words(folder, greedy(folder, "why"))


def test_an_answer_is_sampled_as_it_is_wanted_and_else_greedy(folder: Path) -> None:
    one = talk(folder)
    assert len({list(one.answer("Hello"))[-1].text for _ in range(2)}) == 1
    hot = chat.Wish(temperature=2.0)
    assert len({list(one.answer("Hello", (), hot))[-1].text for _ in range(4)}) > 1
    only = chat.Wish(temperature=2.0, top_k=1)
    assert list(one.answer("Hello", (), only))[-1].text == words(folder, greedy(folder, "Hello"))


def test_a_reply_tells_its_tokens_its_speed_and_that_it_was_cut(folder: Path) -> None:
    one = talk(folder)
    *before, last = one.answer("Hello", (), chat.Wish(most_tokens=5))
    assert (last.prompt_tokens, last.new_tokens, last.is_cut) == (5, 5, True)
    assert last.tokens_per_s == pytest.approx(4 / last.decode_s)
    assert not any(reply.is_cut for reply in before)
    assert list(one.answer("Hello", (), chat.Wish(most_tokens=999)))[-1].new_tokens == 12, "more than was planned is not given"
    ids = greedy(folder, "Hello")
    one._ends.add(ids[4])
    assert not list(one.answer("Hello", (), chat.Wish(most_tokens=5)))[-1].is_cut, "it ended by itself"


def test_what_is_far_too_long_is_not_even_tokenized(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = talk(folder)
    monkeypatch.setattr(quality_probe, "encode_text", lambda *_: pytest.fail("it was tokenized"))
    with pytest.raises(chat.TooLong, match="this takes 4,000,000 letters, and there is room for 100 tokens"):
        next(one.answer("x" * 4_000_000))


def test_what_is_too_long_is_told(folder: Path) -> None:
    with pytest.raises(chat.TooLong, match=r"this takes 31 tokens, and there is room for 30: shorten it, or raise --prompt"):
        next(talk(folder, prompt_tokens=30).answer("x" * 31))
    with pytest.raises(chat.TooLong, match=r"this takes 101 tokens, and there is room for 100: shorten it$"):
        next(talk(folder, prompt_tokens=1024, new_tokens=256).answer("x" * 101))


def test_the_token_that_ends_an_answer_is_no_part_of_it(folder: Path) -> None:
    ids = greedy(folder, "Hello")
    last = next(index for index in range(1, len(ids)) if ids[index] not in ids[:index])
    one = talk(folder)
    one._ends.add(ids[last])
    assert list(one.answer("Hello"))[-1].text == words(folder, ids[:last])


def test_an_answer_that_nobody_reads_is_not_written_to_its_end(folder: Path) -> None:
    one = talk(folder, new_tokens=90)
    answer = one.answer("Hello")
    next(answer)
    answer.close()  # type: ignore[attr-defined]  # a generator, as every page that is closed does
    assert list(one.answer("Hello"))[-1].text == words(folder, greedy(folder, "Hello", 90))


def test_a_model_that_fails_says_so_instead_of_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no memory left")

    one = talk(folder)
    monkeypatch.setattr(one._model.module, "generate", fails)
    with pytest.raises(RuntimeError, match="no memory left"):
        list(one.answer("Hello"))


ENDS = {
    "torch on a card": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"),
    "Python": MemoryError(),
}


def runs_out(model: Any, monkeypatch: pytest.MonkeyPatch, end: BaseException | None) -> list[weakref.ref[torch.Tensor]]:
    """Let the model's layers run out of memory from the third token on, with an error or by really asking for a petabyte.

    Returns references to what was allocated before.
    """
    held: list[weakref.ref[torch.Tensor]] = []
    forward = model.module.forward

    def failing(*given: Any, **named: Any) -> Any:
        cache = torch.zeros(1000)
        held.append(weakref.ref(cache))
        if len(held) > 2:
            if end:
                raise end
            torch.empty(1 << 50)
        return forward(*given, **named)

    monkeypatch.setattr(model.module, "forward", failing)
    return held


@pytest.mark.parametrize("end", [None, *ENDS.values()], ids=["this machine", *ENDS])
def test_memory_that_runs_out_in_an_answer_is_free_for_the_next(
    folder: Path, monkeypatch: pytest.MonkeyPatch, end: BaseException | None
) -> None:
    one = talk(folder)
    gc.disable()  # a conversation does not wait for it
    try:
        with monkeypatch.context() as patch:
            held = runs_out(one._model, patch, end)
            with pytest.raises(chat.NoAnswer, match=r"allocate|out of memory") as caught:
                list(one.answer("Hello"))
            assert "\n" not in str(caught.value)
            assert [one() for one in held] == [None] * 3
    finally:
        gc.enable()
    assert list(one.answer("Hello"))[-1].text == words(folder, greedy(folder, "Hello"))


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio, the extra chat")
def test_the_page_says_that_memory_ran_out_keeps_what_was_said_and_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradio = pytest.importorskip("gradio")
    one = talk(folder)
    events = page._Events(one, Chat(model="tiny", case="fp32/cpu", host="127.0.0.1", port=1, prompt_tokens=100, new_tokens=12), 0)
    wanted = ("", 0, 1, 0, 1, 12)
    said: list[Any] = [{"role": "user", "content": "Hello"}]
    with monkeypatch.context() as patch:
        runs_out(one._model, patch, ENDS["torch on a card"])
        kept, _, note, _ = list(events.write(said, *wanted))[-1]
        assert (kept, note) == (
            said,
            "No answer: CUDA out of memory. Tried to allocate 2.00 GiB. Shorten the conversation and try again.",
        )
        with pytest.raises(gradio.Error, match="CUDA out of memory"):
            list(events.answer("Hello"))
    kept, _, note, _ = list(events.write(said, *wanted))[-1]
    assert kept[-1] == {"role": "assistant", "content": words(folder, greedy(folder, "Hello"))}
    assert note == "Cut at 12 tokens."


# The page


@contextlib.contextmanager
def serving(folder: Path, port: int, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Serve a model until the end of the block, with settings around that would share it; yield the process and its first line."""
    hostile = {"GRADIO_SHARE": "True", "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_ANALYTICS_ENABLED": "True"}
    process = subprocess.Popen(
        [sys.executable, "-m", "harness", "chat", "./tiny", "fp32/cpu", "--port", str(port), "--new-tokens", "12", *words],
        cwd=folder.parent,
        env={**os.environ, **hostile, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline()
    finally:
        process.kill()
        process.communicate()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def watch_once(pid: int) -> dict[str, Any]:
    """Return what `fitmatrix watch` shows of a process."""
    command = [sys.executable, "-m", "harness", "watch", "--pid", str(pid), "--once", "--json"]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return found


def ask(url: str, message: str) -> list[tuple[str, str]]:
    """Ask one question by the page's own interface; return the events of the answer: their kind and the text until then."""
    question = json.dumps({"data": [message]}).encode()
    request = urllib.request.Request(f"{url}gradio_api/call/chat", question, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        event = json.load(reply)["event_id"]
    with urllib.request.urlopen(f"{url}gradio_api/call/chat/{event}", timeout=60) as reply:
        lines = reply.read().decode().splitlines()
    kinds = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    texts = [str(said["error"]) if isinstance(said, dict) else str(said[0]) if said else "" for said in data]
    return list(zip(kinds, texts, strict=True))


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio, the extra chat")
def test_a_turn_is_answered_over_http_on_this_machine_alone_until_ctrl_c(folder: Path) -> None:
    port = free_port()
    with serving(folder, port) as (process, told):
        url = f"http://127.0.0.1:{port}/"
        assert told == f"Chat with tiny/fp32/cpu at {url} (Ctrl-C to stop)\n"
        events = ask(url, "Hello")
        assert events[-1] == ("complete", words(folder, greedy(folder, "Hello")))
        assert [kind for kind, _ in events].count("generating") > 1, "it comes at once, not as it is written"
        watched = watch_once(process.pid)
        assert (watched["case"], watched["phase"]) == ("tiny/fp32/cpu", "chat")
        assert watched["tokens"] >= len("Hello")
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        sockets = [found for one in tree for found in one.net_connections("inet")]
        assert (socket.AF_INET, ("127.0.0.1", port)) in [(found.family, found.laddr) for found in sockets]
        assert {found.laddr.ip for found in sockets} == {"127.0.0.1"}
        assert ask(url, "x" * 500)[-1] == (
            "error",
            "this takes 500 tokens, and there is room for 188: shorten it",
        )
        assert ask(url, "Hello")[-1] == events[-1], "a long message ends nothing"
        with urllib.request.urlopen(f"{url}config", timeout=60) as reply:
            config = json.load(reply)
        assert not config["analytics_enabled"]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (130, "")
        before, after = err.splitlines()
        seconds = r"\S+ m?s"
        told_of_loading = rf"loading tiny/fp32/cpu: about {seconds} \({seconds} to {seconds}\), less while .*"
        assert re.fullmatch(f"fitmatrix: {told_of_loading}", before)
        assert after == "fitmatrix: stopped; nothing of the chat is kept"
        _, left = psutil.wait_procs(tree, timeout=60)
        assert not left
