import pytest

from slingshot.base.errors import SlingshotError
from slingshot.serving import accounts
from slingshot.serving.ledger import LOCAL, Ledger, Usage
from slingshot.serving.prices import PriceList
from slingshot.serving.usage import UsageReport

PRICES = PriceList.parse({"models": {"*": {"output": 2.0}}, "serving": {"device_hour": 3.6}})


@pytest.fixture
def ledger(tmp_path):
    """1,000,000 tokens of alice's and half of it of nobody's, in a server that ran for 1,000 seconds."""
    now = [1e9]
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.sqlite", PRICES, clock=lambda: now[0])
    alice = accounts.authenticate(ledger, accounts.create(ledger, "alice"), keyless=False)
    for number, (account, model, size) in enumerate(
        [(alice, "tiny", 600_000), (alice, "big", 400_000), (LOCAL, "tiny", 500_000)]
    ):
        ledger.reserve(account, model, 10, 1_000_000, f"r{number}").settle(Usage(10, 5, size, 7))
    now[0] += 1000
    ledger.close()
    return ledger


def test_usage_adds_up_by_whatever_it_is_grouped(ledger):
    report = UsageReport.of(ledger, ["key"])
    assert [(row.group, row.requests, row.completion) for row in report.rows] == [
        (("alice",), 2, 1_000_000), (("local",), 1, 500_000),
    ]  # fmt: skip
    for by in (["key", "day", "model"], ["model"], ["day"]):
        rows = UsageReport.of(ledger, by).rows
        assert sum(row.cost for row in rows) == report.total.cost == 3 * 10**12
    assert {row.group for row in UsageReport.of(ledger, ["day", "model"]).rows} == {
        ("2001-09-09", "tiny"),
        ("2001-09-09", "big"),
    }


def test_the_margin_is_what_was_charged_less_the_machine_s_hours(ledger):
    assert UsageReport.of(ledger, ["key"]).margin.endswith("$1.00; margin $2.00, 66.7% of what was charged")


def test_the_page_tells_the_same_and_escapes_names(ledger, tmp_path):
    page = UsageReport.of(ledger, ["key", "model"]).html()
    assert "alice" in page and "$1.20" in page and "$3.00" in page
    ledger.reserve(LOCAL, "<script>", 1, 1, "x").settle(Usage(1, 0, 1, 0))
    assert "<script>" not in UsageReport.of(ledger, ["model"]).html()


def test_an_unknown_group_names_those_there_are(ledger):
    with pytest.raises(SlingshotError, match="there are: key, day, model"):
        UsageReport.of(ledger, ["colour"])


def test_a_loss_is_told_as_one(ledger):
    ledger.prices = PriceList.parse({"models": {"*": {"output": 2.0}}, "serving": {"device_hour": 36.0}})
    assert UsageReport.of(ledger).margin.endswith("$10.00; margin -$7.00")
