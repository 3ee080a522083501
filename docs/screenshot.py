"""A picture of the top of a report, for the README, taken in Debian's chromium.

    python docs/screenshot.py RUN_DIR docs/quickstart.png

`Browser` also serves the tests of the report.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

# No sandbox, because containers forbid it; nothing may go to the network.
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)
LIMIT_BYTES = 300_000
READY = "document.body?.dataset.ready === 'yes'"


def find_chromium() -> str | None:
    """Chromium's program, or None where there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """One page of a headless chromium, driven through its debugging pipe."""

    def __init__(self, read: int, write: int) -> None:
        self._in, self._out = os.fdopen(read, "rb", 0), os.fdopen(write, "wb", 0)
        self._buffer, self._count, self._session = b"", 0, ""
        self.complaints: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        found = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its answer; raises RuntimeError with what chromium says is wrong."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            self._listen(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            chunk = self._in.read(1 << 20)
            if not chunk:
                raise RuntimeError("chromium ended")
            self._buffer += chunk
        text, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(text))

    def _listen(self, event: dict[str, Any]) -> None:
        """Keep every error, and every request that would leave the page."""
        method, data = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(data["exceptionDetails"]))
        elif method == "Log.entryAdded" and data["entry"]["level"] in ("warning", "error"):
            self.complaints.append(data["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and data["type"] in ("error", "assert"):
            self.complaints.append(str(data["args"]))
        elif method == "Network.requestWillBeSent":
            url = data["request"]["url"]
            if not url.startswith(("data:", "about:", "blob:")) and data["type"] != "Document":
                self.complaints.append(f"requests {url}")

    def open(self, page: Path, width: int, height: int, dark: bool = False) -> None:
        """Show a file and wait until its script says that it is ready."""
        self.show(page.resolve().as_uri(), width, height, dark)

    def show(
        self, url: str, width: int, height: int, dark: bool = False, ready: str = READY
    ) -> None:
        """`open` for a URL, until a JavaScript condition holds."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.send("Page.navigate", url=url)
        self.wait(ready)

    def wait(self, condition: str, limit_s: float = 120.0) -> None:
        """Until a JavaScript condition holds; RuntimeError with the complaints if it never does."""
        end = time.monotonic() + limit_s
        while not self.value(condition):
            if time.monotonic() > end:
                raise RuntimeError(f"not so after {limit_s} s: {condition}; {self.complaints}")
            time.sleep(0.03)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is in the page."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def picture(self, height: int | None = None) -> bytes:
        """PNG of the page's top `height` pixels, or of all of it."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        clip["height"] = min(clip["height"], height or clip["height"])
        shot = self.send("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(shot["data"])


@contextmanager
def browser(program: str) -> Iterator[Browser]:
    """A chromium with a new, empty profile; ended with the block."""
    # It reads commands from its descriptor 3 and writes answers to 4.
    their_in, our_out = os.pipe()
    our_in, their_out = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        move = f"os.dup2({their_in}, 3); os.dup2({their_out}, 4)"
        start = f"import os, sys; {move}; os.execv(sys.argv[1], sys.argv[1:])"
        command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(
            [sys.executable, "-c", start, *command],
            pass_fds=(their_in, their_out),
            env=os.environ | {"TMPDIR": profile},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_in)
        os.close(their_out)
        try:
            yield Browser(our_in, our_out)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def compress(png: bytes) -> bytes:
    """The same picture in as few colours as brings it under LIMIT_BYTES."""
    if len(png) <= LIMIT_BYTES:
        return png
    image = Image.open(io.BytesIO(png)).convert("RGB")
    for colors in (256, 128, 64):
        file = io.BytesIO()
        image.quantize(colors, kmeans=3, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        if file.tell() <= LIMIT_BYTES:
            break
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="folder that holds report.html")
    parser.add_argument("png", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=0, help="0: down to the end of the table")
    parser.add_argument("--dark", action="store_true")
    options = parser.parse_args()
    program = find_chromium()
    if program is None:
        parser.exit(1, "chromium is not installed (Debian: apt-get install chromium)\n")
    report = options.run_dir / "report.html"
    if not report.is_file():
        parser.exit(1, f"{report}: no such file; make it with: afd report {options.run_dir}\n")
    with browser(program) as page:
        page.open(report, options.width, 900, options.dark)
        # All balls in flight tell more than the moment the page opens in.
        page.value("document.querySelector('.bar button')?.click()")
        page.value(
            "(s => { if (s) { s.value = Math.floor(s.max / 2);"
            " s.dispatchEvent(new Event('input')); } })(document.querySelector('.bar input'))"
        )
        end = "document.querySelector('#curves')?.getBoundingClientRect().top ?? 1600"
        height = options.height or int(page.value(end)) - 20
        png = compress(page.picture(height))
    options.png.parent.mkdir(parents=True, exist_ok=True)
    options.png.write_bytes(png)
    print(f"{options.png}: {len(png)} bytes")


if __name__ == "__main__":
    main()
