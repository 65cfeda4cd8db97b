"""What the package brings along as files: models, cards, constants, questions, texts of the page."""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).parent
