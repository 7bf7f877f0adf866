"""The page in a real browser."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from nanogpt.chats import with_template
from tests.test_serve import TOKENIZER, Server, make_model, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="module", params=["no chat"])
def server(request: Any) -> Iterator[Server]:
    chats = request.param == "chat"
    with serving(make_model(512 if chats else 32), with_template(TOKENIZER) if chats else TOKENIZER) as server:
        yield server


in_chat = pytest.mark.parametrize("server", ["chat"], indirect=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with ExitStack() as stack:
        driver = stack.enter_context(playwright.sync_playwright())
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        stack.callback(browser.close)
        yield browser


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """The page, opened; nothing may go wrong on it, and nothing may be asked of another host."""
    page = browser.new_page()
    problems: list[str] = []

    def hear(message: Any) -> None:
        if message.type in ("error", "warning") and "the server responded with a status of 400" not in message.text:
            problems.append(message.text)

    def see(request: Any) -> None:
        if not request.url.startswith((f"http://127.0.0.1:{server.port}/", "data:")):
            problems.append(request.url)

    page.on("console", hear)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", see)
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.wait_for_selector("#about:not(:empty)")
    yield page
    page.close()
    assert problems == []


def text(page: Any) -> str:
    return str(page.evaluate("document.getElementById('text').textContent"))


def wait_for_status(page: Any, begin: str = "Done") -> None:
    page.locator("#status", has_text=re.compile(f"^{begin}")).wait_for()


def generate(page: Any, prompt: str = "hello", **settings: str) -> None:
    page.fill("#prompt", prompt)
    for name, value in {"seed": "1", "max_tokens": "20", **settings}.items():
        page.fill(f"#{name}", value)
    page.click("#generate")
    wait_for_status(page)


def test_text_comes_token_by_token_with_its_probabilities(page: Any, server: Server) -> None:
    generate(page)
    assert page.inner_text("#about").startswith("m, context of 32 tokens")
    assert not page.is_visible("#modes, #log")  # The model has no chat template.
    _, answer = server.complete(prompt="hello", max_tokens=20, seed=1, temperature=0.8, top_k=200, logprobs=8)
    [choice] = answer["choices"]
    assert text(page) == "hello" + choice["text"]
    tokens = page.locator(".token")
    assert tokens.count() == len(choice["logprobs"]["tokens"])
    tokens.first.hover()
    assert page.locator("#detail button").count() == len(choice["logprobs"]["top_logprobs"][0])


def test_branching_and_undo(page: Any) -> None:
    generate(page)
    before = text(page)
    page.locator(".token").nth(3).click()
    other = page.locator("#detail button:enabled:not(.taken)").first
    name = other.locator("code").text_content()
    other.click()
    wait_for_status(page)
    chosen = page.locator(".token.chosen").text_content()
    assert chosen == {"␣": " ", "⏎": "\n", "⇥": "\t"}.get(name, name)
    assert text(page) != before
    assert text(page)[:7] == before[:7]
    page.click("#undo")
    assert text(page) == before
    page.click("#more")
    wait_for_status(page)
    assert text(page).startswith(before)
    assert page.locator(".token").count() > 20


def test_with_the_keyboard_alone(page: Any) -> None:
    page.fill("#max_tokens", "10")
    page.fill("#seed", "1")
    page.focus("#prompt")
    page.keyboard.type("key")
    page.keyboard.press("Control+Enter")
    wait_for_status(page)
    page.focus("#tokens")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "token1"
    assert "%" in page.get_attribute("#token1", "aria-description")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.closest('#detail') !== null")
    page.keyboard.press("Escape")
    assert not page.is_visible("#detail")
    assert page.evaluate("document.activeElement.id") == "token1"
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    wait_for_status(page)
    assert page.locator(".token.chosen").count() == 1


def test_what_is_wrong_is_said_and_markup_in_a_text_is_text(page: Any) -> None:
    generate(page, "<img src=x onerror=alert(1)><b>")
    assert text(page).startswith("<img src=x onerror=alert(1)><b>")
    assert page.locator("#text img, #text b").count() == 0
    page.fill("#max_tokens", "10000")
    page.evaluate("document.getElementById('form').noValidate = true")
    page.click("#generate")
    page.wait_for_selector("#status.bad")
    assert "max_tokens: at most 3,000" in page.inner_text("#status")


def said(page: Any) -> list[str]:
    return [str(box.text_content()) for box in page.locator("#log p").all()]


def answered(page: Any) -> Any:
    """The messages that Enter sends, once the answer to them is there."""
    with page.expect_response("**/v1/chat/completions") as response:
        page.keyboard.press("Enter")
    response.value.finished()
    wait_for_status(page)
    return response.value.request.post_data_json["messages"]


@in_chat
def test_a_conversation(page: Any) -> None:
    page.fill("#system", "Be brief.")
    page.fill("#max_tokens", "40")
    page.focus("#prompt")
    page.keyboard.type("<b>one</b>")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("<img src=x>")
    question = {"role": "user", "content": "<b>one</b>\n<img src=x>"}
    assert answered(page) == [{"role": "system", "content": "Be brief."}, question]
    assert page.locator("#log b, #log img").count() == 0
    page.keyboard.type("two")
    before = said(page)
    asked = answered(page)
    assert [each["content"] for each in asked] == ["Be brief.", question["content"], before[1], "two"]
    before = said(page)
    page.focus("#regenerate")
    assert answered(page) == asked
    assert said(page)[:3] == before[:3]
    assert said(page)[3] != before[3]
    page.locator(".user").first.fill("uno")
    assert [each["content"] for each in answered(page)] == ["Be brief.", "uno"]
    assert said(page)[0] == "uno"
    assert len(said(page)) == 2
    assert page.evaluate(CONTRAST) == []


@in_chat
def test_what_is_stopped_stays_and_what_fails_goes_back_to_its_field(page: Any, server: Server) -> None:
    page.fill("#temperature", "0")  # and so without an end
    for max_tokens, status in {"3000": "Writing", "5000": "max_tokens: at most 3,000"}.items():
        page.fill("#max_tokens", max_tokens)
        page.fill("#prompt", "long")
        page.click("text=Send")
        wait_for_status(page, status)
        page.keyboard.press("Escape")
        server.wait_for(running=0, waiting=0)
    assert len(said(page)) == 2
    assert said(page)[1]
    assert page.input_value("#prompt") == "long"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 380])
def test_it_fits_and_can_be_read(browser: Any, server: Server, scheme: str, width: int, tmp_path: Path) -> None:
    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
    page.goto(f"http://127.0.0.1:{server.port}/")
    generate(page)
    page.locator(".token").nth(2).click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    box = page.locator("#detail").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    low = page.evaluate(CONTRAST)
    assert low == [], f"text with a contrast below 4.5: {low}"
    if folder := os.environ.get("NANOGPT_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/page-{scheme}-{width}.png")
    page.close()


# every visible text's colour against what is behind it (WCAG 2.1, 1.4.3); disabled buttons may be paler
CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const linear = v => v <= 0.04045 * 255 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
  const painted = color => {  // the luminance of a colour on top of those before it
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(linear);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const low = [];
  for (const element of document.querySelectorAll('body *:not(script, .unseen, :disabled)')) {
    const has_text = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (!has_text || !element.checkVisibility()) continue;
    const colors = [getComputedStyle(element).color];
    for (let each = element; each; each = each.parentElement) colors.unshift(getComputedStyle(each).backgroundColor);
    const [back, front] = colors.map(painted).slice(-2);
    const contrast = (Math.max(back, front) + 0.05) / (Math.min(back, front) + 0.05);
    if (contrast < 4.5) low.push([element.tagName, element.className, element.textContent.slice(0, 20), contrast]);
  }
  return low;
}"""
