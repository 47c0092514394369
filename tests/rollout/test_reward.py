"""Format and language consistency, by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slingshot.rollout.reward import format_reward, language_consistency


@pytest.mark.parametrize(
    ("closed", "answer", "finished", "reward"),
    [
        (True, "14", True, 1.0),
        (False, "14", True, 0.0),
        (True, "14", False, 0.0),
        (True, " \n", True, 0.0),
        (True, "<think>14", True, 0.0),
        (True, "14</think>14", True, 0.0),
    ],
)
def test_format(closed, answer, finished, reward):
    assert format_reward(closed, answer, finished) == reward


@pytest.mark.parametrize(
    ("text", "english"),
    [
        ("3 plus 4 is 7, 7 minus 2 is 5", 1.0),  # 4 English words
        ("3足す4は7、7引く2は5", 0.0),  # 4 Japanese words
        ("3 plus 4は7", 0.5),
        ("3 plus 4 is 7、いや8", 2 / 3),
        ("カタカナ ひらがな 漢字 word", 0.25),
        ("café nai\u0308ve", 1.0),
        ("ｐｌｕｓ ﾌﾟﾗｽ", 0.5),  # full and half width
    ],
)
def test_language_is_the_share_of_words(text, english):
    assert language_consistency(text, "en") == pytest.approx(english)
    assert language_consistency(text, "ja") == pytest.approx(1 - english)


@pytest.mark.parametrize(
    "text",
    [
        "три плюс четыре будет семь",
        "삼 더하기 사는 칠",
        "ثلاثة زائد أربعة",
        "तीन जमा चार",
        "สามบวกสี่",
        "שלוש ועוד ארבע",
        "τρία συν τέσσερα",
        "სამს პლუს ოთხი",
        "三加四等于七，七减二等于五",  # Chinese: not a kana among its characters
    ],
)
def test_another_script_is_neither_english_nor_japanese(text):
    assert language_consistency(text, "en") == language_consistency(text, "ja") == 0.0


def test_mixed_text_counts_every_script():
    assert language_consistency("three плюс four 더하기 七つ", "en") == pytest.approx(2 / 5)
    assert language_consistency("三は три", "ja") == 0.5


@pytest.mark.parametrize("text", ["", "3+4=7", "3x4 = n", "。、!?", "3\u00d74\u00f72", "π ≈ 3, 𝑥 ∈ ℝ"])
def test_a_text_without_words_is_consistent(text):
    assert language_consistency(text, "en") == language_consistency(text, "ja") == 1.0


def test_unknown_language():
    with pytest.raises(ValueError, match="'fr' is not supported; en and ja are"):
        language_consistency("bonjour", "fr")


@settings(derandomize=True, deadline=None)
@given(st.text())
def test_no_word_counts_for_two_languages(text):
    english, japanese = language_consistency(text, "en"), language_consistency(text, "ja")
    assert 0 <= english + japanese <= 1 + 1e-9 or english == japanese == 1.0
