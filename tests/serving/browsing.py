"""A browser on the chat page: the fixtures `browser`, `visit` and `script` for tests to import, and what they share."""

import contextlib
import shutil

import pytest
from playwright.sync_api import expect, sync_playwright

from slingshot.serving.app import create_app
from slingshot.serving.gateway import Gateway
from slingshot.serving.served_model import ServedModel
from tests.serving.conftest import ScriptedBackend, ids_of, running

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browsed = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; Debian has it in `chromium`"),
]


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def script(tokenizer):
    """script(text, pause, names): the URL and the backends of a server whose models say this, a token a pause."""
    with contextlib.ExitStack() as stack:

        def make(text, pause=0.0, names=("tiny",), **gateway):
            backends = [
                ScriptedBackend([*ids_of(tokenizer, text), tokenizer.eos_id], 1, eos_ids=tokenizer.eos_ids)
                for _ in names
            ]
            for backend in backends:
                backend.pause = pause
            models = [ServedModel(name, tokenizer, its) for name, its in zip(names, backends, strict=True)]
            return stack.enter_context(running(create_app(Gateway(models, **gateway), keyless=False))), backends

        yield make


@pytest.fixture
def visit(browser, script):
    """visit(url): the page, opened with a fresh store. It may say nothing on the console and ask no other host;
    refused: answers with an error's status are meant, and the browser notes them."""
    notes, asked, own = [], [], set()
    with contextlib.ExitStack() as stack:

        def make(url, refused=False, **options):
            options = {"locale": "en-US", "color_scheme": "light", "reduced_motion": "reduce"} | options
            page = stack.enter_context(contextlib.closing(browser.new_context(**options))).new_page()
            page.set_default_timeout(20_000)
            meant = "Failed to load resource" if refused else "\0"
            page.on("console", lambda message: meant in message.text or notes.append(message.text))
            page.on("pageerror", lambda error: notes.append(str(error)))
            page.on("request", lambda request: asked.append(request.url))
            own.add(url)
            page.goto(url)
            page.wait_for_selector("#thread > *")
            return page

        yield make
    assert not notes, notes
    assert [its for its in asked if not its.startswith((*own, "data:", "blob:", "about:"))] == []


def ask(page, text, wait=True):
    page.fill("#question", text)
    page.press("#question", "Enter")
    if wait:
        page.wait_for_selector(".answer .look")
        expect(page.locator("#send")).to_be_visible()


def until(page, condition):
    """Wait for what the page says of itself; its policy forbids code that is made of text."""
    for _ in range(1000):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"never: {condition}")


def grows(page, selector):
    length = f"(document.querySelector('{selector}')?.textContent.length ?? 0)"
    until(page, f"{length} > 5")
    until(page, f"{length} > {page.evaluate(length)}")
