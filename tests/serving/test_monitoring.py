"""What the owner of a server sees of it: metrics, the access log, the status page."""

import contextlib
import io
import json
import re
import shutil
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from slingshot.base.errors import SlingshotError
from slingshot.serving import accounts
from slingshot.serving.access_log import AccessLog
from slingshot.serving.app import create_app
from slingshot.serving.gateway import Gateway
from slingshot.serving.ledger import Ledger
from slingshot.serving.ledger_tables import REQUESTS
from slingshot.serving.local import LocalBackend
from slingshot.serving.prices import PICO, PriceList
from slingshot.serving.served_model import ServedModel
from tests.serving.conftest import BODY, CHAT, ScriptedBackend, ids_of, running
from tests.waiting import until

ROOT = Path(__file__).parents[2]
PRICES = PriceList.parse({"models": {"*": {"cache_hit": 1, "cache_miss": 10, "output": 100}}})


@pytest.fixture
def serve(tmp_path):
    """serve(model, **options of the app): a client of a server with a ledger, which `client.ledger` is, and a log."""
    with contextlib.ExitStack() as stack:

        def make(model, **options):
            ledger = Ledger(f"sqlite:///{tmp_path}/ledger.sqlite", PRICES)
            stack.callback(ledger.close)
            file = io.StringIO()
            url = stack.enter_context(running(create_app(Gateway([model], ledger), log=AccessLog(file), **options)))
            client = stack.enter_context(httpx.Client(base_url=url, timeout=30))
            client.ledger = ledger
            client.logged = lambda: [json.loads(line) for line in file.getvalue().splitlines()]
            return client

        yield make


@pytest.fixture
def paced(tokenizer):
    ids = [*ids_of(tokenizer, "3 plus 4\n</think>\n\n5"), tokenizer.eos_id]
    backend = ScriptedBackend(ids, eos_ids=tokenizer.eos_ids)
    backend.pause = 0.02
    return ServedModel("tiny", tokenizer, backend)


def samples(http):
    """{name: {labels' values: value}} of /metrics."""
    found = {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


def test_metrics_add_up_to_what_was_answered(serve, engine, tokenizer):
    http = serve(ServedModel("tiny", tokenizer, LocalBackend(engine)))
    before = engine.counters
    uses = [
        http.post(CHAT, json=BODY | {"max_tokens": 20, "n": n, "ignore_eos": True}).json()["usage"] for n in (1, 1, 3)
    ]
    assert http.post(CHAT, json=BODY | {"model": "none"}).status_code == 404
    assert http.post(CHAT, content="{").status_code == 400
    found = samples(http)
    assert found["slingshot_requests_total"] == {("tiny", "200"): 3, ("", "404"): 1, ("", "400"): 1}
    tiny = {name: values["tiny",] for name, values in found.items() if ("tiny",) in values}
    completion = sum(use["completion_tokens"] for use in uses)
    assert tiny["slingshot_completion_tokens_sum"] == tiny["slingshot_generated_tokens_total"] == completion
    assert tiny["slingshot_prompt_tokens_sum"] == sum(use["prompt_tokens"] for use in uses)
    cached = sum(use["prompt_tokens_details"]["cached_tokens"] for use in uses)
    assert tiny["slingshot_cached_tokens_total"] == cached
    assert tiny["slingshot_cost_dollars_sum"] == pytest.approx(sum(row.cost for row in booked(http)) / PICO)
    assert tiny["slingshot_queue_seconds_sum"] <= tiny["slingshot_first_token_seconds_sum"]
    for name in ("queue_seconds", "first_token_seconds", "prompt_tokens", "completion_tokens", "cost_dollars"):
        assert tiny[f"slingshot_{name}_count"] == 3
    assert engine.counters.decoded - before.decoded == completion
    assert tiny["slingshot_pages_used"] == tiny["slingshot_requests_running"] == tiny["slingshot_waiting_tokens"] == 0
    assert tiny["slingshot_pages_kept"] == engine.counters.pages_kept and tiny["slingshot_pages"] > 0


def booked(http):
    with http.ledger.transaction() as connection:
        return connection.execute(REQUESTS.select()).all()


def test_times_are_those_that_a_client_sees(serve, paced):
    http = serve(paced)
    start = time.perf_counter()
    http.post(CHAT, json=BODY)
    took = time.perf_counter() - start
    tiny = {name: values["tiny",] for name, values in samples(http).items() if ("tiny",) in values}
    size = len(paced.backend.ids)
    assert tiny["slingshot_between_tokens_seconds_count"] == size - 1
    first, between = tiny["slingshot_first_token_seconds_sum"], tiny["slingshot_between_tokens_seconds_sum"]
    assert first >= 0.02 and between > 0 and 0.02 * size <= first + between < took
    [line] = [line for line in http.logged() if line["model"]]
    assert line["queue_seconds"] < line["first_token_seconds"] == pytest.approx(first, abs=1e-3)
    assert 0.02 * size < line["seconds"] < time.perf_counter() - start


def test_the_log_tells_of_every_request_and_of_no_text(serve, paced, tokenizer):
    http = serve(paced, keyless=False)
    assert http.post(CHAT, json=BODY).status_code == http.get("/metrics").status_code == 401
    http.headers["Authorization"] = f"Bearer {accounts.create(http.ledger, 'alice')}"
    whole = http.post(CHAT, json=BODY)
    with http.stream("POST", CHAT, json=BODY | {"stream": True}) as left:
        next(left.iter_lines())
    several = http.post("/v1/completions", json={"model": "tiny", "prompt": ["3+4-2", "4-2"], "max_tokens": 2})
    until(lambda: len(http.logged()) == 5)
    lines = {line["id"]: line for line in http.logged()}
    assert sorted(line["status"] for line in lines.values()) == [200, 200, 401, 401, 499]
    mine = lines[whole.headers["X-Request-Id"]]
    usage = whole.json()["usage"]
    assert whole.json()["id"].endswith(mine["id"]) and (mine["key"], mine["model"]) == ("alice", "tiny")
    assert (mine["prompt_tokens"], mine["completion_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert mine["reasoning_tokens"] == usage["completion_tokens_details"]["reasoning_tokens"] > 0
    cut = lines[left.headers["X-Request-Id"]]
    assert cut["status"] == 499 and 0 < cut["completion_tokens"] < mine["completion_tokens"]
    assert lines[several.headers["X-Request-Id"]]["completion_tokens"] == 4
    rows = {row.id: row for row in booked(http)}
    assert sum(line["cost"] for line in lines.values()) == pytest.approx(sum(row.cost for row in rows.values()) / PICO)
    assert rows[mine["id"]].cost == round(mine["cost"] * PICO)
    assert rows[cut["id"]].completion == cut["completion_tokens"]
    assert "3+4" not in str(lines) and "3 plus 4" not in str(lines)


def test_what_the_whole_server_does_is_for_its_owner(serve, paced):
    http = serve(paced, keyless=False)
    for name, balance, status in (("me", None, 200), ("alice", 5.0, 403)):
        key = accounts.create(http.ledger, name, balance)
        assert http.get("/metrics", headers={"x-api-key": key}).status_code == status


def test_a_log_that_cannot_be_opened_says_so_before_anything_is_loaded(tmp_path):
    with pytest.raises(SlingshotError, match=r"access log .*none/log: No such file"):
        AccessLog.at(f"{tmp_path}/none/log")


def test_a_disk_that_is_full_stops_no_request(serve, paced, caplog):
    with running(create_app(Gateway([paced]), log=AccessLog.at("/dev/full"))) as url:
        assert httpx.post(url + CHAT, json=BODY).status_code == 200
    assert "access log takes no line: No space left" in caplog.text


def test_the_dashboard_asks_for_metrics_that_there_are_by_labels_that_they_have(serve, engine, tokenizer):
    dashboard = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [f"by (model) ({variable['query']})" for variable in dashboard["templating"]["list"]]
    http = serve(ServedModel("tiny", tokenizer, LocalBackend(engine)))
    http.post(CHAT, json=BODY)
    families = text_string_to_metric_families(http.get("/metrics").text)
    known = {sample.name: sample.labels.keys() for family in families for sample in family.samples}
    names = {name for text in asked for name in re.findall(r"slingshot_\w+", text)}
    assert len(names) > 10 and names <= known.keys()
    for text in asked:
        labels = {*re.findall(r"(\w+)=~", text), *re.findall(r"\w+", " ".join(re.findall(r"by \((.*?)\)", text)))}
        assert all(labels <= known[name] for name in re.findall(r"slingshot_\w+", text)), text


def test_the_status_tells_what_runs_and_what_today_had(serve, engine, tokenizer):
    http = serve(ServedModel("tiny", tokenizer, LocalBackend(engine), runs="float32, torch"))
    usage = http.post(CHAT, json=BODY | {"max_tokens": 20, "ignore_eos": True}).json()["usage"]
    status = http.get("/status.json").json()
    [tiny] = status["models"]
    assert status["state"] == "serving" and (tiny["name"], tiny["runs"], tiny["context"]) == (
        "tiny",
        "float32, torch",
        256,
    )
    assert (tiny["running"], tiny["waiting_tokens"], tiny["pages"]["used"]) == (0, 0, 0) and tiny["pages"]["all"] > 0
    assert tiny["generated_tokens"] == usage["completion_tokens"] == status["today"]["completion_tokens"]
    assert status["today"]["requests"] == 1 and status["today"]["prompt_tokens"] == usage["prompt_tokens"]
    assert status["today"]["dollars"] == pytest.approx(booked(http)[0].cost / PICO)


def test_the_status_page_asks_nobody_but_this_server(serve, paced):
    http = serve(paced)
    page = http.get("/status")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    names = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    names = [name for name in names if name != "data:,"]
    assert len(names) == 3
    for name in names:
        text = http.get(f"/{name}").raise_for_status().text
        assert "//" not in re.sub(r"(?m)^\s*//.*|\s//.*|http://www.w3.org/2000/svg", "", text)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_status_page_shows_it_live(serve, paced, scheme):
    playwright = pytest.importorskip("playwright.sync_api")
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("chromium is not installed")
    http = serve(paced)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(color_scheme=scheme)
        failures = []
        page.on("pageerror", lambda error: failures.append(error))
        page.on("console", lambda message: failures.append(message.text) if message.type == "error" else None)
        page.goto(f"{http.base_url}/status")
        page.wait_for_selector("text=serving")
        http.post(CHAT, json=BODY)
        generated = page.locator("dt:text-is('Generated') + dd", has_text=f"{len(paced.backend.ids)} since")
        generated.wait_for(timeout=60_000)
        page.locator("dt:text-is('Requests') + dd", has_text="1").wait_for(timeout=60_000)
        assert page.evaluate("document.documentElement.dataset.theme") == scheme and failures == []
        page.click("#theme")
        assert page.evaluate("document.documentElement.dataset.theme") != scheme
        browser.close()
