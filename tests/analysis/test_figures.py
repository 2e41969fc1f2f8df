import itertools

import pytest
import torch

import quant_utils as qu
from analysis import figures

LONG_NAMES = [f"ConvNet_CIFAR10_L2Grad_lambda0.05_seed{i}_" + "and_so_on_" * 8 for i in range(8)]


def make_rows(names=("a/net", "b"), bits=(4,), accuracy=0.9, drop=0.4):
    def row(checkpoint, scheme, bits, accuracy, std=None):
        return {
            "checkpoint": checkpoint,
            "scheme": scheme,
            "bits": bits,
            "accuracy": accuracy,
            "accuracy_std": std,
            "act_bits": 32,
        }

    rows = []
    for name in names:
        rows.append(row(name, "none", 32, accuracy))
        rows += [row(name, "uniform", b, accuracy - drop) for b in bits]
        rows += [row(name, "dorefa", b, accuracy - drop, 0.001) for b in bits]
    return rows


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """drawn(plot, …) draws with a function of analysis.figures; it returns the figure."""

    def draw(plot, *arguments):
        saved = []
        with monkeypatch.context() as patch:
            patch.setattr(figures, "save_png", lambda figure, path: saved.append(figure))
            plot(*arguments, tmp_path / "figure.png")
        (figure,) = saved
        figure.draw_without_rendering()
        return figure

    return draw


def test_it_is_a_png(tmp_path):
    figures.accuracy_plot(make_rows(), tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_plot_says_how_many_bits_the_activations_have():
    rows = make_rows()
    assert figures.bits_label(rows) == "bits of a weight, b"
    changed = [row | {"act_bits": 8} for row in rows]
    assert figures.bits_label(changed) == "bits of a weight, b (activations: 8)"
    same = [row | {"bits": b, "act_bits": b} for b in (4, 6) for row in rows]
    assert figures.bits_label(same) == "bits of weights and activations, b"


@pytest.mark.parametrize("drop", [0.0, 1e-4, 0.003, 0.01, 0.04, 0.3, 0.9])
@pytest.mark.parametrize("accuracy", [0.1, 0.4849, 0.9, 1.0])
@pytest.mark.sampled(5)
def test_labels_of_accuracy_differ_and_are_exact(drawn, accuracy, drop):
    axes = drawn(figures.accuracy_plot, make_rows(accuracy=accuracy, drop=drop)).axes[0]
    low, high = axes.get_ylim()
    assert high - low >= figures.MIN_ACCURACY_SPAN - 1e-9
    ticks = [tick for tick in axes.yaxis.get_major_ticks() if tick.label1.get_text()]
    assert len(ticks) >= 2
    values = [float(tick.label1.get_text().rstrip("%")) / 100 for tick in ticks]
    assert values == pytest.approx([tick.get_loc() for tick in ticks], abs=1e-9)
    assert len(set(values)) == len(values) and max(values) <= 1


def test_decimals_are_as_many_as_the_step_needs():
    steps = {0.1: 0, 0.02: 0, 0.01: 0, 0.025: 1, 0.005: 1, 0.0025: 2, 0.0001: 2}
    assert {step: figures.percent_decimals(step) for step in steps} == steps


@pytest.mark.parametrize("bits", [(4,), (2, 4, 8), tuple(range(2, 17))])
@pytest.mark.parametrize("n_files", [1, 3, 9])
@pytest.mark.sampled(3)
def test_ticks_of_bits_are_at_the_bit_widths(drawn, bits, n_files):
    names = [f"net{i}" for i in range(n_files)]
    for axes in drawn(figures.accuracy_plot, make_rows(names, bits)).axes:
        assert axes.get_xlim() == (bits[0] - 0.5, bits[-1] + 0.5)
        assert list(axes.get_xticks()) == list(bits)
        assert [text.get_text() for text in axes.get_xticklabels()] == [str(b) for b in bits]
        (low, high), points = axes.get_xlim(), [c[0].get_xdata() for c in axes.containers]
        assert len(points) == n_files and all(low < x < high for xs in points for x in xs)


@pytest.mark.parametrize("schemes", [("none", "uniform"), ("none", "uniform", "dorefa")])
@pytest.mark.parametrize("names", [["a"], LONG_NAMES, ["W" * 250, "a$b$", "x_{"]])
@pytest.mark.sampled(3)
def test_legend_is_inside_the_figure_and_panels_keep_their_size(drawn, names, schemes):
    rows = [row for row in make_rows(names) if row["scheme"] in schemes]
    figure = drawn(figures.accuracy_plot, rows)
    (legend,), frame = figure.legends, figure.bbox
    extent = legend.get_window_extent()
    assert extent.x0 >= frame.x0 and extent.x1 <= frame.x1
    assert extent.y0 >= frame.y0 and extent.y1 <= frame.y1
    texts = ["".join(text.get_text().split("\n")) for text in legend.get_texts()]
    assert [text.replace("\\$", "$") for text in texts] == [*names, "not quantized"]
    for axes in figure.axes:
        box = axes.get_window_extent()
        assert box.y0 > extent.y1 and box.height > 1.5 * figure.dpi


def test_what_a_figure_compares_looks_different():
    styles = [figures.line_style(i) for i in range(21)]
    for one, other in itertools.combinations(styles, 2):
        assert sum(one[key] != other[key] for key in one) >= 2 or one["color"] != other["color"]
    first, eighth = styles[0], styles[7]
    assert first["marker"] != eighth["marker"] and first["linestyle"] != eighth["linestyle"]


@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_plot_has_a_panel_a_layer_with_its_bits(drawn, per_channel):
    torch.manual_seed(0)
    weights = {"0": torch.randn(4, 3, 3, 3), "2": torch.randn(2, 36)}
    name = LONG_NAMES[0]
    quantizers, bits = {"uniform": qu.uniform, "pwlq": qu.pwlq}, {"0": 4, "2": 3}
    bits = {"uniform": bits, "pwlq": dict.fromkeys(weights, 4)}
    figure = drawn(figures.weights_plot, name, weights, quantizers, bits, per_channel)
    titles = [axes.get_title() for axes in figure.axes if axes.get_visible()]
    assert titles == (
        ["0[0]: 27 weights", "2[0]: 36 weights"]
        if per_channel
        else ["0: 108 weights", "2: 72 weights"]
    )
    labels = [t.get_text() for t in figure.legends[0].get_texts()]
    assert labels == ["uniform, 3/4 bits: 16 values", "pwlq, 4 bits: 31 values"]
    panels = [axes for axes in figure.axes if axes.get_visible()]
    ticks = [[len(grid.get_segments()) for grid in axes.collections] for axes in panels]
    assert ticks[0] == [16, 31] and ticks[1] in ([7, 31], [8, 31])
    title = figure.get_suptitle().replace("\n", "")
    assert title.startswith(f"{name}: weights")
    assert ("first output channel" in title) == per_channel


def test_names_wrap_after_a_separator_and_lose_nothing():
    assert figures.wrap("net_of_many_words/and_more", 10) == "net_of_\nmany_\nwords/and_\nmore"
    assert figures.wrap("W" * 25, 10) == "\n".join(["W" * 10, "W" * 10, "W" * 5])
    assert figures.wrap("short", 10) == "short" and figures.wrap("", 10) == ""
