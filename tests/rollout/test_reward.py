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
        ("café naïve", 1.0),
    ],
)
def test_language_is_the_share_of_words(text, english):
    assert language_consistency(text, "en") == pytest.approx(english)
    assert language_consistency(text, "ja") == pytest.approx(1 - english)


@pytest.mark.parametrize("text", ["", "3+4=7", "3x4 = n", "。、!?", "3\u00d74\u00f72"])
def test_a_text_without_words_is_consistent(text):
    assert language_consistency(text, "en") == language_consistency(text, "ja") == 1.0


def test_unknown_language():
    with pytest.raises(ValueError, match="'fr' is not supported; en and ja are"):
        language_consistency("bonjour", "fr")


@settings(derandomize=True, deadline=None)
@given(st.text())
def test_shares_add_up(text):
    english, japanese = language_consistency(text, "en"), language_consistency(text, "ja")
    assert english + japanese == pytest.approx(1.0) or english == japanese == 1.0
