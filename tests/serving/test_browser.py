"""The chat page in a real browser, against a real server on loopback."""

import json
import re
from dataclasses import replace

from playwright.sync_api import expect

from slingshot.engine.engine import Engine
from slingshot.serving.app import create_app
from slingshot.serving.gateway import Gateway
from slingshot.serving.load import Limits
from slingshot.serving.local import LocalBackend
from slingshot.serving.served_model import ServedModel
from tests import waiting
from tests.serving.browsing import ask, browsed, browser, grows, kept, script, until, visit
from tests.serving.conftest import running, serving

__all__ = ["browser", "script", "visit"]  # its fixtures

pytestmark = browsed


class Greedy(LocalBackend):
    """So that a random model runs in circles, which are guessed."""

    def generate(self, generation):
        return super().generate(replace(generation, params=replace(generation.params, temperature=0.0, max_tokens=150)))


SUMS = "3 plus 4 is 7, 7 minus 2 is 5. "
ANSWER = f"{SUMS * 3}\n</think>\n\nIt is 5, for {SUMS}"


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
    expect(page.locator("#now")).to_be_hidden()
    until(page, "document.querySelector('.answer .text').textContent.length > 5")
    page.keyboard.press("Escape")
    page.wait_for_selector(".look")
    assert len(backend.asked) == 2  # the second goes on behind the closing words


def test_a_reload_in_the_middle_loses_nothing(visit, script):
    url, (backend,) = script(ANSWER, 0.05)
    page = visit(url)
    ask(page, "What is 3+4-2?", wait=False)
    kept(page)
    page.reload()
    grows(page, ".said")
    page.wait_for_selector(".look")
    assert page.locator(".said").text_content().strip() == (SUMS * 3).strip()
    assert page.inner_text(".answer .text") == f"It is 5, for {SUMS.strip()}"
    assert len(backend.asked) == 1 and page.locator(".answer").count() == 1


def test_an_answer_that_is_kept_no_longer_is_shown_as_far_as_it_came_and_asked_for_again(visit, script):
    url, (backend,) = script(ANSWER, 0.05, limits=Limits(resume=0.0))
    page = visit(url, refused=True)
    ask(page, "What is 3+4-2?", wait=False)
    kept(page)
    page.goto("about:blank")
    waiting.until(lambda: backend.aborted)
    page.goto(url)
    again = page.get_by_role("button", name="Ask again")
    again.wait_for()
    assert page.locator(".said").text_content().startswith(SUMS[:5])
    again.click()
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


def test_an_answer_goes_on_while_another_branch_or_conversation_is_shown(visit, script):
    url, (backend,) = script(ANSWER, 0.03)
    page = visit(url)
    backend.pause = 0.0
    ask(page, "first")
    backend.pause = 0.03
    page.get_by_role("button", name="Again", exact=True).click()
    grows(page, ".said")
    page.get_by_role("button", name="Earlier version").click()
    expect(page.get_by_role("button", name="Later version")).to_be_focused()
    expect(page.locator("#send")).to_be_visible()
    page.keyboard.press("Escape")  # stops what is shown alone
    page.keyboard.press("Enter")
    expect(page.locator("#stop")).to_be_visible()
    grows(page, ".said")
    page.click("#new")
    page.get_by_role("button", name="first", exact=True).click()
    page.wait_for_selector(".look")
    expect(page.locator(".answer .text")).to_have_text(f"It is 5, for {SUMS.strip()}")
    expect(page.locator(".answer .tools")).to_contain_text("2/2")
    assert len(backend.asked) == 2


def test_instructions_for_a_conversation_come_before_all_of_it(visit, script, tokenizer):
    url, (backend,) = script("5\n</think>\n\nfive")
    page = visit(url)
    page.get_by_label("Instructions").fill("Stop at the end.")
    for question in ("first", "second"):
        ask(page, question)
    expect(page.locator(".answer .look")).to_have_count(2)
    asked = [tokenizer.decode(list(its.prompt_ids)) for its in backend.asked]
    assert all(prompt.startswith("Stop at the end.") for prompt in asked) and len(asked) == 2
    expect(page.locator(".turn").first).to_have_text("Stop at the end.")
    page.click("#new")
    expect(page.get_by_label("Instructions")).to_have_value("")


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
    with serving(tokenizer, LocalBackend(engine)) as url:
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


def test_the_glass_box_marks_what_was_cached_and_what_was_drafted(visit, tokenizer, make_model, dense):
    model = make_model(dense(vocab_size=tokenizer.vocab_size, max_position_embeddings=512))
    engine = Engine(model, tokenizer, speculation="on")
    served = ServedModel("tiny", tokenizer, Greedy(engine))
    with running(create_app(Gateway([served]))) as url:
        page = visit(url)
        page.check("#glass")
        for question in (f"What is 3+4-2? {SUMS * 3}", "And 7 minus 2?"):
            ask(page, question)
            expect(page.locator(".answer .look")).to_have_count(2 if question[0] == "A" else 1)
        for place in (0, 1):
            page.locator(".look").nth(place).click()
            page.wait_for_selector(f".turn:nth-child({2 * place + 2}) .token")
        first, second = page.locator(".prompt").all()
        assert first.locator(".hit").inner_text() == ""
        hit, miss = (second.locator(name).inner_text() for name in (".hit", ".miss"))
        assert f"What is 3+4-2? {SUMS}" in hit and "And 7" in miss and "And 7" not in hit
        cached = re.search(r"Prompt: (\d+) of (\d+) tokens", page.locator(".asked").nth(1).inner_text())
        assert 0 < int(cached[1]) < int(cached[2]) and int(cached[1]) % 16 == 0
        lines = [
            second.locator(f".{name}").evaluate("e => getComputedStyle(e).borderBottomWidth")
            for name in ("hit", "miss")
        ]
        assert lines == ["2px", "0px"]
        drafted = page.locator(".token.drafted").count()
        assert 0 < drafted <= engine.counters.accepted
        told = sum(int(its) for its in re.findall(r"Dotted: (\d+) of", page.locator("#thread").inner_text()))
        assert told == drafted
        page.locator(".token.drafted").first.click()
        expect(page.locator(".inside").first).to_contain_text("drafted")


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
    assert page.locator("#list .name").all_inner_texts() == ["about apples"]
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
    ring = {"a": {"id": "a", "parent": "a", "role": "user", "content": "?"}}
    for broken in (1, {"id": "x", "title": "x", "nodes": {"a": 1}}, {"id": "x", "title": "x", "nodes": ring}):
        other.click("#new")
        expect(other.locator("#note")).to_be_empty()
        file.write_text(json.dumps({"conversations": [broken]}))
        other.set_input_files("#file", file)
        expect(other.locator("#note")).to_contain_text("not a file of conversations")


def test_a_conversation_is_renamed_and_deleted_and_that_is_undone(visit, script):
    page = visit(script("5\n</think>\n\nfive")[0])
    ask(page, "about apples")
    page.get_by_role("button", name="Rename: about apples").click()
    page.keyboard.type("fruit")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="fruit", exact=True)).to_be_focused()
    page.get_by_role("button", name="Rename: fruit").click()
    page.keyboard.type("vegetables")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Delete: fruit").click()
    expect(page.locator("#list div")).to_have_count(0)
    expect(page.locator(".answer")).to_have_count(0)
    expect(page.get_by_role("button", name="Undo")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#list .name")).to_have_text("fruit")
    expect(page.locator(".answer .text")).to_have_text("five")


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
    tab_to("edit", "Shift+Tab")
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
