"""``planner serve`` in a real browser: from the form to the review, at a phone's width and a desk's."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")

from tests.page.browser import Browser, needs_browser, started
from tests.page.test_page import HOSTILE

pytestmark = needs_browser
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_hidden_layers": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
DROP = """
const [text, name] = arguments;
const data = new DataTransfer();
data.items.add(new File([text], name, {type: 'application/json'}));
for (const kind of ['dragover', 'drop']) {
  document.body.dispatchEvent(new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}));
}
"""


@pytest.fixture(scope="module")
def origin() -> Iterator[str]:
    from planner.web import server

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        own = server.uvicorn.Server(server.configuration("127.0.0.1", 0, 1))
        thread = threading.Thread(target=own.run, args=([listening],))
        thread.start()
        while not own.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        own.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started() as one:
        one.driver.implicitly_wait(20)
        yield one


def write(browser: Browser, **texts: str) -> None:
    for name, text in texts.items():
        field = browser.driver.find_element("id", name)
        field.clear()
        field.send_keys(text)


def press(browser: Browser, text: str) -> None:
    """Presses a button, and waits for the page that it leads to."""
    old = browser.driver.find_element("tag name", "html")
    browser.driver.find_element("xpath", f"//button[text()='{text}']").click()
    for _ in range(600):
        try:
            if old.id != browser.driver.find_element("tag name", "html").id and browser.run(
                "return document.readyState === 'complete'"
            ):
                return
        except Exception:  # between two pages
            pass
        time.sleep(0.05)
    raise AssertionError(f"{text} leads nowhere")


def well(browser: Browser, origin: str) -> None:
    """No complaint, no request that leaves the origin, nothing wider than the screen."""
    assert browser.complaints() == []
    assert all(one.startswith((f"{origin}/", "data:")) for one in browser.requests())
    assert browser.run("return document.documentElement.scrollWidth - window.innerWidth") <= 0
    assert browser.run("return window.hacked") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_from_the_form_to_the_review(width: int, scheme: str, origin: str, browser: Browser) -> None:
    browser.shape(width, scheme)
    browser.open(f"{origin}/")
    for fold in browser.driver.find_elements("css selector", "form details > summary"):
        fold.click()
    well(browser, origin)
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    write(browser, model="llama-2-7b", gpus="8xH100", seq_length="4096", tensor_parallel="1,2")
    press(browser, "Search")
    assert "model=llama-2-7b&gpus=8xH100&seq_length=4096&tensor_parallel=1%2C2" in browser.driver.current_url
    assert browser.run("return document.querySelectorAll('#ranking tbody tr').length") == 10
    assert "llama-2-7b fits on 8 x H100" in browser.driver.find_element("id", "answer").text
    well(browser, origin)
    write(browser, title="For Monday", note="Two lines\nof notes")
    press(browser, "Review page")
    assert browser.run("return document.querySelector('h1').textContent") == "For Monday"
    assert browser.run("return document.querySelector('.note').textContent") == "Two lines\nof notes"
    charts = browser.run("return document.querySelectorAll('[data-chart] svg, [data-chart] canvas').length")
    assert charts == browser.run("return document.querySelectorAll('[data-chart]').length") >= 4
    well(browser, origin)
    browser.driver.back()
    browser.driver.find_element("css selector", "#change summary").click()
    assert browser.driver.find_element("id", "seq_length").get_attribute("value") == "4096"
    assert browser.driver.find_element("id", "go").is_enabled()


def test_a_form_with_a_mistake_comes_back_with_it(origin: str, browser: Browser) -> None:
    browser.shape(390, "light")
    browser.open(f"{origin}/")
    write(browser, model="gpt2-xll", gpus="8xH100")
    press(browser, "Search")
    assert "did you mean gpt2-xl" in browser.driver.find_element("id", "problem").text
    model = browser.driver.find_element("id", "model")
    assert (model.get_attribute("value"), model.get_attribute("aria-invalid")) == ("gpt2-xll", "true")
    assert [line for line in browser.complaints() if "status of 422" not in line] == []
    browser.driver.find_element("link text", "To the field: model").click()
    assert browser.run("return location.hash") == "#model"
    write(browser, model="gpt2-xl", gpus="8xH100")
    press(browser, "Search")
    assert "gpt2-xl fits" in browser.driver.find_element("id", "answer").text
    well(browser, origin)


def test_a_change_that_fits_is_a_link_away(origin: str, browser: Browser) -> None:
    browser.shape(1440, "light")
    browser.open(f"{origin}/search?model=llama-2-7b&gpus=1xA100-SXM-40GB&tensor_parallel=1")
    assert "does not fit" in browser.driver.find_element("id", "answer").text.lower()
    well(browser, origin)
    browser.driver.find_element("css selector", "#ranking tbody a").click()
    assert browser.run("return document.querySelector('#answer').className") == "fits"


@pytest.mark.parametrize("words", HOSTILE)
def test_hostile_names_and_notes_are_shown_as_text(words: str, origin: str, browser: Browser) -> None:
    browser.shape(390, "dark")
    browser.open(f"{origin}/")
    browser.driver.find_element("css selector", "#own summary").click()
    config = json.dumps({**CONFIG, "_name_or_path": words})
    browser.run("document.getElementById('config').value = arguments[0]", config)
    write(browser, gpus="2xA100", global_batch_size="8")
    press(browser, "Search")
    shown = "".join(c if c.isprintable() else "?" for c in words).strip()[:80]
    assert shown in browser.run("return document.querySelector('h1').textContent")
    assert shown in browser.run("return document.querySelector('#answer').textContent")
    assert browser.run("return document.querySelectorAll('script').length") == 1
    well(browser, origin)
    for name in ("title", "note"):
        browser.run("document.getElementById(arguments[0]).value = arguments[1].slice(0, 300)", name, words)
    press(browser, "Review page")
    assert shown in browser.run("return document.querySelector('h1').textContent")
    assert shown in browser.run("return document.querySelector('.note').textContent")
    assert browser.run("return document.querySelectorAll('script').length") == 3
    well(browser, origin)


def test_a_config_is_dropped_or_chosen(origin: str, browser: Browser, tmp_path: Path) -> None:
    browser.shape(1440, "light")
    text = json.dumps(CONFIG, indent=2)
    file = tmp_path / "config.json"
    file.write_text(text)
    for number in range(2):
        browser.open(f"{origin}/")
        write(browser, model="llama-65b", gpus="2xA100", global_batch_size="8")
        if number:
            browser.driver.find_element("css selector", "#own summary").click()
            browser.driver.find_element("id", "file").send_keys(str(file))
        else:
            browser.run(DROP, text, "config.json")
        for _ in range(100):
            if browser.run("return document.getElementById('taken').textContent"):
                break
            time.sleep(0.05)
        taken = f"config.json is taken, {len(text)} bytes."
        assert browser.run("return document.getElementById('taken').textContent") == taken
        assert browser.run("return document.getElementById('config').value") == text
        assert browser.run("return document.getElementById('model').value") == ""
        press(browser, "Search")
        assert "pasted model fits on 2 x A100" in browser.driver.find_element("id", "answer").text
        well(browser, origin)
    browser.open(f"{origin}/")
    browser.run(DROP, "x" * 70_000, "<b>large</b>.json")
    assert "<b>large</b>.json has 70,000 bytes" in browser.run(
        "return document.getElementById('taken').textContent"
    )
    assert browser.run("return document.getElementById('config').value") == ""
    well(browser, origin)


def test_the_keyboard_is_enough(origin: str, browser: Browser) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    browser.shape(1440, "light")
    browser.open(f"{origin}/")

    def type_keys(*keys: str) -> None:
        ActionChains(browser.driver).send_keys(*keys).perform()

    type_keys(Keys.TAB)
    assert browser.run("return document.activeElement.className") == "skip"
    type_keys(Keys.TAB, Keys.TAB)
    assert browser.run("return document.activeElement.id") == "model"
    type_keys("gpt2-xl", Keys.ESCAPE, Keys.TAB, "8xH100", Keys.ESCAPE, Keys.TAB)
    assert browser.run("return document.activeElement.tagName") == "SUMMARY"
    type_keys(Keys.ENTER)
    assert browser.run("return document.getElementById('own').open")
    unlabelled = browser.run(
        """return [...document.querySelectorAll('input, select, textarea')]
          .filter(e => !e.labels.length || !e.labels[0].textContent.trim()).length"""
    )
    assert unlabelled == 0
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert browser.run(outline) == "solid"
    browser.driver.find_element("id", "gpus").send_keys(Keys.ENTER)
    assert "gpt2-xl fits" in browser.driver.find_element("id", "answer").text


def test_it_works_without_a_script(origin: str, browser: Browser) -> None:
    browser.shape(390, "light")
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.driver.get(f"{origin}/")
        browser.driver.find_element("css selector", "#own summary").click()
        assert not browser.driver.find_element("id", "file").is_displayed()
        write(browser, config=json.dumps(CONFIG), gpus="2xA100", global_batch_size="8")
        browser.driver.find_element("id", "go").click()
        assert "pasted model fits" in browser.driver.find_element("id", "answer").text
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_a_script_that_gets_in_is_not_run(origin: str, browser: Browser) -> None:
    browser.open(f"{origin}/")
    browser.run(
        """const s = document.createElement('script'); s.textContent = 'window.hacked = 1';
        document.body.append(s);
        const i = document.createElement('img'); i.src = 'https://example.org/x.png';
        document.body.append(i);"""
    )
    assert browser.run("return window.hacked") is None
    assert any("Content Security Policy" in line for line in browser.complaints())
    assert all(one.startswith(origin) for one in browser.requests())
