import pytest
import torch

import combined_protocol
import train
from combined_protocol import make_parser, parse_phase, published_protocol
from regularizers import LPGrad, VarianceNorm


def test_the_default_is_the_published_protocol():
    args = make_parser().parse_args([])
    assert (args.n_epochs, args.scheduler, args.gamma, args.milestones) == (
        110,
        "multistep",
        0.15,
        "fixed",
    )
    nothing, variance, both = [parse_phase(text) for text in published_protocol(args)]
    assert (nothing.start, nothing.regularizer) == (0, None)
    assert (variance.start, variance.regularizer.name, variance.regularizer.lmbda) == (
        70,
        "VarianceNorm",
        1.25,
    )
    assert (both.start, both.regularizer.name) == (90, "VarianceNorm+L2Grad")
    assert both.regularizer.inputs == ("weights", "w_grads")
    weights, g = [torch.randn(3, 4)], [torch.randn(3, 4)]
    expected = VarianceNorm(1.25)(weights) + LPGrad(0.05, 2, only_weight_grads=True)(g)
    torch.testing.assert_close(both.regularizer(weights, g), expected)


def test_flags_change_the_protocol():
    args = make_parser().parse_args(
        [
            "--first_variance_epoch",
            "3",
            "--first_gradient_epoch",
            "5",
            "--variance_lmbda",
            "2",
            "--gradient_lmbda",
            "0.5",
            "--P",
            "1",
            "--activation_gradients",
        ]
    )
    assert published_protocol(args) == [
        "0:none",
        "3:VarianceNorm=2.0",
        "5:VarianceNorm=2.0+L1Grad=0.5",
    ]
    args.first_variance_epoch = 0
    assert (
        published_protocol(args)[0] == "0:VarianceNorm=2.0" and len(published_protocol(args)) == 2
    )


def test_any_list_of_phases(monkeypatch):
    started = []
    monkeypatch.setattr(
        train, "validate_and_run", lambda parser, args, phases, *_: started.extend(phases)
    )
    combined_protocol.main(
        [
            "--phases",
            "0:L1Grad=0.01",
            "7:none",
            "9:InverseStdDevNorm=1e+0+L3Grad@weights=2+L1Grad=3",
        ]
    )
    assert [p.start for p in started] == [0, 7, 9]
    assert started[1].regularizer is None
    assert started[2].regularizer.name == "InverseStdDevNorm+L3Grad+L1Grad"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, "is not EPOCH:none or EPOCH:NAME") for text in ("", "0", "0:", ":none")),
        ("0:=1", "unknown regularizer ''"),
        ("0:L1Grad=", "is not NAME=λ"),
        ("0:L1Grad=1+", "is not NAME=λ"),
        ("0:none=1", "none stands alone"),
        ("0:L1Grad@biases=1", "@biases is not @weights"),
        ("0:VarianceNorm@weights=1", "VarianceNorm@weights: only L<P>Grad"),
    ],
)
def test_what_is_no_phase(text, message):
    with pytest.raises(ValueError, match=message):
        parse_phase(text)
