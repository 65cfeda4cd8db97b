"""Badges as a browser draws them: no text is squeezed or leaves its field, and nothing is fetched or run."""

from __future__ import annotations

from pathlib import Path

import pytest
from selenium import webdriver

from harness.core.units import GIB
from harness.report.export.badges import badges
from tests.support.builders import case, result

pytestmark = pytest.mark.browser

# The length that a text has by itself, the length that it is given, and where it ends in the picture.
MEASURE = """
return [...document.querySelectorAll('text')].map(text => {
  const given = text.textLength.baseVal.value;
  text.removeAttribute('textLength');
  const own = text.getComputedTextLength();
  text.setAttribute('textLength', given);
  const box = text.getBBox(), scale = text.getCTM().a;
  return [own * scale, given * scale, (box.x + box.width) * scale, text.ownerSVGElement.width.baseVal.value];
})
"""


@pytest.mark.parametrize(
    "name", ["chatglm-6b", "Qwen/Qwen2.5-0.5B-Instruct", "WWW_%%%@@@mm", "智谱清言-六十亿", "iljIJ'.,:;|f", "<b>x</b>"]
)
def test_a_text_fits_its_field(name: str, browser: webdriver.Chrome, tmp_path: Path) -> None:
    (badge,) = badges([result(case("int8", model=name), metrics={"ram_peak_bytes": 2.0 * GIB, "decode_tok_s": 23.1})])
    file = tmp_path / "badge.svg"
    file.write_text(badge.svg, encoding="utf-8")
    browser.get(file.as_uri())
    measured = browser.execute_script(MEASURE)
    loosest = 1.3 if name.isascii() else 1.7  # without a font of East Asia, browsers show narrower boxes in place of its letters
    assert len(measured) == 4  # each of the two with its shadow
    for own, given, end, width in measured:
        assert own <= given + 0.5
        assert given <= own * loosest + 4
        assert end <= width
