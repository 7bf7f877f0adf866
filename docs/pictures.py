"""Make the pictures of the documentation from a real run: `make pictures`, or python docs/pictures.py RUN."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

DOCS = Path(__file__).resolve().parent
NANOGPT = [sys.executable, "-m", "nanogpt"]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]


@contextmanager
def server(run: str) -> Iterator[str]:
    """The address of `nanogpt serve RUN`."""
    process = subprocess.Popen(
        [*NANOGPT, "serve", run, "--port=0", "--dtype=float32"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    try:
        yield next(found[1] for line in process.stdout if (found := re.match(r"page at (http:\S+),", line)))
    finally:
        process.terminate()
        process.wait()


def playground(page: Page, address: str) -> None:
    """The page with a text, and what one of its tokens might have been."""
    page.goto(address)
    page.wait_for_selector("#about:not(:empty)")
    for name, value in {"prompt": "ROMEO:", "max_tokens": "260", "seed": "7"}.items():
        page.fill(f"#{name}", value)
    page.click("#generate")
    page.locator("#status", has_text=re.compile("^Done")).wait_for()
    surprise = page.evaluate("tokens.map(token => token.logprob)")
    page.locator(".token").nth(min(range(10, 70), key=surprise.__getitem__)).click()
    page.screenshot(path=DOCS / "playground.png")


def main(run: str) -> None:
    """Make them all."""
    subprocess.run([*NANOGPT, "plot", run, f"--output={DOCS / 'curves.png'}"], check=True)
    with server(run) as address, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": 1100, "height": 720}, color_scheme="light", device_scale_factor=1.5)
        playground(page, address)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
