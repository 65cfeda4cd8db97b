"""The page in Chinese: nothing that it says itself is left in English, what it quotes stays, and English comes back as it was."""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec
import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from harness.core.records import Result
from tests.browser.pages import Open, case_of, cell, logged, many, settled, violations
from tests.browser.test_accessible import few

__all__ = ["few"]
pytestmark = pytest.mark.browser

# Texts and attributes as a reader gets them, but for what is quoted.
SEEN = """
const quoted = "bdi, code, pre, q, data, datalist, script, style, noscript, .strip, .names, [translate=no]";
const found = new Set();
const walk = (element) => {
  if (element.matches(quoted)) return;
  for (const name of ["aria-label", "title", "placeholder"]) found.add(element.getAttribute(name) ?? "");
  for (const node of element.childNodes) node.nodeType === 1 ? walk(node) : node.nodeType === 3 && found.add(node.data);
};
walk(document.documentElement);
return [...found];
"""
# What Chinese engineers write as it is.
KEPT = (
    r"fitmatrix|publish|JSON|UTC|id|config\.json|[KMGT]iB|bytes|tokens?|tokens/s|ms|min|GB|GB/s|MHz|CPU|GPU|KV|KL|NVML|PCIe|dtype|"
    "Linear|device map|nats?|batch|float32|bfloat16|bitsandbytes|LLM|int8|nf4|fp4|torchao|optimum|quanto|accelerate|transformers|"
    "torch|GPTQ|AWQ|HQQ|GGUF|ChatGLM-6B|"
    "VmHWM|smaps|load_s|first_token_s|generate|Ctrl|CUDA|Linux|"
    r"gpu:\d|cpu|python|fp32|bf16|fp16|int4|\d+x"
)
CALLS = r"torch\.cuda\.max_memory_allocated|AutoTokenizer\.from_pretrained|load_checkpoint_and_dispatch"
SNAPSHOT = "return document.documentElement.outerHTML"


@pytest.fixture(autouse=True)
def forgotten(browser: Chrome) -> Iterator[None]:
    """Forget the language that a test chose, so that the next page is in that of the reader."""
    yield
    browser.execute_script("localStorage.removeItem('fitmatrix-language')")


def choose(browser: Chrome, language: str) -> None:
    browser.find_element(By.CSS_SELECTOR, f"[data-lang={language}]").click()
    settled(browser)


def in_english(browser: Chrome, results: list[Result]) -> list[str]:
    """List what the page says in English: words that are neither names in the results nor kept by Chinese readers."""
    names = {result.case.model for result in results} | {result.machine.name for result in results}
    names |= {gpu.model for result in results for gpu in result.machine.gpus if gpu.model}
    names |= {name for result in results for name in (result.case.place, result.case.precision, *result.environment)}
    names |= {reason for result in results for reason in result.noisy.values()}
    names_first = sorted(map(re.escape, names), key=len, reverse=True)
    kept = re.compile(rf"(?<![A-Za-z])(?:{CALLS}|{'|'.join(names_first)}|{KEPT})(?![A-Za-z])")
    texts: list[str] = browser.execute_script(SEEN)
    return sorted({text.strip() for text in texts if re.search("[A-Za-z]{2}", kept.sub("", text))})


@pytest.mark.parametrize("copies", [1, 2])
def test_nothing_is_left_in_english(show: Open, results: list[Result], copies: int) -> None:
    shown = many(results, copies) if copies > 1 else results
    browser = show(shown, fragment="lang=zh")
    browser.execute_script("document.querySelectorAll('.unpack').forEach((button) => button.click())")
    settled(browser)
    assert browser.find_element(By.TAG_NAME, "html").get_attribute("lang") == "zh-Hans"
    assert len(browser.find_elements(By.CSS_SELECTOR, "details.case .lead")) >= len(shown) // 2
    assert browser.title == "各机器能装下哪些模型 · fitmatrix"
    assert in_english(browser, shown) == []
    assert logged(browser, "browser") == []


def test_one_model_is_answered_in_chinese(show: Open, results: list[Result]) -> None:
    shown = [result for result in results if result.machine.gpus]
    browser = show(shown, fragment="lang=zh")
    assert browser.find_element(By.CSS_SELECTOR, ".answer .say").text == (
        "本机装得下 chatglm-6b：int4 放在 gpu:0（放置方式 direct：直接加载到 GPU），占用 5.61 / 11.6 GiB 显存，"
        "19.7 tokens/s，21.9 s 就绪，回答正常。"
    )
    assert cell(browser, "int4", "direct").text.splitlines()[:2] == ["可用", "推荐"]
    assert cell(browser, "fp16", "direct").find_element(By.CSS_SELECTOR, ".why").get_attribute("textContent") == (
        "gpu:0 装不下：需要 12.0 GiB（权重 11.5，KV 0.1，额外开销 0.5），可用 11.6。可试 --precision int8 或 --placement gpu+cpu。"
    )
    judged = browser.find_element(By.CSS_SELECTOR, "#case-chatglm-6b-int4-direct .judged bdi").get_attribute("textContent")
    assert judged == "困惑度比参照高 1.8 %，下一 token 一致率 93.1 %，KL 散度 0.031，没有丢失答案"
    assert in_english(browser, shown) == []


@pytest.mark.parametrize("fragment", ["", "order=fastest", "precision=int4", "case-chatglm-6b-int4-direct"])
def test_english_comes_back_as_it_was(show: Open, results: list[Result], fragment: str) -> None:
    browser = show([result for result in results if result.machine.gpus], fragment=fragment)
    settled(browser)
    before = browser.execute_script(SNAPSHOT)
    choose(browser, "zh")
    assert browser.execute_script(SNAPSHOT) != before
    choose(browser, "en")
    assert browser.execute_script(SNAPSHOT) == before


def test_a_link_keeps_the_language_and_a_choice_is_remembered(show: Open, few: list[Result]) -> None:
    browser = show(few)
    choose(browser, "zh")
    assert browser.current_url.endswith("#lang=zh")
    browser.find_element(By.CSS_SELECTOR, ".block:not(.fine) .cell > a").click()
    settled(browser)
    assert browser.current_url.endswith("&lang=zh")
    assert show(few).find_element(By.ID, "theme").text == "◐ 自动"
    assert show(few, fragment="lang=en").find_element(By.ID, "theme").text == "◐ auto"


def test_a_reader_of_chinese_gets_chinese(show: Open, few: list[Result]) -> None:
    browser = show(few)
    agent = browser.execute_script("return navigator.userAgent")
    browser.execute_cdp_cmd("Emulation.setUserAgentOverride", {"userAgent": agent, "acceptLanguage": "zh-CN"})
    try:
        assert show(few).find_element(By.ID, "theme").text == "◐ 自动"
    finally:
        browser.execute_cdp_cmd("Emulation.setUserAgentOverride", {"userAgent": agent, "acceptLanguage": "en-US"})


def test_chinese_works_where_nothing_may_be_kept(show: Open, few: list[Result]) -> None:
    browser = show(few)
    forbid = "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError'); }})"
    added = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": forbid})
    try:
        show(few)
        choose(browser, "zh")
        assert browser.find_element(By.ID, "theme").text == "◐ 自动"
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
        show(few)


def test_what_a_result_says_of_noise_and_of_the_slowest_part_is_said_in_chinese(show: Open, results: list[Result]) -> None:
    """Several reasons stand side by side, and what belongs to one of them does not reach over the others."""
    one = case_of(results, "chatglm-6b/int4/direct")
    assert one.estimate is not None
    noisy = {
        "ready_s": "others used 1.4 of 2 cores during loading; others used 1.5 of 2 cores during cold round",
        "decode_tok_s": "standard deviation 19.7 % of the mean over 9 rounds; others used 1.5 of 2 cores in 9 of 9 warm rounds",
    }
    estimate = msgspec.structs.replace(one.estimate, bound_by="reads 0.256 GiB a token from RAM")
    browser = show([msgspec.structs.replace(one, noisy=noisy, estimate=estimate)], fragment="lang=zh")
    settled(browser)
    text = browser.execute_script("return document.documentElement.textContent")
    assert "加载阶段其他进程占用 2 个核中的 1.4 个；冷启动阶段其他进程占用 2 个核中的 1.5 个" in text
    assert "9 轮的标准差为均值的 19.7 %；预热后 9 轮中有 9 轮其他进程占用 2 个核中的 1.5 个" in text
    assert "每个 token 从内存读取 0.256 GiB" in text


def test_filters_order_tooltip_and_copy_speak_chinese(show: Open, results: list[Result]) -> None:
    browser = show([result for result in results if result.machine.gpus], fragment="lang=zh")
    browser.execute_script("document.querySelector('td.best > a').focus()")
    assert browser.find_element(By.ID, "tip").text == "需要 5.61 / 11.6 GiB 显存（实测）。预测：装得下。"
    field = "const field = document.querySelector('#filters').elements[arguments[0]]; field.value = arguments[1]; "
    change = field + "field.dispatchEvent(new Event('change', { bubbles: true }))"
    browser.execute_script(change, "precision", "int4")
    settled(browser)
    assert browser.find_element(By.CSS_SELECTOR, ".found").text == "7 / 35 个用例；可用的最快组合：int4 / direct，19.7 tokens/s"
    browser.execute_script(change, "order", "least")
    settled(browser)
    assert browser.find_element(By.CSS_SELECTOR, ".cards .cell > a").text == "可用"
    button = browser.find_element(By.CSS_SELECTOR, "button.copy")
    assert (button.text, button.get_attribute("aria-label")) == ("复制", "复制加载代码")
    button.click()
    settled(browser)
    assert button.text in ("已复制", "请按 Ctrl+C")
    choose(browser, "en")
    assert browser.find_element(By.CSS_SELECTOR, ".found").text.startswith("7 of 35 cases; the fastest that works: int4 / direct")
    assert browser.find_element(By.CSS_SELECTOR, ".cards .cell > a").text == "works"


def test_names_are_not_translated(show: Open, results: list[Result]) -> None:
    replace = msgspec.structs.replace
    result = case_of(results, "chatglm-6b/int4/direct")
    case = replace(result.case, model="works", precision="too big", placement="fits")
    named = replace(result, case=case, machine=replace(result.machine, name="out of memory"), command="copy", code="ready")
    browser = show([named, replace(named, case=replace(case, precision="{1} {n} {word}"))], fragment="lang=zh")
    assert browser.find_element(By.CSS_SELECTOR, "h1").text == "works @ out of memory"
    assert (
        " ".join((browser.find_element(By.CSS_SELECTOR, "h2").get_attribute("textContent") or "").split())
        == "works @ out of memory"
    )
    heads = [head.text for head in browser.find_elements(By.CSS_SELECTOR, ".matrix :is(th bdi)")]
    assert sorted(heads) == ["fits", "too big", "{1} {n} {word}"]
    options = [option.get_attribute("textContent") for option in browser.find_elements(By.CSS_SELECTOR, "#filters [translate=no]")]
    assert set(options) >= {"fits", "too big"}
    assert browser.find_element(By.CSS_SELECTOR, ".answer code").get_attribute("textContent") == "ready"
    names = browser.find_elements(By.CSS_SELECTOR, ".case .name")
    assert {name.text for name in names} == {"too big fits", "{1} {n} {word} fits"}


def test_hostile_texts_stay_text(show: Open, attacked: list[Result]) -> None:
    browser = show(attacked, fragment="lang=zh")
    settled(browser)
    choose(browser, "en")
    choose(browser, "zh")
    assert browser.execute_script("return window.owned") is None
    assert browser.find_elements(By.CSS_SELECTOR, "img") == []


@pytest.mark.parametrize("width", [1280, 360])
def test_axe_core_finds_nothing_in_chinese(show: Open, few: list[Result], axe: str, width: int) -> None:
    browser = show(few, width=width, fragment="lang=zh")
    assert violations(browser, axe) == []
    browser.execute_script("document.querySelectorAll('details').forEach((part) => (part.open = true))")
    assert violations(browser, axe) == []


@pytest.mark.parametrize("fragment", ["lang=zh", "order=least&lang=zh"])
def test_nothing_scrolls_sideways_in_chinese(show: Open, results: list[Result], fragment: str) -> None:
    browser = show(many(results, 2), width=360, fragment=fragment)
    scrolled, visible = browser.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert scrolled <= visible


def test_what_stays_english_says_so(show: Open, results: list[Result]) -> None:
    browser = show([result for result in results if result.machine.gpus], fragment="lang=zh")
    assert browser.find_element(By.CSS_SELECTOR, "h2 bdi").get_attribute("lang") == "en"
    assert cell(browser, "bf16", "auto").find_element(By.CSS_SELECTOR, ".why bdi").get_attribute("lang") != "en"
    answers = browser.find_elements(By.CSS_SELECTOR, "#case-chatglm-6b-int4-direct .answers q")
    said = {answer.get_attribute("textContent"): answer.get_attribute("lang") for answer in answers}
    assert (said["Paris"], said["巴黎"]) == ("en", "")
