"""The page of a made-up run of 300 epochs with 50,000 lines: its size, and how soon it can be used in a browser.

    python benchmarks/report.py

Needs playwright (``pip install playwright``, no browser of its own) and Debian's chromium.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))


def main() -> None:
    """Make the page, open it five times, print size and times."""
    from playwright.sync_api import sync_playwright
    from report_runs import until, write_long_run

    from mocov3.report.command import write_page
    from mocov3.report.runs import read_run

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as p:
        page_file = Path(folder) / "report.html"
        write_long_run(Path(folder))
        began = time.perf_counter()
        write_page([read_run(Path(folder))], page_file, images=0)
        seconds = time.perf_counter() - began
        chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        ready = []
        for _ in range(5):
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.goto(f"file://{page_file}")
            until(page, "document.documentElement.dataset.ready", seconds=120)
            ready.append(int(page.evaluate("document.documentElement.dataset.ready")) / 1000)
            page.close()
        browser.close()
        size = page_file.stat().st_size / 1e6
    median, best, load = statistics.median(ready), min(ready), os.getloadavg()[0]
    print(
        f"50,000 lines: made in {seconds:.1f} s, {size:.1f} MB; visible charts drawn and usable {median:.2f} s after "
        f"opening (median of 5; best {best:.2f}; load of the machine {load:.1f})"
    )


if __name__ == "__main__":
    main()
