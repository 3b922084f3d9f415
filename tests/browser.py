"""A headless Chromium for tests of pages, and what they ask of one: sizes, colours, what the keyboard does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
SCRIPT = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")


class Browser:
    """One tab, without a network."""

    def __init__(self, driver: Any):
        self.driver = driver
        self.command("Network.enable")
        self.command(
            "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0
        )

    def command(self, name: str, **values: Any) -> Any:
        return self.driver.execute_cdp_cmd(name, values)

    def open(self, page: Path) -> None:
        self.requests()
        self.driver.get(page.as_uri())

    def resize(self, width: int, height: int = 900) -> None:
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def prefer(self, scheme: str) -> None:
        """light or dark"""
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def ask(self, call: str) -> Any:
        """What a function of browser.js returns."""
        return self.driver.execute_script(f"{SCRIPT}; return {call}")

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains
        from selenium.webdriver.common.keys import Keys

        actions = ActionChains(self.driver, duration=0)
        for key in keys:
            actions.send_keys(getattr(Keys, key))
        actions.perform()

    def point(self, x: float, y: float) -> None:
        """The pointer to a place in the window."""
        self.command("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def requests(self) -> list[str]:
        """Addresses that were asked for since the last call."""
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """What was written to the console since the last call."""
        return [e["message"] for e in self.driver.get_log("browser")]


@contextmanager
def start(folder: Path) -> Iterator[Browser]:
    """A browser with a profile in `folder`; skips where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is absent: pip install 'planish[dev]'")
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.chrome.service import Service

    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    server = shutil.which("chromedriver")
    if program is None or server is None:
        pytest.skip("Chromium or its driver is absent: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    try:
        driver = webdriver.Chrome(options=options, service=Service(server))
    except WebDriverException as error:
        pytest.skip(f"Chromium does not start here: {error.msg}")
    try:
        yield Browser(driver)
    finally:
        driver.quit()
