"""The choice of λ: from accuracies on held-out training images, made once per variant and saved."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from analysis.report import UNQUANTIZED
from analysis.study.records import StudyRecords

TUNING_SEED = 0
MAX_ACCURACY_DROP = 0.01  # of full-precision accuracy, against the control's


class HoldoutAccuracy(NamedTuple):
    """What a network gets right of the held-out images, as a fraction."""

    full: float  # in full precision
    quantized: float  # as the grid says: uniform, 4 bits of weights, unless it has another

    @classmethod
    def load(cls, records: StudyRecords, path: Path) -> "HoldoutAccuracy":
        """Read the results.json of a quantization; raises FileError."""
        with records.open(path) as results:
            rows = {row["scheme"] == UNQUANTIZED: row["accuracy"] for row in results["rows"]}
            if len(results["rows"]) != 2:
                raise ValueError("λ is chosen by one scheme at one number of bits")
            return cls(rows[True], rows[False])


@dataclass(frozen=True)
class Choice:
    """How the λ of a variant was chosen."""

    control: HoldoutAccuracy
    candidates: dict[float, HoldoutAccuracy | None]  # by λ; None: the training failed
    lmbda: float  # the one taken

    @classmethod
    def load(cls, records: StudyRecords, path: Path) -> "Choice":
        """Read one that was saved as JSON; raises FileError."""
        with records.open(path) as saved:
            candidates = {
                float(lmbda): accuracies and HoldoutAccuracy(*map(float, accuracies))
                for lmbda, accuracies in saved["candidates"].items()
            }
            if not candidates[saved["lmbda"]]:
                raise ValueError("the λ that was taken has no accuracies")
            control = HoldoutAccuracy(*map(float, saved["control"]))
            return cls(control, candidates, float(saved["lmbda"]))


def select_lambda(candidates: Mapping[float, HoldoutAccuracy], control: float) -> float:
    """Return the λ to use, out of those tried.

    That is the one with the best quantized accuracy among those whose full-precision accuracy is
    less than MAX_ACCURACY_DROP below the control's; where there is none, the one with the best
    full-precision accuracy. Between equal accuracies the smallest λ counts.
    """
    threshold = control - MAX_ACCURACY_DROP + 1e-9  # exactly a point is too much, in floats, too
    allowed = {lmbda: a for lmbda, a in candidates.items() if a[0] > threshold}
    column = 1 if allowed else 0
    return max(allowed or candidates, key=lambda lmbda: (candidates[lmbda][column], -lmbda))
