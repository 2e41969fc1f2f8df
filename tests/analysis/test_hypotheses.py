"""Tests paired by seed: against scipy, against an interval, and against examples worked by hand."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from analysis.study.hypotheses import Hypothesis, equivalence_p, examine, examine_all, holm


def accuracies(**variants):
    """Accuracies by (variant, seed)."""
    values = {(v, seed): a for v, seeds in variants.items() for seed, a in seeds.items()}
    return pd.Series(values).rename_axis(["variant", "seed"])


def test_equivalence_is_that_of_the_interval_of_90_percent():
    generator = np.random.default_rng(0)
    for _ in range(50):
        differences = generator.normal(0.004, 0.004, 5)
        t = scipy.stats.ttest_1samp(differences, 0)
        low, high = t.confidence_interval(0.90)
        assert (equivalence_p(differences, 0.01) < 0.05) == (-0.01 < low and high < 0.01)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("difference", [0.0, 0.25, -0.3, 0.00001])
def test_equal_differences_show_nothing(difference):
    second = {0: 0.5, 1: 0.6, 2: 0.7}  # which differ by rounding
    first = {seed: accuracy + difference for seed, accuracy in second.items()}
    for margin in (None, 0.01, 0.3):
        outcome = examine(Hypothesis("a", "b", margin), accuracies(a=first, b=second))
        assert outcome.p == 1 and outcome.mean == pytest.approx(difference)


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.5, 0.9], [1.0, 1.0]),
        ([0.02], [0.02]),
        ([], []),
    ],
)
def test_holm(p_values, corrected):
    assert holm(p_values) == pytest.approx(corrected)


def test_differences_are_paired_and_seeds_that_one_lacks_left_out():
    a, b = {0: 0.5, 1: 0.6, 2: 0.9, 4: 0.7}, {0: 0.45, 1: 0.58, 2: 0.84, 3: 0.1}
    outcome = examine(Hypothesis("a", "b"), accuracies(a=a, b=b))
    expected = scipy.stats.ttest_rel([0.5, 0.6, 0.9], [0.45, 0.58, 0.84])
    interval = expected.confidence_interval(0.95)
    assert outcome.n == 3 and outcome.p == pytest.approx(expected.pvalue)
    assert outcome.mean - outcome.half == pytest.approx(interval.low)
    assert examine(Hypothesis("a", "c"), accuracies(a=a)) is None
    assert examine(Hypothesis("a", "b"), accuracies(a={0: 0.5}, b=b)) is None


def test_seeds_of_several_networks_are_pairs_of_their_own():
    one = accuracies(a={0: 0.5, 1: 0.6}, b={0: 0.45, 1: 0.58})
    other = accuracies(a={0: 0.9, 2: 0.8}, b={0: 0.84, 1: 0.1})
    both = pd.concat({"one": one, "other": other}, names=["network"]).reorder_levels([1, 2, 0])
    outcome = examine(Hypothesis("a", "b"), both)
    expected = scipy.stats.ttest_rel([0.5, 0.6, 0.9], [0.45, 0.58, 0.84])
    assert outcome.n == 3 and outcome.p == pytest.approx(expected.pvalue)


def test_hypotheses_without_seeds_are_left_out_and_the_others_corrected():
    same = accuracies(a={0: 0.5, 1: 0.6}, b={0: 0.5, 1: 0.6})
    hypotheses = [Hypothesis("a", "b"), Hypothesis("a", "b", 0.01), Hypothesis("a", "c")]
    outcomes = examine_all(hypotheses, same)
    assert [(o.hypothesis.margin, p) for o, p in outcomes.items()] == [(None, 1.0), (0.01, 1.0)]
