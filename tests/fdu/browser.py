"""A headless Chromium, driven by its DevTools protocol over two pipes: no driver, no package."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str:
    """The browser's program; a test is skipped where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return found or pytest.skip(f"none of {', '.join(NAMES)} is here, so the page was not seen in a browser")


class Browser:
    """One tab.

    Args:
        folder: for the browser's own files.
        width, height: of the tab, in pixels.
        dark: whether the user prefers dark pages.
    """

    def __init__(self, folder: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        self.asked, self.answers = os.pipe(), os.pipe()
        switches = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run"]
        # Root has no sandbox, containers have a small /dev/shm, and nothing but the page may ask for anything.
        switches += ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--disable-background-networking"]
        command = f'exec "$@" 3<&{self.asked[0]} 4>&{self.answers[1]}'  # the numbers that the browser expects
        self.process = subprocess.Popen(
            ["bash", "-c", command, "bash", find_browser(), *switches],
            pass_fds=(self.asked[0], self.answers[1]),
            stderr=subprocess.DEVNULL,
        )
        os.close(self.asked[0])
        os.close(self.answers[1])
        self.requests: list[str] = []
        """The addresses that the tab asked for."""
        self.errors: list[str] = []
        """What its console reports as errors."""
        self._session, self._number, self._rest = "", 0, b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def call(self, method: str, **parameters: Any) -> Any:
        """The result of a command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self.asked[1], json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            given = answer.get("params", {})
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(given["request"]["url"])
            elif answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(str(given["exceptionDetails"]))
            elif answer.get("method") == "Log.entryAdded" and given["entry"]["level"] == "error":
                self.errors.append(f"{given['entry']['text']} {given['entry'].get('url', '')}")

    def _next(self) -> Any:
        while b"\0" not in self._rest:
            some = os.read(self.answers[0], 1 << 16)
            assert some, "the browser has ended"
            self._rest += some
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def value(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> Any:
        """The value of an expression once it is true."""
        end = time.monotonic() + seconds
        while not (found := self.value(script)):
            assert time.monotonic() < end, f"not within {seconds} s: {script}; the page says: {self.text()[:2000]}"
            time.sleep(0.1)
        return found

    def open(self, address: str) -> None:
        """Go to a page."""
        self.call("Page.navigate", url=address)
        self.wait(f"location.href == {address!r} && document.readyState == 'complete'")

    def text(self) -> str:
        """What the page says."""
        return str(self.value("document.body ? document.body.innerText : ''"))

    def type(self, text: str) -> None:
        """Type into what has the focus, in place of what is selected."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, text="\r")

    def screenshot(self, path: Path) -> None:
        """Save the whole page as a PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        """End the browser."""
        os.close(self.asked[1])
        os.close(self.answers[0])
        self.process.terminate()
        self.process.wait(30)
