"""The fit of reward against compute: numbers that are there are found, others are not claimed."""

import numpy as np
import pytest

from slingshot.recipe.scaling import FEWEST, SigmoidFit, fit_sigmoid

TRUE = SigmoidFit(0.3, 1.1, 25.0, 2.5, 0.0, 0.0, 0.0)
SECONDS = [2.0 * step for step in range(1, 61)]


def noisy(values, size, seed=0):
    return np.asarray(values) + size * np.random.default_rng(seed).normal(size=len(values))


def test_a_curve_without_noise_gives_its_numbers():
    """0.3 to 1.1, half way at 25: 0.7 there."""
    assert TRUE.at([25.0, 1e-9, 1e9]) == pytest.approx([0.7, 0.3, 1.1])
    fit = fit_sigmoid(SECONDS, TRUE.at(SECONDS))
    found = fit.start, fit.ceiling, fit.middle, fit.steepness
    assert found == pytest.approx((0.3, 1.1, 25.0, 2.5), rel=1e-6)


@pytest.mark.slow
def test_errors_are_those_of_many_draws():
    """Of 40 draws the spread of each number is its standard error as the fits say it, within a quarter."""
    fits = [fit_sigmoid(SECONDS, noisy(TRUE.at(SECONDS), 0.05, seed)) for seed in range(40)]
    assert all(fits)
    for name, told in (("ceiling", "ceiling_se"), ("steepness", "steepness_se")):
        spread = np.std([getattr(fit, name) for fit in fits])
        assert spread == pytest.approx(np.mean([getattr(fit, told) for fit in fits]), rel=0.25)
    middles = np.log([fit.middle for fit in fits])
    assert np.std(middles) == pytest.approx(np.mean([fit.middle_se for fit in fits]), rel=0.25)
    assert np.mean(middles) == pytest.approx(np.log(25), abs=0.02)


@pytest.mark.parametrize(
    "rewards",
    [
        noisy([0.5] * 60, 0.02),
        noisy([0.2 + 0.005 * second for second in SECONDS], 0.02),
        noisy(TRUE.at([second / 20 for second in SECONDS]), 0.01),
        noisy(TRUE.at(SECONDS), 0.4),
    ],
    ids=["flat", "no end in sight", "before its middle", "noise"],
)
def test_what_does_not_say_where_it_ends_has_no_fit(rewards):
    assert fit_sigmoid(SECONDS, rewards.tolist()) is None


def test_too_few_points_have_no_fit():
    assert fit_sigmoid(SECONDS[: FEWEST - 1], TRUE.at(SECONDS[: FEWEST - 1])) is None
    assert fit_sigmoid([], []) is None
