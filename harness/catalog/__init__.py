"""From a model's name to its files: resolve it, download it, make it once, tell it from others."""

from __future__ import annotations


def __getattr__(name: str) -> object:
    """Hand on `fetch`, which printed code imports from here."""
    if name == "fetch":
        from harness.catalog.download import fetch

        return fetch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
