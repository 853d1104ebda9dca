"""Headless Chromium for the tests of the pages, spoken to over a pipe in its DevTools protocol: a real pointer and real keys.

A test file loads this one by its path: tests are not packages.
"""

import base64
import io
import json
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.image import imread

# Chromium reads commands from 3 and writes answers to 4: first both pipes go out of the way of these numbers, whatever theirs are.
_PIPES = """
import os, sys
high = [os.dup2(int(number), 200 + i) for i, number in enumerate(sys.argv[1:3])]
for i, number in enumerate(high):
    os.dup2(number, 3 + i)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One Chromium with one page at a time.

    Args:
        profile: A folder for its files.
    """

    def __init__(self, profile: Path):
        chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        assert chromium, "this test needs Chromium: install Debian's package `chromium` (apt-get install chromium)"
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()

        flags = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-background-networking"
        arguments = [
            chromium,
            *flags.split(),
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
            "about:blank",
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PIPES, str(to_read), str(to_write), *arguments],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._buffer, self._number, self._session, self._events = b"", 0, None, []
        (page,) = (t for t in self._call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")

    def close(self):
        """Ends Chromium."""
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._write)
        os.close(self._read)

    def open(self, path, *, width=1200, height=900, dark=False):
        """Opens a file by its `file://` address in a window of that size; what was asked for and what failed is kept."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        self._call("Page.navigate", url=path.absolute().as_uri())
        while not any(e["method"] == "Page.loadEventFired" for e in self._events):
            self._events.append(self._message())

    @property
    def requests(self):
        """The addresses that the page asked for, but for its own and `data:` ones."""
        addresses = [e["params"]["request"]["url"] for e in self._events if e["method"] == "Network.requestWillBeSent"]
        return [a for a in addresses[1:] if not a.startswith("data:")]

    @property
    def complaints(self):
        """What the console says: errors, exceptions, violations of the policy."""
        kinds = ("Log.entryAdded", "Runtime.exceptionThrown")
        return [json.dumps(e["params"]) for e in self._events if e["method"] in kinds]

    def run(self, script):
        """The value of a JavaScript expression in the page."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def box(self, selector):
        """x, y, width and height of the first such element, brought into the window."""
        return self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});"
            " const r = e.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; })()"
        )

    def hover(self, selector):
        """Moves the pointer to the middle of an element."""
        x, y, width, height = self.box(selector)
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x + width / 2, y=y + height / 2)

    def click(self, selector):
        """Clicks on an element."""
        x, y, width, height = self.box(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x + width / 2, y=y + height / 2, button="left", clickCount=1)

    def press(self, key, text=None):
        """Presses a key such as `Tab`, `Enter` or `Escape`."""
        code = {"Tab": 9, "Enter": 13, "Escape": 27}[key]
        extra = {"text": text} if text else {}
        self._call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **extra)
        self._call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def type(self, text):
        """Types a text into what has the focus."""
        self._call("Input.insertText", text=text)

    def picture(self, path=None, *, whole=False):
        """The window, or the whole page, as (H, W, 3) in 0 to 255; written to `path`."""
        data = base64.b64decode(
            self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))["data"]
        )
        if path is not None:
            Path(path).write_bytes(data)
        return np.round(imread(io.BytesIO(data), format="png")[..., :3] * 255).astype(int)

    def _clip(self, whole):
        if not whole:
            return {}
        width, height = self.run("[innerWidth, document.documentElement.scrollHeight]")
        return {"clip": {"x": 0, "y": 0, "width": width, "height": min(height, 16000), "scale": 1}}

    def _call(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._events.append(answer)

    def _message(self):
        while b"\0" not in self._buffer:
            assert select.select([self._read], [], [], 60)[0], "Chromium has not answered for a minute"
            data = os.read(self._read, 2**20)
            assert data, "Chromium went away"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)
