"""`fitmatrix plan --images N`: what images add to memory and the first token, who is refused, and the printed program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from harness.architecture.vision.image_trace import ImageTrace
from harness.catalog.resolve import resolve
from harness.core.attention import KV_FORMS
from harness.core.records import Workload
from harness.planning import images
from harness.planning.calibration import default
from harness.planning.cost.footprint import Footprint
from harness.planning.cost.inventory import Inventory
from harness.planning.cost.memory import WeightFormat
from tests.support.seeing_models import save_llava
from tests.support.spoken import Said, saying

ROOT = Path(__file__).parents[2]
MODEL, CARD = "qwen3-vl-2b", ("--gpu", "RTX 3060 12GB", "--ram", "32GiB")


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Said:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return saying(capsys, "plan")


def of_case(say: Said, *arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the workload and the one plan of bf16/direct."""
    _, out, _ = say(MODEL, *CARD, "--precision", "bf16", "--placement", "direct", *arguments, "--json")
    found = json.loads(out)
    return found["workload"], found["plans"][0]


def test_images_are_tokens_of_the_prompt_and_operations_before_the_first(say: Said) -> None:
    workload, two = of_case(say, "--images", "2")
    assert workload == {"prompt_tokens": 64 + 2 * 972, "new_tokens": 16, "batch": 1, "images": 2, "image_tokens": 972}
    _, words = of_case(say, "--prompt-tokens", str(workload["prompt_tokens"]))
    assert two["tiers"]["gpu:0"]["kv_bytes"] == words["tiers"]["gpu:0"]["kv_bytes"]
    assert two["tiers"]["gpu:0"]["activation_bytes"] > words["tiers"]["gpu:0"]["activation_bytes"]
    assert two["first_token_s"]["best"] > 1.2 * words["first_token_s"]["best"]
    assert two["decode_tok_s"] == words["decode_tok_s"]
    assert of_case(say)[0] == of_case(say, "--images", "0")[0] == {"prompt_tokens": 64, "new_tokens": 16, "batch": 1}


def test_a_context_has_the_images_within(say: Said) -> None:
    assert of_case(say, "--images", "2", "--context", "4000")[0]["prompt_tokens"] == 4000 - 16
    status, _, err = say(MODEL, *CARD, "--images", "3", "--context", "500")
    assert (status, err) == (2, "fitmatrix: --context 500 leaves no room for text beside 3 images of 972 tokens: raise it\n")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("smollm2-135m", "--images", "2"), "smollm2-135m reads no images: drop --images 2"),
        ((MODEL, "--images", "2", "--training", "lora"), "--images does not apply to --training: drop one of them"),
        ((MODEL, "--images", "2", "--prove-min-ram"), "--prove-min-ram runs prompts of text: drop --images"),
    ],
)
def test_what_has_no_images_says_so(say: Said, arguments: tuple[str, ...], why: str) -> None:
    assert say(*arguments) == (2, "", f"fitmatrix: {why}\n")


@pytest.mark.parametrize(("given", "why"), [("-1", "-1 is too small: at least 0"), ("two", "'two' is not a whole number")])
def test_a_number_of_images_is_read_as_any_other(say: Said, given: str, why: str) -> None:
    assert say(MODEL, f"--images={given}") == (2, "", f"fitmatrix: --images: {why}\n")


def test_an_answer_says_how_many_tokens_images_are(say: Said) -> None:
    _, out, _ = say(MODEL, *CARD, "--images", "2")
    assert "Estimates for 2,008 + 16 tokens, 1,944 of them of 2 images of 1152 x 864 pixels" in out
    assert "--images 2 --code bf16/direct" in out
    assert "pytest cases/ --model qwen3-vl-2b-instruct --prompt-tokens 2008\n" in out
    _, out, _ = say(MODEL, *CARD, "--images", "2", "--explain", "bf16/direct")
    assert "Each image is 972 tokens. The vision tower takes 338 MiB at its peak" in " ".join(out.split())


def test_the_tower_is_at_its_peak_before_anything_is_cached() -> None:
    """Its peak stands against the KV cache, its features beside the prompt; without images nothing changes."""
    from harness.architecture import model_spec

    source = resolve(MODEL)
    spec, load = images.with_images(model_spec.read_spec(source), source, Workload(images=8, prompt_tokens=8), in_context=False)
    image = spec.image
    assert image is not None
    fmt = WeightFormat(dtype="bfloat16")
    footprint = Footprint(Inventory(spec, fmt), "gpu:0", load, default(), kv_form=KV_FORMS["dynamic"])
    words = footprint.with_workload(Workload(prompt_tokens=load.prompt_tokens))
    share = default()["gpu_activation_share"].best
    prefill, _ = footprint.on_gpu.phases(load)
    looking = image.peak_bytes(8, 2) - footprint.kv["gpu:0"]
    expected = max(looking, prefill + image.kept_bytes(8, 2))
    assert footprint.terms()["gpu:0"].activation.best == pytest.approx(share * expected)
    assert words.terms()["gpu:0"].activation.best == pytest.approx(share * words.on_gpu.bytes(words.workload))


def test_bytes_go_with_the_width_of_an_element() -> None:
    image = ImageTrace(tokens=4, pixels_bytes=100, features_bytes=40, beside_bytes=10, each_bytes=500, flops=1.0, source="a test")
    assert (image.peak_bytes(3, 2), image.peak_bytes(3, 4)) == (1510, 3020)
    assert (image.kept_bytes(3, 2), image.kept_bytes(3, 4)) == (420, 840)


def test_the_printed_program_looks_at_images(tmp_path: Path) -> None:
    """A model of random weights, its processor and two images: the program runs as it is printed, and shows what it was asked."""
    folder = tmp_path / "model"
    save_llava(folder)
    for number in (1, 2):
        Image.new("RGB", (80, 60), (0, 90 * number, 0)).save(tmp_path / f"image{number}.jpg")
    command = ["plan", str(folder), "--images", "2", "--batch", "2", "--code", "bf16/cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    printed = subprocess.run(
        [sys.executable, "-m", "harness", *command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert printed.returncode == 0, printed.stderr
    assert "thumbnail" not in printed.stdout  # its processor makes one size of any image
    done = subprocess.run([sys.executable, "-c", printed.stdout], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("W h a t")
