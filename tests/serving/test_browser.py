"""The chat page in a real browser, against a real server on loopback."""

import contextlib
import json
import re
import shutil

import pytest
from playwright.sync_api import expect, sync_playwright

from slingshot.engine.engine import Engine
from slingshot.serving import accounts
from slingshot.serving.app import create_app
from slingshot.serving.gateway import Gateway
from slingshot.serving.ledger import Ledger
from slingshot.serving.local import LocalBackend
from slingshot.serving.prices import PriceList
from slingshot.serving.served_model import ServedModel
from tests.serving.conftest import ScriptedBackend, ids_of, running

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; Debian has it in `chromium`"),
]

SUMS = "3 plus 4 is 7, 7 minus 2 is 5. "
ANSWER = f"{SUMS * 3}\n</think>\n\nIt is 5, for {SUMS}"


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
    assert notes == []
    assert [its for its in asked if not its.startswith((*own, "data:", "blob:"))] == []


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


def test_reasoning_streams_and_folds(visit, script):
    page = visit(script(ANSWER, 0.01)[0])
    ask(page, "What is 3+4-2?", wait=False)
    grows(page, ".said")
    assert page.locator("details.reasoning").get_attribute("open") is not None
    expect(page.locator("#spoken")).to_be_empty()
    page.wait_for_selector(".look")
    assert page.locator("details.reasoning").get_attribute("open") is None
    expect(page.locator("summary")).to_contain_text(re.compile(r"Thought for [\d.]+ s, \d+ tokens"))
    page.click("summary")
    expect(page.locator(".said")).to_be_visible()
    assert page.inner_text(".said").strip() == (SUMS * 3).strip()
    page.click("summary")
    expect(page.locator(".said")).to_be_hidden()
    expect(page.locator("#spoken")).to_have_text(f"It is 5, for {SUMS.strip()}")
    expect(page.locator(".answer .tools").last).to_contain_text("tokens/s")


def test_an_answer_is_stopped_and_keeps_what_it_said(visit, script):
    url, (backend,) = script(SUMS * 50, 0.02)
    page = visit(url)
    ask(page, "Go on", wait=False)
    grows(page, ".said")
    page.click("#stop")
    expect(page.locator(".answer .tools").last).to_contain_text("stopped")
    assert page.locator(".said").text_content().startswith(SUMS[:5])
    ask(page, "And on", wait=False)
    grows(page, ".turn:nth-child(4) .said")
    page.keyboard.press("Escape")
    expect(page.locator(".answer .tools").last).to_contain_text("stopped")
    assert page.locator(".answer").count() == 2
    until(page, "document.activeElement.id === 'question'")
    assert backend.aborted == 2


def test_answer_now_closes_the_reasoning(visit, script):
    url, (backend,) = script(SUMS * 20, 0.02)
    page = visit(url)
    ask(page, "Why?", wait=False)
    grows(page, ".said")
    page.click("#now")
    until(page, "document.querySelector('.answer .text').textContent.length > 5")
    page.keyboard.press("Escape")
    page.wait_for_selector(".look")
    assert len(backend.asked) == 2  # the second goes on behind the closing words


def test_a_reload_in_the_middle_keeps_what_was_there_and_can_ask_again(visit, script):
    page = visit(script(ANSWER, 0.05)[0])
    ask(page, "What is 3+4-2?", wait=False)
    grows(page, ".said")
    page.wait_for_timeout(700)  # it is kept every half second
    page.reload()
    page.wait_for_selector(".answer summary")
    assert page.locator(".said").text_content().startswith(SUMS[:5])
    page.get_by_role("button", name="Ask again").click()
    page.wait_for_selector(".look")
    assert page.inner_text(".answer .text") == f"It is 5, for {SUMS.strip()}"
    assert page.locator(".answer").count() == 1


def test_an_edited_question_is_a_branch_and_the_first_stays(visit, script):
    page = visit(script("5\n</think>\n\nfive")[0])
    ask(page, "first")
    page.get_by_role("button", name="Edit").click()
    page.get_by_role("textbox", name="Edit").fill("second")
    page.keyboard.press("Enter")
    expect(page.locator(".turn.user")).to_contain_text("2/2")
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator(".turn.user .text")).to_have_text("second")
    page.get_by_role("button", name="Earlier version").click()
    expect(page.locator(".turn.user .text")).to_have_text("first")
    page.get_by_role("button", name="Again", exact=True).click()
    expect(page.locator(".answer .tools")).to_contain_text("2/2")


def test_two_models_answer_side_by_side(visit, script):
    url, backends = script("5\n</think>\n\nfive", names=("rl_final", "base"))
    page = visit(url)
    page.select_option("#beside", "base")
    ask(page, "What is 3+2?")
    assert page.locator(".turn.pair .who").all_inner_texts() == ["rl_final", "base"]
    assert page.locator(".turn.pair .text").all_inner_texts() == ["five", "five"]
    first, second = (page.locator(".turn.pair .answer").nth(place).bounding_box() for place in (0, 1))
    assert first["y"] == second["y"] and first["x"] + first["width"] <= second["x"]
    assert backends[0].asked[0].prompt_ids == backends[1].asked[0].prompt_ids
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_the_glass_box_tells_what_the_engine_did(visit, tokenizer, make_model, deepseek):
    shape = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 64}
    engine = Engine(make_model(deepseek(**shape)), tokenizer)
    app = create_app(Gateway([ServedModel("tiny", tokenizer, LocalBackend(engine), experts=True)]))
    with running(app) as url:
        page = visit(url)
        ask(page, "What is 3+4-2?")
        said = page.locator(".said").all_text_contents(), page.inner_text(".answer .text")
        page.click(".look")
        page.wait_for_selector(".token")
        assert (page.locator(".said").all_text_contents(), page.inner_text(".answer .text")) == said
        assert page.inner_text(".prompt").count("What is 3+4-2?") == 1
        page.locator(".token").nth(1).click()
        expect(page.locator(".inside")).to_contain_text(re.compile(r"probability <?[\d.]+%"))
        assert page.locator(".inside li").count() >= 4
        assert page.locator(".layer").count() == 2  # of three layers the first is dense
        assert page.locator(".layer").first.locator(".chosen").count() == 3
        page.keyboard.press("ArrowRight")
        expect(page.locator(".token").nth(2)).to_be_focused()
        assert page.locator(".token[aria-pressed=true]").count() == 1
        page.click(".look")
        expect(page.locator(".glass")).to_have_count(0)


def test_language_and_theme_are_kept(visit, script):
    page = visit(script("5\n</think>\n\nfive")[0])
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#language")
    page.click("#theme")
    page.reload()
    expect(page.locator("#send")).to_have_text("送信")
    assert page.locator("html").get_attribute("lang") == "ja"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.click("#language")
    expect(page.locator("#send")).to_have_text("Send")


def test_a_visitor_s_own_language_and_theme_are_the_first(visit, script):
    page = visit(script("5")[0], locale="ja-JP", color_scheme="dark")
    assert page.locator("html").get_attribute("lang") == "ja"
    assert page.locator("html").get_attribute("data-theme") == "dark"


def test_conversations_are_searched_exported_and_imported(visit, script, tmp_path):
    url, _ = script("5\n</think>\n\nfive")
    page = visit(url)
    ask(page, "about apples")
    page.click("#new")
    ask(page, "about pears")
    expect(page.locator("#list div")).to_have_count(2)
    page.fill("#search", "APPLES")
    assert page.locator("#list div").all_inner_texts() == ["about apples\n×"]
    page.fill("#search", "plums")
    expect(page.locator("#list")).to_have_text("Nothing found.")
    with page.expect_download() as download:
        page.click("#export")
    file = tmp_path / "conversations.json"
    download.value.save_as(file)
    assert len(json.loads(file.read_text())["conversations"]) == 2

    other = visit(url)
    expect(other.locator("#list div")).to_have_count(0)
    other.set_input_files("#file", file)
    expect(other.locator("#list div")).to_have_count(2)
    other.get_by_role("button", name="about apples", exact=True).click()
    assert other.inner_text(".answer .text") == "five"
    file.write_text('{"conversations": [1]}')
    other.set_input_files("#file", file)
    expect(other.locator("#note")).to_contain_text("not a file of conversations")
    other.on("dialog", lambda dialog: dialog.accept())
    other.get_by_role("button", name="Delete: about apples").click()
    expect(other.locator("#list div")).to_have_count(1)
    expect(other.locator(".answer")).to_have_count(0)


def test_all_of_it_is_reached_by_keyboard(visit, script):
    page = visit(script("5\n</think>\n\nfive")[0])
    reached = []

    def tab_to(wanted, key="Tab"):
        for _ in range(40):
            page.keyboard.press(key)
            reached.append(page.evaluate("(e => e.id || e.className || e.textContent)(document.activeElement)"))
            if reached[-1] == wanted:
                return
        raise AssertionError(reached)

    expect(page.locator("#question")).to_be_focused()
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    page.wait_for_selector(".look")
    expect(page.locator("#question")).to_be_focused()
    tab_to("look", "Shift+Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector(".token")
    tab_to("Edit", "Shift+Tab")
    tab_to("token reasoning")
    expect(page.locator(".inside")).to_contain_text("probability")
    tab_to("question")
    page.keyboard.press("Control+k")
    expect(page.locator("#search")).to_be_focused()
    page.keyboard.press("Control+Shift+o")
    expect(page.locator("#question")).to_be_focused()
    expect(page.locator(".answer")).to_have_count(0)
    for name in ("model", "effort", "budget", "glass", "new", "search", "import", "export", "language", "theme"):
        tab_to(name, "Shift+Tab")


HOSTILE = """\
<script>window.taken = 1</script><img src="http://elsewhere.invalid/a.png" onerror="window.taken = 1">

![picture](http://elsewhere.invalid/b.png) and [a link](javascript:window.taken=1)

<p id="send" class="hello" style="position: fixed; inset: 0">over all</p>

<a title="$a$ $b > onclick=c$">quoted</a>

It is $x^2$, and

$$\\frac{1}{2}$$

```python
print(1)  # <b>$5$</b>
```

| a | b |
|---|---|
| 1 | 2 |
"""


def test_markdown_is_rendered_and_harmless(visit, script):
    page = visit(script(f"{HOSTILE}\n</think>\n\n{HOSTILE}", 0.001)[0])
    ask(page, HOSTILE)
    assert page.evaluate("window.taken") is None
    answer = page.locator(".answer")
    assert page.locator("#thread").locator("img, script, svg image").count() == 0
    assert page.locator("#send").count() == 1 and answer.locator("[style*=fixed], .hello").count() == 0
    assert answer.get_by_text("a link", exact=True).get_attribute("href") is None
    assert answer.locator(".katex").count() == 2 and answer.locator(".katex-display").count() == 1
    assert answer.locator("pre .hljs-built_in").inner_text() == "print"
    assert "# <b>$5$</b>" in answer.locator("pre").inner_text()
    assert answer.locator("td").all_inner_texts() == ["1", "2"]
    assert page.inner_text(".turn.user .text").startswith("<script>")


def test_a_long_answer_is_not_drawn_anew_and_does_not_pull_its_reader_down(visit, script):
    page = visit(script("5\n</think>\n\n" + "one paragraph\n\n" * 80, 0.004)[0], viewport={"width": 900, "height": 500})
    ask(page, "Go on", wait=False)
    until(page, "document.querySelectorAll('.answer .text > *').length > 30")
    assert page.evaluate("(e => e.scrollHeight - e.scrollTop - e.clientHeight)(document.querySelector('#thread'))") < 60
    page.evaluate("document.querySelector('#thread').scrollTop = 0")
    page.evaluate("window.first = document.querySelector('.answer .text').children[0]")
    until(page, "document.querySelectorAll('.answer .text > *').length > 60")
    assert page.evaluate("first.isConnected")
    page.wait_for_selector(".look")
    assert page.evaluate("document.querySelector('#thread').scrollTop") == 0


def test_a_server_with_keys_is_asked_with_one_and_its_refusals_are_told(visit, script, tmp_path):
    prices = PriceList.parse({"models": {"tiny": {"cache_hit": 1, "cache_miss": 10, "output": 100}}})
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.sqlite", prices)
    try:
        page = visit(script("5\n</think>\n\nfive", ledger=ledger)[0], refused=True)
        page.get_by_label("Key", exact=True).fill(accounts.create(ledger, "poor", balance=0.0001))
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_value("tiny")
        ask(page, "What is 3+2?", wait=False)
        expect(page.locator(".answer .bad")).to_contain_text("balance")
        page.get_by_role("button", name="Key", exact=True).click()
        busy = accounts.create(ledger, "busy", concurrency=1)
        ledger.reserve(accounts.authenticate(ledger, busy, keyless=False), "tiny", 10, 10, "another answer")
        page.locator("#secret").fill(busy)
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Again", exact=True).click()
        expect(page.locator(".answer .bad")).to_contain_text(re.compile(r"Ask again in \d+ s"))
    finally:
        ledger.close()


def test_a_server_that_is_gone_is_told_of(visit, tokenizer):
    backend = ScriptedBackend(ids_of(tokenizer, SUMS), eos_ids=tokenizer.eos_ids)
    with running(create_app(Gateway([ServedModel("tiny", tokenizer, backend)]))) as url:
        page = visit(url, refused=True)
    ask(page, "Still there?", wait=False)
    expect(page.locator(".answer .bad")).to_have_text("The server does not answer.")
    assert page.locator(".turn.user .text").inner_text() == "Still there?"
