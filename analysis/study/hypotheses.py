"""Tests of hypotheses about two variants, paired by seed, and how several are corrected."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import scipy.stats

from analysis.study.results import mean_intervals

MIN_SEEDS = 2  # for a paired test
ROUNDING = 1e-9  # of accuracies, which are fractions of at most millions of images


@dataclass(frozen=True)
class Hypothesis:
    """Variant `first` is better than `second`; or, with a margin, as good.

    Attributes:
        margin: as good is a mean difference of less than so much, either way; None: better.
    """

    first: str
    second: str
    margin: float | None = None

    @property
    def words(self) -> str:
        """The hypothesis as one reads it."""
        if self.margin is None:
            return f"{self.first} beats {self.second}"
        return f"{self.first} is as good as {self.second}, within {100 * self.margin:g} pp"


@dataclass(frozen=True)
class Outcome:
    """What the seeds say about a hypothesis.

    Attributes:
        mean, half: of the difference first − second, with its 95 % interval mean ± half.
        p: of the test, uncorrected.
    """

    hypothesis: Hypothesis
    n: int
    mean: float
    half: float
    p: float


def is_constant(differences: Sequence[float]) -> bool:
    """Tell whether the differences are equal but for rounding: a t-test then divides by nothing."""
    return max(differences) - min(differences) < ROUNDING


def difference_p(differences: Sequence[float]) -> float:
    """Return the p value of a t-test that the mean is 0."""
    return scipy.stats.ttest_1samp(differences, 0).pvalue


def equivalence_p(differences: Sequence[float], margin: float) -> float:
    """Return the p value of two one-sided t-tests that the mean lies within ±margin.

    Source: Schuirmann, 1987. The larger of both counts: each rejects a mean beyond one margin.
    """
    above = scipy.stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
    below = scipy.stats.ttest_1samp(differences, margin, alternative="less").pvalue
    return max(above, below)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for being several. Source: Holm, 1979.

    The i-th smallest of m is multiplied by m − i, i from 0; none is smaller than one before it.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for i, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - i) * p_values[index]))
        corrected[index] = largest
    return corrected


def examine(hypothesis: Hypothesis, accuracies: pd.Series) -> Outcome | None:
    """Return what the seeds say; None where fewer than MIN_SEEDS have both variants.

    `accuracies`, of one setting, are by variant and whatever names a pair, such as the seed. Where
    all differences are equal, p is 1: two networks at chance are as good as each other, and that
    says nothing.
    """
    present = accuracies.index.unique("variant")
    if hypothesis.first not in present or hypothesis.second not in present:
        return None
    differences = (accuracies.loc[hypothesis.first] - accuracies.loc[hypothesis.second]).dropna()
    n = len(differences)
    if n < MIN_SEEDS:
        return None
    values, margin = differences.to_list(), hypothesis.margin
    if is_constant(values):
        p = 1.0
    else:
        p = difference_p(values) if margin is None else equivalence_p(values, margin)
    [interval] = mean_intervals(differences.to_frame()).itertuples()
    return Outcome(hypothesis, n, interval.mean, (interval.high - interval.low) / 2, p)


def examine_all(hypotheses: Sequence[Hypothesis], accuracies: pd.Series) -> Mapping[Outcome, float]:
    """Return the outcome of each hypothesis that can be tested, with its p value after `holm`."""
    outcomes = [examine(each, accuracies) for each in hypotheses]
    tested = [each for each in outcomes if each]
    return dict(zip(tested, holm([each.p for each in tested]), strict=True))
