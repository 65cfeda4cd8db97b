"""The page of a chat in a real browser: what it shows of the model, what its buttons do, and that it asks nobody else."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from tests.browser.pages import logged, requested, violations
from tests.cli.test_chat import free_port, serving
from tests.support import small_models

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio, the extra chat")
LETTERS = 96
TURNS = "#talked [data-testid=user], #talked [data-testid=bot]"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve a small Llama of random weights that speaks in letters."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    small_models.save("llama", folder, vocab_size=LETTERS, max_position_embeddings=200, eos_token_id=0)
    small_models.write_letters(folder, LETTERS)
    port = free_port()
    with serving(folder, port) as (_, told):
        assert told.startswith("Chat with ")
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture
def page(browser: webdriver.Chrome, url: str) -> webdriver.Chrome:
    for name in ("browser", "performance"):
        logged(browser, name)
    browser.get(url)
    until(browser, lambda: bool(browser.find_elements(By.CSS_SELECTOR, "#message textarea")))
    return browser


def until(page: webdriver.Chrome, is_so: Callable[[], bool]) -> None:
    WebDriverWait(page, 180, ignored_exceptions=[StaleElementReferenceException]).until(lambda _: is_so())


def said(page: webdriver.Chrome) -> list[str]:
    return list(page.execute_script("return [...document.querySelectorAll(arguments[0])].map(one => one.innerText)", TURNS))


def shown(page: webdriver.Chrome) -> str:
    return page.find_element(By.TAG_NAME, "body").text


def say(page: webdriver.Chrome, words: str) -> None:
    box = page.find_element(By.CSS_SELECTOR, "#message textarea")
    box.clear()
    box.send_keys(words, Keys.ENTER)


def press(page: webdriver.Chrome, name: str) -> None:
    button(page, name).click()


def test_a_turn_shows_case_speed_memory_and_context_and_asks_nobody_else(page: webdriver.Chrome, url: str) -> None:
    say(page, "Hello")
    until(page, lambda: "Cut at 12 tokens." in shown(page))
    text = shown(page)
    assert len(said(page)) == 2
    assert "loaded as tiny/fp32/cpu" in text
    assert "17 of 200 tokens of context" in text
    assert "tokens/s" in text
    assert "RAM " in text
    assert "planned at most" in text
    assert {address.split("/")[2] for address in requested(page)} == {url.split("/")[2]}
    assert not [entry for entry in logged(page, "browser") if entry["level"] == "SEVERE"]


def test_a_long_message_comes_back_to_be_shortened_and_ends_nothing(page: webdriver.Chrome) -> None:
    say(page, "x" * 300)
    until(page, lambda: "Not sent: this takes 300 tokens, and there is room for 188: shorten it." in shown(page))
    assert said(page) == []
    assert page.find_element(By.CSS_SELECTOR, "#message textarea").get_attribute("value") == "x" * 300
    say(page, "Hello")
    until(page, lambda: "Cut at" in shown(page))
    assert len(said(page)) == 2


def test_nothing_said_is_not_sent(page: webdriver.Chrome) -> None:
    say(page, "   ")
    press(page, "Send")
    press(page, "Regenerate")
    say(page, "Hello")
    until(page, lambda: "Cut at" in shown(page))
    assert len(said(page)) == 2


def test_every_button_does_something(page: webdriver.Chrome) -> None:
    say(page, "Hello")
    until(page, lambda: "Cut at" in shown(page))
    first = said(page)
    press(page, "Regenerate")
    until(page, lambda: said(page) == first and "Cut at" in shown(page))
    unnamed = [one for one in page.find_elements(By.TAG_NAME, "button") if one.is_displayed() and not one.text]
    assert {one.get_attribute("aria-label") for one in unnamed} == {"Copy message"}
    press(page, "New conversation")
    until(page, lambda: said(page) == [] and "0 of 200 tokens of context" in shown(page))
    say(page, "Hello")
    until(page, lambda: len(said(page)) == 2)
    press(page, "New conversation")  # while an answer is written
    until(page, lambda: said(page) == [] and "0 of 200 tokens of context" in shown(page))


def button(page: webdriver.Chrome, name: str) -> WebElement:
    return next(one for one in page.find_elements(By.TAG_NAME, "button") if one.text == name)


# Keep each look that the button which ends an answer has had, frame by frame: an answer of a small model is there at once.
LOOKS = """
window.looks = []
const note = () => {
  const stop = [...document.querySelectorAll('button')].find(one => one.innerText === 'Stop')
  const now = stop.disabled ? 'idle' : stop.classList.contains('stop') ? 'red' : 'another'
  if (window.looks.at(-1) !== now) window.looks.push(now)
  requestAnimationFrame(note)
}
note()
"""


def test_stop_can_be_pressed_and_is_red_only_while_an_answer_is_written(page: webdriver.Chrome) -> None:
    def looks() -> list[str]:
        return list(page.execute_script("return window.looks"))

    page.execute_script(LOOKS)
    say(page, "Hello")
    until(page, lambda: looks() == ["idle", "red", "idle"])
    assert "Cut at" in shown(page)
    press(page, "Regenerate")
    until(page, lambda: looks() == ["idle", "red", "idle", "red", "idle"])
    say(page, "x" * 300)
    until(page, lambda: "Not sent" in shown(page) and looks()[-1] == "idle")
    assert set(looks()) == {"idle", "red"}


def test_stop_ends_an_answer_and_the_next_is_given(page: webdriver.Chrome) -> None:
    say(page, "Hello")
    until(page, lambda: len(said(page)) == 2)
    press(page, "Stop")
    until(page, lambda: "Stopped." in shown(page) or "Cut at" in shown(page))
    press(page, "Regenerate")
    until(page, lambda: "Cut at" in shown(page) and len(said(page)) == 2)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_read_it_and_know_what_the_box_is_for(page: webdriver.Chrome, axe: str, scheme: str) -> None:
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    page.refresh()
    until(page, lambda: bool(page.find_elements(By.CSS_SELECTOR, "#message textarea")))
    press(page, "Settings\n▼")
    until(page, lambda: "System prompt" in shown(page))
    assert page.find_element(By.CSS_SELECTOR, "#message textarea").accessible_name == "Message"
    assert [one for one in violations(page, axe) if "color-contrast" in str(one)] == []
