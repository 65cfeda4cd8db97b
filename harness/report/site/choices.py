"""What runs on a card, as rows of the front door's table: there are thousands, so each is written once, with its model's page."""

from __future__ import annotations

from typing import Any

from harness.report.page import render
from harness.report.site.rows import Row

SITE_STYLES = ("site.css",)  #: what pages of a site add to the style


def write_choice(row: Row) -> str:
    """Write a way that works and was measured as a row of HTML, for the page at the root of the site."""
    parts: Any = render.template("site_parts.html.j2", *SITE_STYLES).module
    return str(parts.choice(row, ""))
