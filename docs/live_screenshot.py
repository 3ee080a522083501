"""A picture of `afd live` for the README: the base beside a run's student.

python docs/live_screenshot.py runs/quickstart/afd docs/live.png
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from screenshot import browser, compress, find_chromium

from afd.export import ExportConfig, export

WIDTH, HEIGHT = 1280, 820
PROMPTS = ("A red ball on the left is dropped, going right.",
           "A blue ball on the left is thrown, going right.")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="a run of the laptop task")
    parser.add_argument("png", type=Path)
    parser.add_argument("--dark", action="store_true")
    options = parser.parse_args()
    program = find_chromium()
    if program is None:
        parser.exit(1, "chromium is not installed (Debian: apt-get install chromium)\n")
    with tempfile.TemporaryDirectory() as folder:
        adapted = Path(folder) / "AFD"
        export(options.run_dir, ExportConfig(out=adapted, kind="student"))
        words = [f"compare={adapted / 'student.safetensors'}", f"out={folder}/out", "threads=1"]
        command = [sys.executable, "-m", "afd", "live", "--port", "0", *words]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            found = re.search(r"http://\S+", server.stdout.readline())
            assert found is not None
            with browser(program) as page:
                page.show(found[0], WIDTH, HEIGHT, options.dark)
                time.sleep(5.0)
                print(page.value("$('numbers').innerText"))
                page.value("send({type: 'pause'})")
                page.wait("!state.playing")
                first, second = PROMPTS
                page.value(f"send({{type: 'restart', seed: 4, prompt: {first!r}}})")
                for chunk in range(1, 12):
                    if chunk == 8:
                        page.value(f"$('prompt').value = {second!r}, $('mode').value = 'recache'")
                        page.value("$('ask').requestSubmit()")
                    page.value("$('step').click()")
                    page.wait(f"past.length && past.at(-1).chunk === {chunk}")
                page.value("$('play').click()")
                page.wait("past.at(-1).chunk > 45")
                # All balls in flight tell more than where the stream has come to rest.
                page.value("scrub(past.findIndex(frame => frame.chunk === 9))")
                time.sleep(1.0)
                end = page.value("$('ask').getBoundingClientRect().bottom + scrollY")
                png = compress(page.picture(int(end) + 24))
        finally:
            server.terminate()
            server.wait(20)
    options.png.parent.mkdir(parents=True, exist_ok=True)
    options.png.write_bytes(png)
    print(f"{options.png}: {len(png)} bytes")


if __name__ == "__main__":
    main()
