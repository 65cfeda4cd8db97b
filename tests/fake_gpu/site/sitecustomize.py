"""Put fake cards into every Python that finds this folder: torch is said to be built for CUDA, and workers run on the cards.

FAKE_CODE, a pattern and what to put in its place, separated by a tab, has workers run other loading code than was planned: what a
library does that takes no notice of what it was told.
"""

from __future__ import annotations

import importlib.machinery
import os
import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import msgspec
import pynvml


def _in_the_parent(module: ModuleType) -> None:
    cards = [
        module.TorchDevice(name=pynvml.name(at), total_bytes=size, architecture="sm_80") for at, size in enumerate(pynvml.SIZES)
    ]
    module.torch_build = lambda: module.TorchBuild(version="2.13.0", cuda="13.0")  # type: ignore[attr-defined]
    seen = module.Seen(kind="cuda", cards=tuple(cards), architectures=("sm_80",))
    module.ask_torch = lambda *_, **__: seen  # type: ignore[attr-defined]


def _in_the_worker(module: ModuleType) -> None:
    load = module.load

    def load_other(request: Any, *given: Any) -> Any:
        pattern, _, other = os.environ["FAKE_CODE"].partition("\t")
        return load(msgspec.structs.replace(request, code=re.sub(pattern, other, request.code, flags=re.DOTALL)), *given)

    module.load = _on_cards(load_other if os.environ.get("FAKE_CODE") else load)  # type: ignore[attr-defined]
    module.cap_vram = _on_cards(module.cap_vram)  # type: ignore[attr-defined]


def _on_cards(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*given: Any, **named: Any) -> Any:
        from tests.fake_gpu import cards

        cards.put_in()
        return function(*given, **named)

    return run


_CHANGED = {"harness.machine.accelerators": _in_the_parent, "harness.worker.model": _in_the_worker}


class Finder:
    """Finds the two modules where they are, and changes them once they are imported."""

    @staticmethod
    def find_spec(name: str, path: Any = None, _target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Find one of the modules that are changed."""
        if name not in _CHANGED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _CHANGED[name](module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if os.environ.get("FAKE_CARDS") and "harness.worker.trace" not in sys.orig_argv:  # which makes a card of its own
    sys.meta_path.insert(0, Finder)  # a class does as well as an instance
