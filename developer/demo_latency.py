"""How long a painted stroke waits for its picture, in a real browser.

    python -m cnpp_trt.developer.demo_latency [--strokes 60]

Starts `cnpp-trt demo` on the embedded few-step model and a headless Chromium, which must be installed (with the Python
package playwright). Every stroke crosses the canvas at random. The time runs from the event that ends the stroke to the
first frame after its picture was decoded and put into the page, and is taken by the page itself.
"""

import argparse
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from typing import Any

from playwright.sync_api import sync_playwright

_BRUSHES = ("sky", "mountain", "grass", "sand", "water", "road", "house", "tree")
_WATCH = (
    "() => { window.waits = []; document.addEventListener('shown', "
    "(e) => { if (e.detail.stroke !== null) window.waits.push(e.detail.stroke); }); }"
)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strokes", type=int, default=60)
    strokes = parser.parse_args().strokes
    command = [sys.executable, "-m", "cnpp_trt", "demo", "--model", "miniature-lcm", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            address = next(line.split()[-1] for line in server.stderr if line.startswith("the page: "))
            waits = measure(address, strokes)
        finally:
            server.terminate()
    waits.sort()
    p95 = waits[min(len(waits) - 1, round(0.95 * len(waits)))]
    print(f"{processor()}, {os.cpu_count()} cores, {platform.system()}: {len(waits)} strokes")
    print(
        f"stroke's end to picture: median {statistics.median(waits):.0f} ms, p95 {p95:.0f} ms, worst {waits[-1]:.0f} ms"
    )


def measure(address: str, strokes: int) -> list[float]:
    """Milliseconds of each stroke."""
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser_path is None:
        raise SystemExit("no Chromium is installed")
    draw = random.Random(1)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.goto(address)
        page.wait_for_selector("body[data-shown]", timeout=60_000)
        page.evaluate(_WATCH)
        box = page.locator("#canvas").bounding_box()
        assert box is not None
        for number in range(strokes + 3):  # the first ones warm the browser up
            page.locator("#brushes button", has_text=draw.choice(_BRUSHES)).click()
            _stroke(page, box, draw)
            end = time.monotonic() + 30
            while page.evaluate("window.waits.length") <= number and time.monotonic() < end:
                time.sleep(0.02)
        waits: list[float] = page.evaluate("window.waits")
        browser.close()
    return waits[3:]


def _stroke(page: Any, box: Any, draw: random.Random) -> None:
    places = [(box["x"] + draw.random() * box["width"], box["y"] + draw.random() * box["height"]) for _ in range(3)]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=6)
    page.mouse.up()


def processor() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


if __name__ == "__main__":
    main()
