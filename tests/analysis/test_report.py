import json
import math

import pytest

from analysis import quantization_plan, report
from engine.quantization.grids import activation_grid


def make_rows():
    def row(checkpoint, scheme, bits, accuracies):
        trials = [report.Trial(accuracy, 1.0, 1.0) for accuracy in accuracies]
        return report.make_row(checkpoint, scheme, bits, trials, 0.9)

    return [
        row(name, *rest)
        for name in ("a/net", "b")
        for rest in (("none", 32, [0.9]), ("uniform", 4, [0.5]), ("dorefa", 4, [0.38, 0.4, 0.42]))
    ]


def test_a_row_has_the_means_over_trials():
    trials = [report.Trial(0.5, 2.0, 3.0), report.Trial(0.7, 4.0, 5.0)]
    row = report.make_row("a", "dorefa", 4, trials, 0.9, levels=16, act_bits=8)
    assert tuple(row) == report.MEASURED
    assert math.isclose(row["accuracy"], 0.6) and row["loss"] == 3 and row["squared_error"] == 4
    assert row["accuracy_change"] == row["accuracy"] - 0.9
    assert math.isclose(row["accuracy_std"], math.sqrt(0.02))
    assert (row["trials"], row["levels"], row["act_bits"]) == (2, 16, 8)


def test_table_is_aligned():
    lines = report.table(make_rows(), report.PRINTED_COLUMNS).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 1 + 2 + 6
    assert "40.00% ± 2.00" in lines[4] and "-50.00 pp" in lines[4]


def test_figures_of_two_networks_are_two_files():
    stems = report.weights_figures(["a/b", "a_b", "c"])
    assert stems == {"a/b": "weights_a_b", "a_b": "weights_a_b_1", "c": "weights_c"}


@pytest.mark.parametrize(
    ("n_bits", "low", "high", "asymmetric", "text"),
    [
        (2, -1, 0.5, True, "-1 … 0.5"),
        (2, -1, 0.5, False, "±1"),
        (2, 0, 0.5, False, "0 … 0.5"),
        (2, 0, 0.5, True, "0 … 0.5"),
    ],
)
def test_a_plan_shows_the_ends_of_a_grid(n_bits, low, high, asymmetric, text):
    grid = activation_grid(n_bits, low, high, asymmetric)
    assert quantization_plan._grid_range(grid, asymmetric) == text


def test_results_json_is_json_also_with_a_loss_that_is_not_a_number(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    rows = [row | {"loss": math.nan, "squared_error": math.inf} for row in make_rows()]
    report.save_tables(rows, [], {}, tmp_path)
    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    saved = json.loads(text, parse_constant=refuse)["rows"]
    assert saved == [row | {"loss": None, "squared_error": None} for row in rows]
