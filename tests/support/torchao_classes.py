"""What torch unpickles of torchao's tensors, and which dtypes they multiply in: the library asked, and its answers kept as data.

python -m tests.support.torchao_classes    # where it is installed; writes harness/data/torchao_classes.json
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RECORDED = Path(__file__).parents[2] / "harness/data/torchao_classes.json"
PACKAGE = "torchao"
# What transformers imports of torchao before it opens a file of weights, in a process that holds nothing else.
_REGISTERED = """
import json, torch
import transformers.integrations.torchao
known = torch.serialization.get_safe_globals()
print(json.dumps([one if isinstance(one, str) else f"{one.__module__}.{one.__qualname__}" for one in known]))
"""


def registered() -> list[str]:
    """Return the names of torchao's that torch.load lets through with `weights_only`, once transformers has imported it."""
    done = subprocess.run([sys.executable, "-c", _REGISTERED], capture_output=True, text=True, check=True)
    return sorted(name for name in json.loads(done.stdout.splitlines()[-1]) if name.startswith(f"{PACKAGE}."))


def weights() -> Iterator[tuple[str, Any]]:
    """Yield the kinds of torchao's configs that a processor quantizes by, each with a weight that was bfloat16."""
    library = import_module("torchao.quantization")
    base = import_module("torchao.core.config").AOBaseConfig
    known = {name: made for name, made in vars(library).items() if name.endswith("Config") and isinstance(made, type)}
    for name, made in sorted((name, made) for name, made in known.items() if issubclass(made, base)):
        asked = made()
        if issubclass(made, library.FqnToConfig) or hasattr(asked, "act_quant_scale"):
            continue  # configs of other configs, and those that calibration must fill
        layer = torch.nn.Linear(128, 128, bias=False, dtype=torch.bfloat16)
        try:
            library.quantize_(layer, asked)
        except (AssertionError, ImportError):
            continue  # for a card, or for a package that only cards have
        if type(layer.weight.data) is not torch.Tensor:
            yield name, layer.weight.data


def multiplies(weight: torch.Tensor) -> bool:
    """Say whether a weight multiplies activations in float16."""
    try:
        torch.nn.functional.linear(torch.ones(2, 128, dtype=torch.float16), weight)
    except RuntimeError:  # "expected m1 and m2 to have the same dtype"
        return False
    return True


def parts(weight: Any) -> list[torch.dtype]:
    """Return the dtypes of the tensors that a weight is made of."""
    return [getattr(weight, name).dtype for name in weight.__tensor_flatten__()[0]]


def answers() -> dict[str, Any]:
    """Ask the library that is installed."""
    made = dict(weights())

    def classes(holds: Callable[[Any], bool]) -> list[str]:
        return sorted({f"{type(one).__module__}.{type(one).__qualname__}" for one in made.values() if holds(one)})

    return {
        "version": version(PACKAGE),
        "registered": registered(),
        "kinds": sorted(made),
        "any_dtype": [name for name, one in made.items() if multiplies(one)],
        "any_dtype_once_cast": classes(lambda one: multiplies(one.to(torch.float16))),
        "cast": classes(lambda one: parts(one.to(torch.float16)) != parts(one)),
    }


if __name__ == "__main__":
    found = answers()
    rows = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
    RECORDED.write_text(f"{{\n{rows}\n}}\n")
