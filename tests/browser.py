"""A headless Chromium, driven over the DevTools protocol by pipe: it needs the browser alone.

Messages are JSON ending in a zero byte; the browser reads descriptor 3 and writes descriptor 4.
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


def find_browser():
    "The path of a Chromium or Chrome, or None."
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    "One page in it."

    def __init__(self, process, to_browser, from_browser):
        self.process = process
        self.to_browser = to_browser
        self.from_browser = from_browser
        self.buffer = b""
        self.count = 0
        self.session = None
        self.events = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = found["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def _read(self, until):
        "The next message, or None when time is up."
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.from_browser], [], [], max(0, until - time.time()))
            if not ready:
                return None
            piece = os.read(self.from_browser, 1 << 16)
            if not piece:
                raise ConnectionError("the browser has gone")
            self.buffer += piece
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method, **params):
        "What the browser answers; what it tells meanwhile is kept."
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        until = time.time() + 60
        while True:
            answer = self._read(until)
            if answer is None:
                raise TimeoutError(method)
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, event, seconds=30):
        until = time.time() + seconds
        while event not in [seen.get("method") for seen in self.events]:
            answer = self._read(until)
            if answer is None:
                raise TimeoutError(event)
            self.events.append(answer)

    def open(self, url, width=1280, height=900, scripts=True, dark=False):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=url)
        self.wait_for("Page.loadEventFired")

    def evaluate(self, expression):
        "The value of an expression, a promise awaited."
        options = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        found = self.call("Runtime.evaluate", expression=expression, **options)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"].get("value")

    def press(self, key, times=1):
        "A key, down and up."
        codes = {"ArrowRight": 39, "ArrowLeft": 37, "Home": 36, "End": 35, "Tab": 9, "Enter": 13}
        stroke = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
        if key == "Enter":
            stroke["text"] = "\r"
        for _ in range(times):
            self.call("Input.dispatchKeyEvent", type="keyDown", **stroke)
            self.call("Input.dispatchKeyEvent", type="keyUp", **stroke)

    def click(self, selector):
        "The middle of an element, with the mouse."
        element = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{element}.scrollIntoView({{ block: 'center' }})")
        place = (
            f"((r) => [r.x + r.width / 2, r.y + r.height / 2])({element}.getBoundingClientRect())"
        )
        x, y = self.evaluate(place)
        for act in ("mousePressed", "mouseReleased"):
            options = {"x": x, "y": y, "button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=act, **options)

    def picture(self, path):
        "The whole page as a PNG file."
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def complaints(self):
        "Errors of scripts, refused content, and requests for anything but the page."
        found = []
        for event in self.events:
            kind, about = event.get("method"), event.get("params", {})
            if kind == "Runtime.exceptionThrown":
                found.append(about["exceptionDetails"])
            elif kind == "Log.entryAdded" and about["entry"]["level"] == "error":
                found.append(about["entry"]["text"])
            elif kind == "Network.requestWillBeSent":
                url = about["request"]["url"]
                if not url.startswith(("file:", "data:")):
                    found.append(url)
        return found


@contextlib.contextmanager
def browser(path, profile):
    "A browser with a new profile, ended at the end."
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    shell = f'exec "$0" "$@" 3<&{to_read} 4>&{from_write}'
    process = subprocess.Popen(
        ["bash", "-c", shell, path, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(to_read, from_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(from_write)
    try:
        yield Browser(process, to_write, from_read)
    finally:
        os.close(to_write)
        os.close(from_read)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
