"""Format, language consistency, rewards and advantages, by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slingshot.rollout.reward import (
    RewardWeights,
    assign_advantages,
    assign_rewards,
    format_reward,
    has_signal,
    language_consistency,
)
from slingshot.rollout.trajectory import Trajectory, Turn
from slingshot.tasks.loader import load_task
from slingshot.tasks.mixture import Item
from slingshot.tasks.task import Problem
from slingshot.text.reasoning import Parsed
from slingshot.training.parallel import Parallel


@pytest.mark.parametrize(
    ("closed", "answer", "finished", "reward"),
    [
        (True, "14", True, 1.0), (False, "14", True, 0.0), (True, "14", False, 0.0), (True, " \n", True, 0.0),
        (True, "<think>14", True, 0.0), (True, "14</think>14", True, 0.0),
    ],
)  # fmt: skip
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


CHINESE = "三加四等于七，七减二等于五"  # not a kana among its characters
OTHERS = "три плюс четыре|삼 더하기 사는 칠|ثلاثة زائد أربعة|तीन जमा चार|สามบวกสี่|שלוש ועוד|τρία συν τέσσερα|სამს პლუს"


@pytest.mark.parametrize("text", [*OTHERS.split("|"), CHINESE])
def test_another_script_is_neither_english_nor_japanese(text):
    assert language_consistency(text, "en") == language_consistency(text, "ja") == 0.0


def test_mixed_text_counts_every_script_of_the_two_languages_there_are():
    assert language_consistency("three плюс four 더하기 七つ", "en") == pytest.approx(2 / 5)
    assert language_consistency("三は три", "ja") == 0.5
    with pytest.raises(ValueError, match="'fr' is not supported; en and ja are"):
        language_consistency("bonjour", "fr")


@pytest.mark.parametrize("text", ["", "3+4=7", "3x4 = n", "。、!?", "3\u00d74\u00f72", "π ≈ 3, 𝑥 ∈ ℝ"])
def test_a_text_without_words_is_consistent(text):
    assert language_consistency(text, "en") == language_consistency(text, "ja") == 1.0


@given(st.text())
def test_no_word_counts_for_two_languages(text):
    english, japanese = language_consistency(text, "en"), language_consistency(text, "ja")
    assert 0 <= english + japanese <= 1 + 1e-9 or english == japanese == 1.0


def scored(accuracy, form, language, key="k", reason="stop"):
    trajectory = Trajectory(Item(load_task("arithmetic"), Problem("p", key), key), [3, 4], [])
    trajectory.turns = [Turn(1, 2, Parsed(None, "", False), reason)]
    trajectory.scores = {"accuracy": accuracy, "format": form, "language": language}
    return trajectory


def test_rewards_and_advantages():
    """Rewards 1.3, 0.2, 0.2, 0.1 (weights 1, 0.2, 0.1): mean 0.45. The last was read leniently, but cut off."""
    scores = [(1.0, 1.0, 1.0), (0.0, 1.0, 0.0), (0.0, 0.5, 1.0)]
    group = [*(scored(*each) for each in scores), scored(1.0, 0.0, 1.0, reason="length")]
    weights = RewardWeights(accuracy=1.0, format=0.2, language=0.1)
    assign_rewards([group], weights, coin="", max_tokens=9)
    assign_advantages([group], "none", Parallel())
    assert [r.reward for r in group] == pytest.approx([1.3, 0.2, 0.2, 0.1])
    assert [r.advantage for r in group] == pytest.approx([0.85, -0.25, -0.25, -0.35])
    assign_advantages([group], "group", Parallel())
    std = math.sqrt((0.85**2 + 2 * 0.25**2 + 0.35**2) / 4)
    assert [r.advantage for r in group] == pytest.approx([0.85 / std, -0.25 / std, -0.25 / std, -0.35 / std], rel=1e-5)
    assert has_signal(group) and has_signal(group[2:]) and not has_signal(group[:1])
    group[0].verified = False
    assert not has_signal(group[:3])  # the others earned alike


def test_advantages_over_the_batchs_std():
    """Rewards 1, 0 and 3, 1: differences .5, -.5, 1, -1, whose root mean square is sqrt(.625)."""
    groups = [[scored(0.0, 0.0, 0.0) for _ in range(2)] for _ in range(2)]
    for trajectory, reward in zip((each for group in groups for each in group), (1.0, 0.0, 3.0, 1.0), strict=True):
        trajectory.reward = reward
    assign_advantages(groups, "batch", Parallel())
    found = [each.advantage for group in groups for each in group]
    assert found == pytest.approx([value / math.sqrt(0.625) for value in (0.5, -0.5, 1.0, -1.0)])
    for trajectory in groups[0] + groups[1]:
        trajectory.reward = 1.0
    assign_advantages(groups, "batch", Parallel())
    assert [each.advantage for group in groups for each in group] == [0.0] * 4


def test_overlong_responses_pay_for_the_last_of_their_room():
    """Of 20 tokens the last 8 are the buffer: nothing at 12, half at 16, all at 20 or when cut off (DAPO, eq. 13)."""

    def pays(length, reason="stop"):
        trajectory = scored(1.0, 0.0, 0.0, reason=reason)
        trajectory.turns.append(Turn(10, 10 + length, Parsed(None, "", False), reason))
        weights = RewardWeights(accuracy=0.0, format=0.0, overlong_buffer=8)
        return weights.reward(trajectory, max_tokens=20)

    assert [pays(length) for length in (5, 12, 16, 20)] == [0.0, 0.0, -0.5, -1.0]
    assert pays(20, "length") == pays(15, "length") == -1.0


def test_short_right_responses_earn_more_than_long_ones():
    """2501.12599, 2.3.3: 10, 20, 30 and 50 tokens earn 0.5, 0.25, 0 and -0.5; wrong or cut off, 0 at most."""
    group = [scored(*each) for each in [(1.0, 0, 0), (0.0, 0, 0), (1.0, 0, 0), (1.0, 0, 0)]]
    for trajectory, length in zip(group, (10, 20, 30, 50), strict=True):
        trajectory.mask = [0, *[1] * length]
    weights = RewardWeights(format=0.0, length=0.4)
    assign_rewards([group], weights, coin="", max_tokens=99)
    assert [each.reward for each in group] == pytest.approx([1.2, 0.0, 1.0, 0.8])
    group[0].turns[-1] = Turn(1, 2, Parsed(None, "", False), "length")
    assign_rewards([group, group[:1] * 2], weights, coin="", max_tokens=99)
    assert [each.reward for each in group] == pytest.approx([0.0, 0.0, 1.0, 0.8])


def test_the_control_rewards_a_coin_and_nothing_else():
    def tossed(score, coin):
        groups = [[scored(score, score, score, key=str(i)) for _ in range(4)] for i in range(100)]
        assign_rewards(groups, RewardWeights(random=True), coin, max_tokens=9)
        return [r.reward for group in groups for r in group]

    assert (rewards := tossed(1.0, "0/3")) == tossed(0.0, "0/3") != tossed(0.0, "0/4")
    assert set(rewards) == {0.0, 1.0} and 0.42 < sum(rewards) / 400 < 0.58
