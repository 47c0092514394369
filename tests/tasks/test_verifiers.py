"""Numbers read strictly and leniently."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slingshot.tasks.arithmetic import last_number, read_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("14", "14"), (" -2\n", "-2"), ("14.", "14"), ("14。", "14"), ("1,234", "1234"), ("-1,234,567.", "-1234567"),
        ("\u22125", "-5"), ("007", "7"), ("-0", "0"), ("14.0", "14"), ("0.50", "0.5"), ("-0.0", "0"),
    ],
)  # fmt: skip
def test_a_text_that_is_a_number(text, number):
    assert read_number(text) == number


@pytest.mark.parametrize(
    "text",
    [
        "", "14 15", "14, 15", "12,34", "1,2345", "It is 14", "14 is it", "14..", "3+4", "--4", "+4", "1e3", "0x1f",
        "１４", "½", ".5", "5-", "9" * 65, "14\n15",
    ],
)  # fmt: skip
def test_a_text_that_is_more_or_less_than_a_number(text):
    assert read_number(text) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7-2 is 5", "5"), ("is -4", "-4"), ("10-3", "3"), ("(2)-3", "3"), ("= \u22124", "-4"), ("a14b", "14"),
        ("the sum is 1,234.", "1234"), ("1,2", "2"), ("12,3456", "3456"), ("x=14.0!", "14"), ("14の", "14"),
        ("first 3 then 007", "7"), ("", None), ("none", None), ("-", None), ("１４", None), ("9" * 65, None),
    ],
)  # fmt: skip
def test_the_last_number_in_a_text(text, number):
    assert last_number(text) == number


@settings(derandomize=True, deadline=None)
@given(st.integers(-(10**15), 10**15), st.text(alphabet=st.characters(exclude_characters="0123456789-,.)\u2212\uff0d")))
def test_integers_are_read_back_in_any_surroundings(value, words):
    for spelling in (str(value), f"{value:,}"):
        assert read_number(f" {spelling}. ") == str(value)
        assert last_number(f"{words}{spelling}{words}") == str(value)


@settings(derandomize=True, deadline=None)
@given(st.text())
def test_what_is_read_strictly_is_read_leniently(text):
    strict = read_number(text)
    assert strict is None or strict == last_number(text)
