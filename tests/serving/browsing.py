"""A browser on the chat page: the fixtures `browser`, `visit` and `script` for tests to import, and what they share."""

import contextlib
import shutil
import socket
import threading

import pytest
from playwright.sync_api import expect, sync_playwright

from slingshot.serving.app import create_app
from slingshot.serving.gateway import Gateway
from slingshot.serving.served_model import ServedModel
from tests import waiting
from tests.serving.conftest import ScriptedBackend, ids_of, running

expect.set_options(timeout=1000 * waiting.PATIENCE)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; Debian has it in `chromium`")
browsed = [pytest.mark.slow, needs_browser]


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
            page.set_default_timeout(1000 * waiting.PATIENCE)
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


class Line:
    """The way to a server: a port of loopback that hands on what comes. `cut` breaks it; closed: it takes nothing."""

    def __init__(self, url):
        self._target = ("127.0.0.1", int(url.rpartition(":")[2]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets, self.closed = [], False
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            with contextlib.suppress(OSError):
                near = self._listener.accept()[0]
                if self.closed:
                    near.close()
                    continue
                far = socket.create_connection(self._target)
                self._sockets += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._hand_on, args=ends, daemon=True).start()

    def _hand_on(self, source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self, closed=False):
        self.closed = closed
        for its in self._sockets:
            with contextlib.suppress(OSError):
                its.shutdown(socket.SHUT_RDWR)


def ask(page, text, wait=True):
    page.fill("#question", text)
    page.press("#question", "Enter")
    if wait:
        page.wait_for_selector(".answer .look")
        expect(page.locator("#send")).to_be_visible()


def until(page, condition):
    """Wait for what the page says of itself; its policy forbids code that is made of text."""
    waiting.until(lambda: page.evaluate(condition), pause=lambda seconds: page.wait_for_timeout(1000 * seconds))


def grows(page, selector):
    length = f"(document.querySelector('{selector}')?.textContent.length ?? 0)"
    until(page, f"{length} > 5")
    until(page, f"{length} > {page.evaluate(length)}")


KEPT = """new Promise((resolve) => {
  indexedDB.open("slingshot").onsuccess = ({ target }) => {
    const all = target.result.transaction("conversations").objectStore("conversations").getAll();
    all.onsuccess = () => resolve(all.result.flatMap((each) => Object.values(each.nodes)));
  };
})"""


def kept(page):
    """Wait until the browser keeps an answer that began to come, by the name at which a reload goes on with it."""
    until(page, f"{KEPT}.then((nodes) => nodes.some((node) => node.request && node.reasoning.length > 5))")
