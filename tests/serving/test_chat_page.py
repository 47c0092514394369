import re

import httpx
from playwright.sync_api import expect

from tests.serving.browsing import ask, browser, needs_browser, script, visit

__all__ = ["browser", "script", "visit"]  # its fixtures


@needs_browser
def test_a_question_is_asked_and_answered_in_a_browser(visit, script):
    """The rest of what the page does is in test_browser.py, which is slow."""
    page = visit(script("3 plus 4 is 7.\n</think>\n\nIt is **7**, `print`")[0])
    ask(page, "What is 3+4?")
    expect(page.locator("summary")).to_contain_text("Thought for")
    assert page.inner_text(".answer .text") == "It is 7, print"
    assert page.inner_text(".answer .text strong") == "7"


def test_the_page_and_all_it_asks_for_come_from_this_server(served):
    page = httpx.get(f"{served}/")
    policy = page.headers["content-security-policy"]
    assert page.status_code == 200 and "default-src 'none'" in policy and "http" not in policy
    wanted = re.findall(r'(?:src|href)="(page/[^"]+)"', page.text)
    modules = [name for name in wanted if name.endswith("chat.js")]
    while modules:
        source = httpx.get(f"{served}/{modules.pop()}").text
        found = [f"page/{name}" for name in re.findall(r'from "\./([\w.]+)"', source)]
        modules += [name for name in found if name not in wanted]
        wanted += found
    styles = httpx.get(f"{served}/page/vendor/katex.css").text
    wanted += [f"page/vendor/{name}" for name in re.findall(r"url\(([^)]+)\)", styles)]
    assert len(set(wanted)) > 25
    for name in set(wanted):
        assert httpx.get(f"{served}/{name}").status_code == 200, name


def test_nothing_beside_the_page_s_files_is_served(served):
    for path in ("page/../app.py", "page/%2e%2e/app.py", "page/none.js"):
        assert httpx.get(f"{served}/{path}").status_code == 404
