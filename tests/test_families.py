"""benchmarks/families.py: the cells are what the scripts say, and so are those of the page."""

from pathlib import Path

import families
import pytest
import torchvision
from torch import nn

import data


class Small(nn.Sequential):
    """It takes images of 64 pixels and more, and has no integer form."""

    def __init__(self, weights, num_classes):
        kernel = 33
        super().__init__(
            nn.Conv2d(3, 4, kernel, 8), nn.BatchNorm2d(4), nn.SiLU(), nn.AdaptiveAvgPool2d(1)
        )
        self.extend([nn.Flatten(), nn.Linear(4, num_classes)])


def test_a_row_is_what_the_scripts_say(monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.models, "get_model_builder", lambda name: Small)
    monkeypatch.setitem(data.DATASETS, "Random", None)
    monkeypatch.chdir(tmp_path)
    cells = families.row("resnet18")
    assert list(cells.values()) == [
        "`resnet18`", "64", "yes", "yes", "100.0 %, 100.0 %", "yes", "0", "calls silu"
    ]  # fmt: skip
    page = tmp_path / "page.md"
    page.write_text(f"before\n{families.BEGIN}{families.END}after\n", encoding="utf-8")
    monkeypatch.setattr(families, "PAGE", page)
    families.write_table({"vgg11": {"family": "`vgg11`"}})
    families.write_table({"resnet18": cells})
    lines = page.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "before" and lines[-1] == "after"
    assert [line.split("`")[1] for line in lines if line.startswith("| `")] == ["resnet18", "vgg11"]


def test_what_no_script_should_raise_is_said(capsys):
    why, _ = families.outcome(lambda words: 1 / 0, "")
    assert why == "TRACEBACK: ZeroDivisionError" and "1 / 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("x.py: error: w.pt: --export: f calls silu, which has no form (nor a)", "calls silu"),
        ("x.py: error: --export: p: pooling of 1 is not supported: no", "p: pooling of 1"),
        ("x.py: error: A cannot be differentiated: --other can", "A cannot be differentiated"),
        ("x.py: error: " + "word " * 30, "word " * 11 + "…"),
    ],
)
def test_a_reason_is_a_few_words(line, reason):
    assert families.shortened(line) == reason


def test_the_rows_of_the_page_are_families_and_no_tracebacks():
    page = Path(families.PAGE).read_text(encoding="utf-8")
    table = page.split(families.BEGIN)[1].split(families.END)[0]
    names = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    assert names == [name for name in families.FAMILIES if name in names] and len(names) > 10
    assert "TRACEBACK" not in table
