"""The review page in a real browser: every chart, at a phone's width and a desk's, light, dark, printed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from planner import ClusterSpec, Document, ModelSpec, TrainingSpec, document_of, search
from planner.documents import document_of_failure
from planner.errors import InfeasibleError
from planner.report import page
from tests.page.browser import Browser, needs_browser, started

pytestmark = needs_browser
HOSTILE = (
    "<script>window.hacked = 1</script>",
    "\"'><img src=x onerror='window.hacked = 1'>",
    "</script><script>window.hacked = 1</script>",
    "{{ 7 * 7 }} {% raw %} ${7 * 7}",
    "\u202eelddim eht morf\u202c שלום",
    "x" * 10_000,
)


def documents() -> Iterator[tuple[str, Document]]:
    for name, model, gpus, training in (
        ("headline", "llama-65b", "64x80G", TrainingSpec(tokens=1.4e12)),
        ("one stage", "gpt2-small", "1xA100", TrainingSpec(global_batch_size=8)),
        ("experts", "mixtral-8x7b", "64xH100", TrainingSpec(seq_length=4096, global_batch_size=256)),
    ):
        spec, cluster = ModelSpec.from_catalog(model), ClusterSpec.parse(gpus)
        yield name, document_of(spec, cluster, search(spec, cluster, training), f"planner search -m {model}")
    spec, cluster = ModelSpec.from_catalog("llama-65b"), ClusterSpec.parse("8x80G")
    try:
        search(spec, cluster)
    except InfeasibleError as error:
        yield "nothing fits", document_of_failure(spec, cluster, error)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    for number, (name, document) in enumerate(documents()):
        found[name] = folder / f"{number}.html"
        found[name].write_text(page(document), encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started() as one:
        yield one


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_every_chart_is_drawn_and_nothing_is_asked_of_a_network(
    width: int, scheme: str, pages: dict[str, Path], browser: Browser
) -> None:
    browser.shape(width, scheme)
    for name, file in pages.items():
        browser.open(file.as_uri())
        found: dict[str, Any] = browser.run(
            """const charts = [...document.querySelectorAll('[data-chart]')];
            return {
              charts: charts.length,
              drawn: charts.filter(c => c.querySelector('svg path, canvas')).length,
              boxes: charts.map(c => [c.firstChild.offsetWidth || c.firstChild.clientWidth, c.clientWidth]),
              tables: document.querySelectorAll('table').length,
              sections: [...document.querySelectorAll('main section[id]')].length,
              over: document.documentElement.scrollWidth - window.innerWidth,
              background: getComputedStyle(document.body).backgroundColor,
            }"""
        )
        assert found["charts"] >= 4, name
        assert found["drawn"] == found["charts"], name
        assert all(0 < own <= room for own, room in found["boxes"]), name
        assert found["tables"] == found["sections"] - 4, name  # answer, assumptions, accuracy, again
        assert found["over"] <= 0, name
        assert (found["background"] == "rgb(255, 255, 255)") == (scheme == "light")
        assert browser.complaints() == []
        assert browser.requests() == [file.as_uri()]


def test_every_chart_has_a_table_with_its_figures_and_a_name(
    pages: dict[str, Path], browser: Browser
) -> None:
    browser.shape(1440, "light")
    for file in pages.values():
        browser.open(file.as_uri())
        for label, table in browser.run(
            """return [...document.querySelectorAll('[data-chart]')].map(c => [
              c.getAttribute('aria-label'), c.closest('section').querySelectorAll('tbody tr').length])"""
        ):
            assert label.endswith("its figures are in the table below.")
            assert table > 0
        unlabelled = browser.run(
            """return [...document.querySelectorAll('section, [role=region], nav')]
              .filter(e => !e.getAttribute('aria-label'))
              .filter(e => !document.getElementById(e.getAttribute('aria-labelledby'))).length"""
        )
        assert unlabelled == 0


def test_tables_open_by_keyboard(pages: dict[str, Path], browser: Browser) -> None:
    browser.shape(390, "light")
    browser.open(pages["headline"].as_uri())
    from selenium.webdriver.common.keys import Keys

    summary = browser.driver.find_element("css selector", "#stages summary")
    assert not browser.run("return document.querySelector('#stages details').open")
    summary.send_keys(Keys.ENTER)
    assert browser.run("return document.querySelector('#stages details').open")
    assert browser.run("return document.activeElement.tagName") == "SUMMARY"


def test_print_has_all_tables_and_light_charts(pages: dict[str, Path], browser: Browser) -> None:
    browser.shape(390, "dark")
    browser.open(pages["headline"].as_uri())
    browser.run(
        """window.addEventListener('beforeprint', () => {
          window.opened = document.querySelectorAll('details[open]').length;
          window.widths = [...document.querySelectorAll('[data-chart] svg')].map(s => s.clientWidth);
        });"""
    )
    already = browser.run("return document.querySelectorAll('details[open]').length")
    paper = browser.printed()
    assert paper.startswith(b"%PDF")
    assert len(paper) > 50_000
    assert browser.wait("return window.opened") == browser.run(
        "return document.querySelectorAll('details').length"
    )
    assert set(browser.run("return window.widths")) == {680}
    assert browser.run("return document.querySelectorAll('details[open]').length") == already
    assert browser.complaints() == []


def test_hostile_words_are_shown_as_text(browser: Browser, tmp_path: Path) -> None:
    spec, cluster = ModelSpec.from_catalog("gpt2-small"), ClusterSpec.parse("2xA100")
    plans = search(spec, cluster, TrainingSpec(global_batch_size=8))
    for number, words in enumerate(HOSTILE):
        named = plans[0].model_copy(update={"model": words, "warnings": (words,)})
        document = document_of(spec.model_copy(update={"name": words}), cluster, [named, *plans[1:]], words)
        document = document.model_copy(update={"error": words})
        file = tmp_path / f"{number}.html"
        file.write_text(page(document, title=words, note=words), encoding="utf-8")
        for width in (390, 1440):
            browser.shape(width, "light")
            browser.open(file.as_uri())
            assert browser.run("return document.querySelector('h1').textContent") == words
            assert browser.run("return document.querySelector('.note').textContent") == words
            assert words in browser.run("return document.querySelector('#answer').textContent")
            assert browser.run("return [window.hacked, document.querySelectorAll('script').length]") == [
                None,
                3,
            ]
            assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
            assert browser.complaints() == []
            assert browser.requests() == [file.as_uri()]


def test_the_policy_runs_no_script_but_the_pages_own(
    pages: dict[str, Path], browser: Browser, tmp_path: Path
) -> None:
    text = pages["headline"].read_text(encoding="utf-8")
    file = tmp_path / "injected.html"
    extra = "<script>window.hacked = 1</script><img src='https://example.org/x.png'>"
    file.write_text(text.replace("<main>", f"<main>{extra}"), encoding="utf-8")
    browser.open(file.as_uri())
    assert browser.run("return window.hacked") is None
    assert any("Content Security Policy" in line for line in browser.complaints())
    assert browser.requests() == [file.as_uri()]
