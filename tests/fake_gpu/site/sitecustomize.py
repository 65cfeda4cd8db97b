"""Put fake cards into every Python that finds this folder: torch is said to be built for CUDA, and workers run on the cards."""

from __future__ import annotations

import importlib.machinery
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def _in_the_parent(module: ModuleType) -> None:
    count, _, gib = os.environ["FAKE_CARDS"].partition("x")
    card = module.TorchDevice(name="NVIDIA A100-SXM4-80GB", total_bytes=int(float(gib) * (1 << 30)), architecture="sm_80")
    module.torch_build = lambda: module.TorchBuild(version="2.13.0", cuda="13.0")  # type: ignore[attr-defined]
    seen = module.Seen(kind="cuda", cards=(card,) * int(count), architectures=("sm_80",))
    module.ask_torch = lambda *_, **__: seen  # type: ignore[attr-defined]


def _in_the_worker(module: ModuleType) -> None:
    for name in ("load", "cap_vram"):
        setattr(module, name, _on_cards(getattr(module, name)))


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
