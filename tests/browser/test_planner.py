"""The planner's page in a real browser, from disk: the answers of `plan --json`, what was measured beside them, and bad input."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from harness.catalog import shipped
from harness.core import units
from tests.browser.pages import WIDTHS, cut, logged, overlapping, requested, violations
from tests.browser.planners import ASK, PATIENCE_S, answered, close, planned
from tests.browser.test_language import in_english
from tests.docs import tables

pytestmark = pytest.mark.browser


def ask(driver: Chrome, **fields: str) -> str:
    """Fill in fields by their names, ask, and return the answer."""
    driver.execute_script("document.getElementById('said').textContent = ''")
    for name, value in fields.items():
        field = driver.find_element(By.ID, name)
        if field.tag_name == "select":
            Select(field).select_by_value(value)
        else:
            field.clear()
            field.send_keys(value)
    driver.find_element(By.ID, "model").send_keys(Keys.ENTER)
    return answered(driver)


@pytest.mark.parametrize(
    "words",
    [
        ("chatglm-6b", "--gpu", "RTX 3060 12GB", "--ram", "32GiB"),
        ("qwen2.5-7b", "--gpu", "10.5GiB", "--ram", "16GiB", "--context", "4096"),
        ("smollm2-135m", "--ram", "2GiB"),
        ("gpt-oss-20b", "--gpu", "RTX 4090", "--ram", "64GiB"),
        ("llama-3.1-70b", "--gpu", "RTX 3060 12GB", "--ram", "16GiB"),
        ("qwen3-30b-a3b", "--gpu", "RTX 4060", "--ram", "64GiB", "--context", "8192"),
    ],
)
def test_an_answer_is_that_of_the_command_line(planner: Chrome, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = planner.execute_async_script(ASK, ["plan", *words, "--json"])
    assert err == ""
    found, wanted = json.loads(out), planned(capsys, *words)
    assert status == (0 if wanted["recommended"] else 1)
    assert close(found, wanted)


@pytest.fixture
def fresh(planner: Chrome, planner_site: Path) -> Chrome:
    """The planner as it is opened, in its usual size, light and in English; Python goes on where it runs already."""
    show(planner, 1280, "light")
    if planner.current_url.partition("#")[0] != (planner_site / "planner.html").as_uri():
        planner.get((planner_site / "planner.html").as_uri())
        answered(planner)
    planner.find_element(By.CSS_SELECTOR, "[data-lang=en]").click()
    planner.execute_script(
        "document.getElementById('ask').reset(); document.getElementById('model').value = 'chatglm-6b';"
        "document.getElementById('card').value = 'RTX 3060 12GB';"
    )
    ask(planner)
    return planner


def show(driver: Chrome, width: int, scheme: str) -> None:
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def test_the_page_says_what_the_plan_says(fresh: Chrome, capsys: pytest.CaptureFixture[str]) -> None:
    """Every figure of the answer and of the table is that of `plan --json`, written as everywhere else."""
    answer = ask(fresh, model="qwen2.5-7b", card="RTX 4060 8GB", ram="16", context="2048")
    wanted = planned(capsys, "qwen2.5-7b", "--gpu", "RTX 4060 8GB", "--ram", "16GiB", "--context", "2048")
    best = next(plan for plan in wanted["plans"] if plan["case"] == wanted["recommended"])
    speed, ready = best["decode_tok_s"], best["load_s"]["best"] + best["first_token_s"]["best"]
    rate = {end: units.significant(speed[end], 2) for end in speed}
    assert f"{rate['best']} tokens/s ({rate['low']}–{rate['high']})" in answer
    assert units.format_seconds(ready) in answer
    assert f"{best['max_context_tokens']:,} tokens" in answer
    rows = fresh.find_elements(By.CSS_SELECTOR, "table.plans tbody tr")
    plans = {plan["case"]: plan for plan in wanted["plans"]}
    told = {case: row for row in rows for case in str(row.get_attribute("data-cases")).split()}
    shown = ("fits", "tight", "too_big")
    assert told.keys() == {case for case, plan in plans.items() if plan["tiers"] and plan["verdict"] in shown}
    for case, row in told.items():
        cells = row.find_elements(By.TAG_NAME, "td")[2:]
        figures = {str(cell.get_attribute("data-label")): cell.get_property("textContent") for cell in cells}
        for name, tier in plans[case]["tiers"].items():
            if name != "disk":
                ends = [units.format_gib(tier[key]) for key in ("needed_bytes", "needed_high_bytes")]
                assert figures["RAM, GiB" if name == "cpu" else "GPU 0, GiB"] == "–".join(dict.fromkeys(ends))
        assert row.find_element(By.TAG_NAME, "th").get_property("textContent") == plans[case]["precision"]
    (chosen,) = fresh.find_elements(By.CSS_SELECTOR, "table.plans tr.chosen")
    assert wanted["recommended"] in str(chosen.get_attribute("data-cases"))


def test_what_would_be_faster_stands_below_the_answer_in_the_language_of_the_page(fresh: Chrome) -> None:
    ask(fresh, model="chatglm-6b-int4", card="RTX 3060 12GB", ram="32")
    below = "#answer > .answer + .why"
    note = fresh.find_element(By.CSS_SELECTOR, below).text
    said = re.fullmatch(r"Faster here: (\S+), the same model unpacked, fits as (\S+) \((\S+ tokens/s)\)\.", note)
    assert said is not None, note
    fresh.find_element(By.CSS_SELECTOR, "[data-lang=zh]").click()
    assert fresh.find_element(By.CSS_SELECTOR, below).text == "本机上更快：同一模型的未打包版本 {} 以 {} 装得下（{}）。".format(
        *said.groups()
    )


def test_an_answer_shows_what_was_measured_and_where(fresh: Chrome) -> None:
    links = fresh.find_elements(By.CSS_SELECTOR, ".receipts a")
    assert links
    nearest = fresh.find_element(By.CSS_SELECTOR, ".receipts li").text
    assert nearest.startswith("int8, direct")
    assert "VRAM" in nearest
    assert "RTX 3060" in nearest
    page, _, mark = str(links[0].get_attribute("href")).partition("#")
    assert f'id="{mark}"' in Path(page.removeprefix("file://").replace("%20", " ")).read_text(encoding="utf-8")


def test_what_was_never_measured_says_how_it_would_be(fresh: Chrome) -> None:
    ask(fresh, model="qwen2.5-0.5b", card="")
    said = fresh.find_element(By.CSS_SELECTOR, "section[aria-label=Measured]").text
    assert "No measurement of this model yet" in said
    assert "pytest cases/ --model qwen2.5-0.5b --precision" in said


def test_a_pasted_config_is_planned_as_the_command_line_plans_it(
    fresh: Chrome, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = json.dumps(shipped.catalog()["HuggingFaceTB/SmolLM2-135M"].config)
    (tmp_path / "config.json").write_text(text)
    paste(fresh, text)
    answer = answered(fresh)
    wanted = planned(capsys, str(tmp_path / "config.json"), "--gpu", "RTX 3060 12GB", "--ram", "32GiB")
    best = next(plan for plan in wanted["plans"] if plan["case"] == wanted["recommended"])
    tier = best["tiers"]["gpu:0"]
    assert f"GPU 0 {units.format_gib(tier['needed_bytes'])}–{units.format_gib(tier['needed_high_bytes'])} GiB" in answer
    assert "fitmatrix plan config.json --gpu 'RTX 3060 12GB' --ram 32GiB" in answer


def paste(driver: Chrome, text: str) -> None:
    script = """
    const field = document.getElementById("config");
    document.getElementById("said").textContent = "";
    field.value = arguments[0];
    field.dispatchEvent(new Event("input", { bubbles: true }));
    """
    driver.execute_script(script, text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{'model_type': 'llama'}", "This is no JSON: paste a whole config.json."),
        ('{"a": "' + "x" * (2 << 20) + '"}', "This has 2048 KiB, and a config.json has at most 1024: paste that file alone."),
        ('{"model_type": "of-nobody", "hidden_size": 8}', "no model of the catalog has the shape of this 'of-nobody'"),
        ('{"model_type": 7}', "gives 'model_type' as 7; it must be text"),
        ("[1]", "config.json: holds a JSON list, not an object"),
        ("<script>window.owned = 1</script>", "This is no JSON"),
    ],
)
def test_a_wrong_config_is_a_sentence_and_leaves_nothing_behind(fresh: Chrome, text: str, said: str) -> None:
    paste(fresh, text)
    shown = "return document.getElementById('said').textContent + document.querySelector('#answer').textContent"
    WebDriverWait(fresh, PATIENCE_S).until(lambda driver: said in driver.execute_script(shown))
    assert "Traceback" not in fresh.execute_script(shown)
    assert not fresh.execute_script("return window.owned")
    paste(fresh, "")
    assert "chatglm-6b" in answered(fresh)


def test_a_model_of_no_name_is_a_sentence(fresh: Chrome) -> None:
    fresh.find_element(By.ID, "model").clear()
    fresh.find_element(By.ID, "model").send_keys("of-nobody", Keys.ENTER)
    wanted = "No model of this name is known here: choose one of the list, or paste its config.json."
    WebDriverWait(fresh, PATIENCE_S).until(lambda driver: driver.find_element(By.ID, "said").text == wanted)


def test_it_asks_nobody_and_complains_of_nothing(planner: Chrome, planner_site: Path) -> None:
    for name in ("browser", "performance"):
        logged(planner, name)
    planner.get("about:blank")
    planner.get((planner_site / "planner.html").as_uri())
    answered(planner)
    assert {address.partition(":")[0] for address in requested(planner)} <= {"file", "blob", "data", "about"}
    assert logged(planner, "browser") == []


def test_an_answer_has_an_address(planner: Chrome, planner_site: Path) -> None:
    planner.get("about:blank")
    planner.get(f"{(planner_site / 'planner.html').as_uri()}#model=qwen2.5-7b&card=size&vram=7.5&ram=24")
    answer = answered(planner)
    assert "fitmatrix plan qwen2.5-7b --gpu 7.5GiB --ram 24GiB" in answer
    assert "of 7.50 GiB free" in answer


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 360)])
def test_axe_core_finds_nothing_and_a_narrow_screen_shows_all(fresh: Chrome, axe: str, scheme: str, width: int) -> None:
    show(fresh, width, scheme)
    assert violations(fresh, axe) == []
    assert [*cut(fresh), *overlapping(fresh)] == []
    scrolled, visible = fresh.execute_script("const page = document.documentElement; return [page.scrollWidth, page.clientWidth]")
    assert scrolled <= visible
    for control in fresh.find_elements(By.CSS_SELECTOR, "button, select, input, summary"):
        if control.is_displayed():
            assert min(control.rect["width"], control.rect["height"]) >= 24, control.get_attribute("outerHTML")


def test_it_speaks_chinese_and_back(fresh: Chrome) -> None:
    fresh.find_element(By.CSS_SELECTOR, "[data-lang=zh]").click()
    answer = fresh.find_element(By.ID, "answer").text
    for words in ("放得下", "权重", "全部方式", "实测", "命令行", "每个 token 从显存读取"):
        assert words in answer
    assert fresh.find_element(By.ID, "said").text.startswith("用时")
    ask(fresh, model="qwen2.5-0.5b")
    assert "此模型还没有实测结果" in fresh.find_element(By.ID, "answer").text
    fresh.find_element(By.CSS_SELECTOR, "[data-lang=en]").click()
    assert "No measurement of this model yet" in fresh.find_element(By.ID, "answer").text


def test_the_commands_that_it_shows_can_be_pasted(fresh: Chrome, request: pytest.FixtureRequest) -> None:
    ask(fresh, model="qwen2.5-0.5b", card="RTX 4060 8GB", ram="16", context="2048")
    codes = [part.get_property("textContent") for part in fresh.find_elements(By.CSS_SELECTOR, "#answer code")]
    lines = [line for code in codes for line in str(code).splitlines() if line.startswith(("fitmatrix ", "pytest "))]
    programs = {" ".join(line.split()[:2]) for line in lines}
    assert programs == {"fitmatrix plan", "fitmatrix share", "pytest cases/"}
    for line in lines:
        words = shlex.split(line)
        if words[0] == "fitmatrix":
            assert callable(tables.parsed(words[1:]).command), line
        else:
            assert request.config._parser.parse_known_and_unknown_args(words[1:])[1] == [], line


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_chinese_is_whole_at_every_width(fresh: Chrome, axe: str, width: int, scheme: str) -> None:
    fresh.find_element(By.CSS_SELECTOR, "[data-lang=zh]").click()
    show(fresh, width, scheme)
    scrolled = fresh.execute_script("const all = document.documentElement; return all.scrollWidth - all.clientWidth")
    assert scrolled <= 0
    assert cut(fresh) == []
    assert in_english(fresh, []) == []
    assert violations(fresh, axe) == []


def test_files_that_are_missing_beside_the_page_are_told(planner: Chrome, planner_site: Path, tmp_path: Path) -> None:
    (tmp_path / "planner.html").write_bytes((planner_site / "planner.html").read_bytes())
    planner.get((tmp_path / "planner.html").as_uri())
    planner.execute_script("localStorage.clear()")  # another test may have read it in Chinese
    planner.refresh()
    wanted = "The planner's files beside this page did not load: open it from its folder or its site, whole."
    WebDriverWait(planner, PATIENCE_S).until(lambda driver: driver.find_element(By.ID, "said").text == wanted)


def test_the_page_is_small_beside_the_runtime(planner_site: Path) -> None:
    assert (planner_site / "planner.html").stat().st_size + (planner_site / "planner/fitmatrix.js").stat().st_size < 3_000_000


def test_every_page_of_the_site_leads_to_it_first(planner_site: Path) -> None:
    pages = [page for page in planner_site.rglob("*.html") if page.name != "planner.html"]
    assert len(pages) > 4
    for page in pages:
        up = "../" * (len(page.relative_to(planner_site).parts) - 1)
        assert f'aria-label="Site"><a href="{up}planner.html">Plan a model</a>' in page.read_text(encoding="utf-8"), page


def test_a_config_may_be_a_file_of_its_size(fresh: Chrome, tmp_path: Path) -> None:
    (tmp_path / "large.json").write_bytes(b" " * (100 << 20))
    (tmp_path / "config.json").write_text(json.dumps(shipped.catalog()["Qwen/Qwen2.5-0.5B"].config))
    fresh.find_element(By.CSS_SELECTOR, ".paste summary").click()
    field = fresh.find_element(By.ID, "file")
    field.send_keys(str(tmp_path / "large.json"))
    wanted = "This has 102400 KiB, and a config.json has at most 1024: paste that file alone."
    WebDriverWait(fresh, PATIENCE_S).until(lambda driver: driver.find_element(By.ID, "said").text == wanted)
    assert fresh.find_element(By.ID, "config").get_property("value") == ""
    field.send_keys(str(tmp_path / "config.json"))
    assert "fitmatrix plan config.json" in answered(fresh)
    fresh.find_element(By.CSS_SELECTOR, ".paste summary").click()


def test_the_front_door_leads_to_it_for_other_cards(planner: Chrome, planner_site: Path) -> None:
    planner.get((planner_site / "index.html").as_uri())
    planner.find_element(By.CSS_SELECTOR, "#mine ~ p").find_element(By.LINK_TEXT, "Plan a model").click()
    assert planner.find_element(By.TAG_NAME, "h1").text == "Plan a model for your machine"
