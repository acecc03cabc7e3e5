"""The page at / in headless Chromium, as wide as a phone and as a desk; skipped where Chromium is not installed."""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service as Driver
    from selenium.webdriver.common.by import By

from tests.server.conftest import Live, bundled_pair, run_server

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync"
)
SIZES = {"phone": (390, 844, "dark"), "desktop": (1280, 900, "light")}

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="apt-get install chromium chromium-driver to run it"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=Driver(DRIVER))
    yield opened
    opened.quit()


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    """Where screenshots are kept: the folder that MIDLOGIT_ARTIFACTS names, else a temporary one."""
    folder = Path(os.environ.get("MIDLOGIT_ARTIFACTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def open_page(browser: webdriver.Chrome, live: Live, size: str) -> None:
    width, height, scheme = SIZES[size]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(live.url)


def until(holds: Any, seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("size", list(SIZES))
def test_a_live_generation(
    server: Live, browser: webdriver.Chrome, size: str, artifacts: Path
) -> None:
    open_page(browser, server, size)
    until(lambda: browser.find_element(By.ID, "names").text == "the bundled pair")
    button = browser.find_element(By.ID, "go")
    button.click()
    until(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#text span")) > 2)
    until(lambda: button.text == "Write")
    spans = browser.find_elements(By.CSS_SELECTOR, "#text span")
    assert browser.find_element(By.ID, "f-count").text == str(len(spans))
    assert browser.find_element(By.ID, "problem").text == ""
    colours = {span.value_of_css_property("background-color") for span in spans}
    assert len(colours) > min(5, len(spans) // 2), "tokens are coloured by their α"
    for name, lines in (("alpha-chart", 1), ("kl-chart", 2)):
        drawn = browser.execute_script(
            f"return document.querySelectorAll('#{name} polyline').length"
        )
        assert drawn == lines
    browser.execute_script(
        "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})",
        spans[min(8, len(spans) - 1)],
    )
    time.sleep(0.3)
    webdriver.ActionChains(browser).move_to_element(spans[min(8, len(spans) - 1)]).perform()
    tip = browser.find_element(By.ID, "tip")
    until(lambda: tip.value_of_css_property("visibility") == "visible")
    assert all(part in tip.text for part in ("base", "teacher", "α", "KL to base"))
    box = tip.rect
    assert box["x"] >= 0 and box["x"] + box["width"] <= SIZES[size][0]
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= SIZES[size][0], "nothing sticks out"
    picture = artifacts / f"page-{size}.png"
    browser.save_screenshot(str(picture))
    assert picture.stat().st_size > 20_000
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    ]
    asked = [url for url in asked if url.startswith("http")]
    assert asked and all(url.startswith(f"{server.url}/") for url in asked), (
        "no other site is asked for anything"
    )


def test_stop_and_controls(server: Live, browser: webdriver.Chrome) -> None:
    open_page(browser, server, "desktop")
    browser.execute_script(
        "document.querySelector('[value=exploratory]').click();"
        "$('most').value = 400; $('most').dispatchEvent(new Event('input'))"
    )
    assert browser.find_element(By.ID, "top-out").text == "off"
    assert browser.find_element(By.ID, "most-out").text == "400"
    button = browser.find_element(By.ID, "go")
    button.click()
    until(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#text span")) > 1)
    button.click()
    until(lambda: button.text == "Write")
    server.wait_idle()


def test_a_key_is_asked_for(browser: webdriver.Chrome) -> None:
    with run_server(bundled_pair, api_keys=("page-key",)) as live:
        open_page(browser, live, "phone")
        until(lambda: browser.find_element(By.ID, "key").is_displayed())
        browser.find_element(By.ID, "go").click()
        until(lambda: "key" in browser.find_element(By.ID, "problem").text)
        browser.find_element(By.ID, "key").send_keys("page-key")
        browser.find_element(By.ID, "go").click()
        until(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#text span")) > 1)
        assert browser.find_element(By.ID, "problem").text == ""
        browser.get("about:blank")
        live.wait_idle()
