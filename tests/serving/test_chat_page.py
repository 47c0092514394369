import re

import httpx


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
