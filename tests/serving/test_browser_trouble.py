"""The chat page where something is wrong: answers that would do harm, long ones, refusals, a server that is gone."""

import json
import re

from playwright.sync_api import expect

from slingshot.serving import accounts
from slingshot.serving.ledger import Ledger
from slingshot.serving.prices import PriceList
from tests.serving.browsing import Line, ask, browsed, browser, grows, script, until, visit
from tests.serving.conftest import ScriptedBackend, ids_of, serving

__all__ = ["browser", "script", "visit"]  # its fixtures

pytestmark = browsed

SAID = "5\n</think>\n\n" + "3 plus 4 is 7. " * 20

HOSTILE = """\
<script>window.taken = 1</script><img src="http://elsewhere.invalid/a.png" onerror="window.taken = 1">

![picture](http://elsewhere.invalid/b.png) and [a link](javascript:window.taken=1)

<p id="send" class="hello" style="position: fixed; inset: 0">over all</p>

<a title="$a$ $b > onclick=c$">quoted</a>

It is $x^2$, H<sub>2</sub>O, and

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
    assert answer.locator(".katex").count() == 4 and answer.locator(".katex-display").count() == 1
    assert answer.locator("pre .hljs-built_in").inner_text() == "print"
    assert "# <b>$5$</b>" in answer.locator("pre").inner_text()
    assert answer.locator("td").all_inner_texts() == ["1", "2"]
    assert page.inner_text(".turn.user .text").startswith("<script>")
    assert '<img src="http://elsewhere.invalid/a.png"' in answer.locator(".text").inner_text()
    assert answer.locator("sub").inner_text() == "2"


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
        expect(page.locator("#note")).to_have_text("This server asks for a key.")
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
    backend = ScriptedBackend(ids_of(tokenizer, "3 plus 4 is 7."), eos_ids=tokenizer.eos_ids)
    with serving(tokenizer, backend) as url:
        page = visit(url, refused=True)
    ask(page, "Still there?", wait=False)
    expect(page.locator(".answer .bad")).to_have_text("The server does not answer.")
    assert page.locator(".turn.user .text").inner_text() == "Still there?"


def test_a_connection_that_breaks_is_sought_again(visit, script):
    url, (backend,) = script(SAID, 0.03)
    line = Line(url)
    page = visit(line.url, refused=True)
    ask(page, "Go on", wait=False)
    grows(page, ".answer .text")
    line.cut()
    page.wait_for_selector(".look")
    assert page.inner_text(".answer .text").split() == SAID.split()[2:]
    expect(page.locator(".answer .bad")).to_be_empty()
    assert len(backend.asked) == 1


def test_a_server_that_dies_amid_an_answer_is_told_of_and_what_came_stays(visit, script):
    url, _ = script(SAID, 0.03)
    line = Line(url)
    page = visit(line.url, refused=True)
    ask(page, "Go on", wait=False)
    grows(page, ".answer .text")
    line.cut(closed=True)
    expect(page.locator(".answer .bad")).to_have_text("The server does not answer.")
    assert page.inner_text(".answer .text").startswith("3 plus")
    line.cut(closed=False)
    page.get_by_role("button", name="Again", exact=True).click()
    expect(page.locator(".answer .tools")).to_contain_text("2/2")


def test_two_hundred_turns_are_opened_at_their_end_and_asked_on_without_drawing_them_anew(visit, script, tmp_path):
    said, leaf = {}, None
    for turn in range(200):
        for role, content in (("user", f"question {turn}"), ("assistant", f"It is `{turn}`.\n\n" * 5)):
            own = {"id": f"{role}{turn}", "parent": leaf, "role": role, "content": content, "reasoning": ""}
            said[own["id"]] = own | {"asked": {"model": "tiny"}}
            leaf = own["id"]
    whole = {"id": "long", "title": "long", "created": 1, "updated": 1, "leaf": leaf, "nodes": said}
    file = tmp_path / "long.json"
    file.write_text(json.dumps({"conversations": [whole]}))
    url, (backend,) = script("5\n</think>\n\nfive")
    backend.max_length = 100_000
    page = visit(url)
    page.set_input_files("#file", file)
    page.get_by_role("button", name="long", exact=True).click()
    expect(page.locator(".turn")).to_have_count(400)
    expect(page.locator("#node-assistant199")).to_be_in_viewport()
    page.evaluate("window.first = document.querySelector('.answer .text').firstChild")
    ask(page, "and?")
    assert page.evaluate("first.isConnected")
    expect(page.locator(".answer").last.locator(".text")).to_have_text("five")
    expect(page.locator(".answer").last).to_be_in_viewport()
