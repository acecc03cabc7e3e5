"""Pages of reports in headless Chromium, as wide as a phone and as a desk; skipped where Chromium is not installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from midlogit.report import make_report
from tests.server.test_page import SIZES, By, artifacts, browser, pytestmark, until, webdriver

__all__ = ["artifacts", "browser", "pytestmark"]  # fixtures and the reason to skip


def show(browser: webdriver.Chrome, path: Path, size: str) -> None:
    width, height, scheme = SIZES[size]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(path.as_uri())


def check(browser: webdriver.Chrome, path: Path, size: str) -> None:
    """The page is no wider than the window, complains of nothing and asks for nothing but itself."""
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= SIZES[size][0], "nothing sticks out"
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    }
    own = ("data:", "chrome:")  # pictures inside the page, and the tab that was open before
    assert {url for url in asked if not url.startswith(own)} <= {path.as_uri()}


def test_pages(
    runs: tuple[Path, Path], browser: webdriver.Chrome, artifacts: Path, tmp_path: Path
) -> None:
    one, two = make_report(runs[0], deep=True), make_report(*runs)
    pages = {"one": one.page(), "static": one.page(static=True), "two": two.page()}
    for name, text in pages.items():
        path = tmp_path / f"{name}.html"
        path.write_text(text, encoding="utf-8")
        for size in SIZES:
            show(browser, path, size)
            pictures = browser.find_elements(By.CSS_SELECTOR, "figure svg")
            shown = [picture for picture in pictures if picture.is_displayed()]
            assert len(shown) == len(pictures) // 2 > 8, "each picture in the size that fits"
            browser.save_screenshot(str(artifacts / f"report-{name}-{size}.png"))
            check(browser, path, size)


def test_hovers(runs: tuple[Path, Path], browser: webdriver.Chrome, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(make_report(runs[0]).page(), encoding="utf-8")
    show(browser, path, "desktop")
    tip = browser.find_element(By.ID, "tip")

    token = browser.find_elements(By.CSS_SELECTOR, ".text .t")[3]
    hover(browser, token)
    until(lambda: tip.value_of_css_property("visibility") == "visible")
    assert all(part in tip.text for part in ("base", "teacher", "α", "KL to base", "log q"))

    bar = browser.find_element(
        By.CSS_SELECTOR, "#kl svg.wide rect[aria-label], #kl svg.wide path[aria-label]"
    )
    hover(browser, bar)
    until(lambda: "of tokens" in tip.text)
    assert browser.get_log("browser") == []


def hover(browser: webdriver.Chrome, element: object) -> None:
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    webdriver.ActionChains(browser).move_to_element(element).perform()  # type: ignore[arg-type]


@pytest.mark.parametrize("static", [True, False])
def test_texts_cannot_break_out(runs: tuple[Path, Path], static: bool) -> None:
    """What was sampled is shown, never run."""
    report = make_report(runs[0])
    evil = "</script><img src=x onerror=alert(1)>"
    for text in report._texts[0]:
        text.row["text"], text.row["prompt"], text.row["row_id"] = evil, evil, evil
        assert text.pieces is not None
        text.pieces[:] = [evil] * len(text.pieces)
    page = report.page(static=static)
    assert "<img" not in page and page.count("</script>") == (0 if static else 2)
