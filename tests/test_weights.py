"""The networks of weights/ and their records; slow: that they give the accuracies quoted."""

import csv
import json
from pathlib import Path

import pytest

import quant_inference
from engine.system.io import load_weights
from models import ConvNet

ROOT = Path(__file__).parent.parent
QUOTED = ROOT / "results" / "weights" / "results.csv"
NAMES = ("control", "kurtosisnorm", "kurtosisnorm_folded", "l2grad")
SAME = 0.003  # of accuracy: other machines round otherwise


def quoted():
    """Return the accuracy of each network, scheme and bit-width that results/weights records."""
    with open(QUOTED, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {(r["checkpoint"], r["scheme"], int(r["bits"])): float(r["accuracy"]) for r in rows}


@pytest.mark.parametrize("name", NAMES)
def test_each_network_loads_and_has_its_record_and_command(name):
    net = ConvNet()
    load_weights(net, ROOT / "weights" / f"{name}.pt")
    assert all(p.isfinite().all() for p in net.parameters())
    record = json.loads((ROOT / "weights" / f"{name}.json").read_text(encoding="utf-8"))
    assert record["final_accuracy"] == pytest.approx(quoted()[name, "none", 32], abs=SAME)
    script = (ROOT / "weights" / "run.sh").read_text(encoding="utf-8").replace("\\\n", " ")
    line = next(line for line in script.splitlines() if line.startswith(f"branch {name}"))
    assert set(line.split()[2:]) <= set(record["command"])


def test_the_table_is_that_of_the_record():
    text = (ROOT / "weights" / "README.md").read_text(encoding="utf-8")
    for name in NAMES:
        cells = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        accuracies = [float(cell) for cell in cells.strip("| ").split("|")[2:]]
        keys = [("none", 32), *(("uniform", bits) for bits in (8, 4, 3, 2))]
        assert accuracies == [round(100 * quoted()[name, *key], 2) for key in keys]


@pytest.mark.slow
def test_they_give_the_accuracies_quoted(tmp_path):
    files = [str(ROOT / "weights" / f"{name}.pt") for name in NAMES]
    flags = ["--bits", "2", "3", "4", "8", "--schemes", "uniform", "pwlq", "--no_plots"]
    with pytest.raises(SystemExit) as caught:
        quant_inference.main([*files, *flags, "--output", str(tmp_path)])
    assert caught.value.code == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    for row in rows:
        expected = quoted()[row["checkpoint"], row["scheme"], row["bits"]]
        assert row["accuracy"] == pytest.approx(expected, abs=SAME), row
