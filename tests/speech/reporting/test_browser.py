"""What a page looks like in a browser."""

import json
import re
import shutil
from collections.abc import Iterator

import pytest

from fastguard.speech.cli.report import main


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    """A selenium driver that keeps the console's and the network's logs."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("chromium and chromedriver are absent")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def open_page(chrome, path, width: int, theme: str = "light") -> None:
    """Load a file as a screen of this width shows it."""
    feature = {"name": "prefers-color-scheme", "value": theme}
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    chrome.get_log("browser"), chrome.get_log("performance")  # of the page before
    chrome.get(path.as_uri())


def requests(chrome) -> list[str]:
    """The addresses that the page has asked for."""
    events = [json.loads(entry["message"])["message"] for entry in chrome.get_log("performance")]
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [params["request"]["url"] for params in sent]


MEASURE = """
const box = e => {
  const b = e.getBoundingClientRect(); return [b.left, b.right, b.width, b.height];
};
const clipped = e => e.closest('.scroll, pre, details:not([open])');
return {
  width: document.documentElement.scrollWidth,
  svgs: [...document.querySelectorAll('figure > svg')].map(box),
  texts: [...document.querySelectorAll('figure > svg text, p, li, dd, h1, h2, h3, figcaption span')]
    .filter(e => !clipped(e)).map(e => [...box(e), e.textContent]),
  ticks: [...document.querySelectorAll('figure > svg')].map(svg =>
    [...svg.querySelectorAll('text')].map(e => {
      const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom, e.textContent];
    })),
  ink: getComputedStyle(document.querySelector('figure > svg text')).fill,
  page: getComputedStyle(document.body).backgroundColor,
};
"""


def overlapping(boxes):
    def apart(a, b):
        return a[2] <= b[0] + 1 or b[2] <= a[0] + 1 or a[3] <= b[1] + 1 or b[3] <= a[1] + 1

    return [(a[4], b[4]) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if not apart(a, b)]


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it(chromium, trained, hostile, tmp_path, width):
    path = tmp_path / "report.html"
    assert main([str(trained), str(hostile), "-o", str(path)]) == 0
    open_page(chromium, path, width)
    assert requests(chromium) == [path.as_uri()]
    assert chromium.get_log("browser") == []
    chromium.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    seen = chromium.execute_script(MEASURE)
    assert seen["width"] <= width
    assert len(seen["svgs"]) == 7
    assert all(w > 200 and h > 100 for _, _, w, h in seen["svgs"])
    assert [t for t in seen["texts"] if t[0] < 0 or t[1] > width] == []
    assert [pairs for ticks in seen["ticks"] if (pairs := overlapping(ticks))] == []


def test_light_and_dark(chromium, good):
    assert main([str(good)]) == 0
    seen = {}
    for theme in ("light", "dark"):
        open_page(chromium, good / "report.html", 1280, theme)
        seen[theme] = chromium.execute_script(MEASURE)
    light, dark = (sum(map(int, re.findall(r"\d+", seen[t]["page"])[:3])) for t in seen)
    assert light > 600 and dark < 150
    assert seen["light"]["ink"] != seen["dark"]["ink"]
