import math
from typing import Annotated

import pytest
import reference
import torch

from engine.system.errors import PenaltyError
from quant_utils import uniform
from regularizers import (
    REGULARIZERS,
    CombinedReg,
    Dampening,
    InverseVarianceNorm,
    KurtosisNorm,
    LPGrad,
    RangeNorm,
    Regularizer,
    Sharpness,
    StepL1Grad,
    StepL2Grad,
    StepNoise,
    TargetBits,
    VarianceNorm,
    accepted_options,
    make_regularizer,
    regularizer_options,
)


def tensors(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 3, 3, 3), (5, 4, 3, 3), (10, 5)]
    return [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]


@pytest.mark.parametrize("P", [1, 2, 3, 10])
@pytest.mark.parametrize("only_weight_grads", [False, True])
def test_lp_grad_is_its_definition(P, only_weight_grads):
    w_grads, a_grads = tensors(1), tensors(2)
    expected = reference.lp_grad(w_grads, [] if only_weight_grads else a_grads, 0.3, P)
    torch.testing.assert_close(LPGrad(0.3, P, only_weight_grads)(w_grads, a_grads), expected)


def test_lp_grad_closed_form():
    w_grads, a_grads = [torch.tensor([3.0, -4.0])], [torch.full((4, 9), -2.0)]
    # ‖(3, −4)‖₁ = 7, ‖A‖₁ / 4 = 18; ‖(3, −4)‖₂ = 5, ‖A‖₂ / √4 = 6
    assert LPGrad(2.0, 1)(w_grads, a_grads).item() == pytest.approx(2 * (7 + 18))
    assert LPGrad(2.0, 2)(w_grads, a_grads).item() == pytest.approx(2 * (5 + 6))


def test_the_infinite_order_is_the_largest_gradient():
    w_grads = [torch.tensor([3.0, -4.0], requires_grad=True)]
    a_grads = [torch.full((4, 9), -2.0)]
    norm = make_regularizer("linfgrad", 2.0)(w_grads, a_grads)
    norm.backward()
    assert norm.item() == pytest.approx(2 * (4 + 2))
    assert torch.equal(w_grads[0].grad, torch.tensor([0.0, -2.0]))
    ours, nearly = LPGrad(0.3, math.inf), reference.lp_grad(tensors(1), tensors(2), 0.3, 500)
    torch.testing.assert_close(ours(tensors(1), tensors(2)), nearly, rtol=0.02, atol=0)


@pytest.mark.parametrize("P", [0, -1, 1.5, -math.inf, math.nan])
def test_orders_that_are_no_norm_are_refused(P):
    with pytest.raises(ValueError, match="P must be"):
        LPGrad(1.0, P)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6])
def test_high_orders_neither_underflow_nor_overflow_in_float32(scale):
    g = torch.tensor([1.0, -2.0, 0.5]) * scale
    g.requires_grad_()
    norm = LPGrad(1.0, 10)([g], [])
    norm.backward()
    expected = g.detach().double().requires_grad_()
    reference.lp_grad([expected], [], 1.0, 10).backward()
    torch.testing.assert_close(g.grad.double(), expected.grad, rtol=1e-5, atol=1e-12)
    assert norm.item() == pytest.approx((expected.detach() ** 10).sum().item() ** 0.1, rel=1e-6)


@pytest.mark.parametrize("P", [1, 2, 3, 10, math.inf])
def test_zero_gradients_cost_nothing_and_move_nothing(P):
    g = torch.zeros(5, requires_grad=True)
    norm = LPGrad(1.0, P)([g], [g])
    norm.backward()
    assert norm.item() == 0 and torch.equal(g.grad, torch.zeros(5))


def test_norms_of_bfloat16_gradients_are_taken_in_float32():
    g = torch.ones(10_000, dtype=torch.bfloat16, requires_grad=True)
    norm = LPGrad(1.0, 1)([g], [])
    norm.backward()
    assert norm.dtype == torch.float32 and norm.item() == 10_000 and g.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("std_dev", [False, True])
def test_variance_norms_are_their_definitions(std_dev):
    weights = tensors()
    torch.testing.assert_close(
        VarianceNorm(0.7, std_dev)(weights), reference.variance_norm(weights, 0.7, std_dev)
    )
    torch.testing.assert_close(
        InverseVarianceNorm(0.7, std_dev)(weights),
        reference.inverse_variance_norm(weights, 0.7, std_dev),
    )


def test_variance_norms_closed_form():
    weights = [torch.tensor([1.0, 3.0]), torch.tensor([0.0, 4.0])]  # variances 1 and 4
    assert VarianceNorm(2.0)(weights).item() == pytest.approx(2 * 5)
    assert VarianceNorm(2.0, std_dev=True)(weights).item() == pytest.approx(2 * math.sqrt(5))
    assert InverseVarianceNorm(2.0)(weights).item() == pytest.approx(2 * 0.625)
    assert InverseVarianceNorm(2.0, True)(weights).item() == pytest.approx(2 * math.sqrt(0.625))


def test_kurtosis_norm():
    two_values = torch.tensor([-5.0, 5.0, 5.0, -5.0]) + 3  # ±σ about the mean: kurtosis 1
    spike = torch.tensor([0.0] * 9 + [10.0])  # mean 1; (9·1 + 9⁴) / 10 over ((9 + 81) / 10)²: 8.11…
    expected = ((1 - 1.8) ** 2 + (657 / 81 - 1.8) ** 2) / 2
    assert KurtosisNorm(3.0)([two_values, spike]).item() == pytest.approx(3 * expected)
    assert KurtosisNorm(1.0, target=1.0)([two_values]).item() == pytest.approx(0)
    torch.testing.assert_close(
        KurtosisNorm(0.7)(tensors()), reference.kurtosis_norm(tensors(), 0.7)
    )
    evenly = torch.linspace(-2, 3, 100_001, dtype=torch.float64)
    assert KurtosisNorm(1.0)([evenly]).item() == pytest.approx(0, abs=1e-8)


def test_range_norm():
    weights = [torch.tensor([1.0, -3.0], requires_grad=True), torch.tensor([0.5, 2.0])]
    norm = RangeNorm(2.0)(weights)
    norm.backward()
    assert norm.item() == 2 * (3 + 2)
    assert torch.equal(weights[0].grad, torch.tensor([0.0, -2.0]))
    folded = RangeNorm(2.0, fold_bn=True)
    assert folded.inputs == ("folded_weights",) and folded(weights).item() == norm.item()
    assert KurtosisNorm(2.0, fold_bn=True).inputs == ("folded_weights",)


def test_step_norms_closed_form():
    weights = [torch.tensor([1.5, -7.5]), torch.tensor([3.0])]  # at 4 bits, steps 1 and 0.4
    w_grads = [torch.tensor([3.0, -4.0]), torch.tensor([10.0])]
    assert StepL1Grad(2.0)(weights, w_grads).item() == pytest.approx(2 * (7 / 2 + 0.2 * 10))
    expected = math.sqrt((1 * 25 + 0.16 * 100) / 12)
    assert StepL2Grad(2.0)(weights, w_grads).item() == pytest.approx(2 * expected)
    coarser = StepL1Grad(2.0, target_bits=2)(weights, w_grads).item()
    assert coarser == pytest.approx(5 * 2 * (7 / 2 + 0.2 * 10))  # 15 steps became 3


@pytest.mark.parametrize("n_bits", [2, 5])
def test_step_norms_are_their_definitions(n_bits):
    weights, w_grads = tensors(0), tensors(1)
    for made, oracle in (
        (StepL1Grad, reference.step_l1_grad),
        (StepL2Grad, reference.step_l2_grad),
    ):
        expected = oracle(weights, w_grads, 0.3, n_bits)
        torch.testing.assert_close(made(0.3, n_bits)(weights, w_grads), expected)


@pytest.mark.parametrize("make", [StepL1Grad, StepL2Grad])
def test_step_norms_are_blind_to_the_scale_of_weights(make):
    weights, w_grads = tensors(0), tensors(1)
    scaled = make(1.0)([3 * w for w in weights], [g / 3 for g in w_grads])
    torch.testing.assert_close(scaled, make(1.0)(weights, w_grads))


@pytest.mark.parametrize("make", [StepL1Grad, StepL2Grad])
def test_a_step_that_is_held_has_the_value_but_not_the_derivative(make):
    weights, w_grads = [w.requires_grad_() for w in tensors(0)], tensors(1)
    held = make(1.0, detach_step=True)(weights, w_grads)
    torch.testing.assert_close(held, make(1.0)(weights, w_grads))
    assert not held.requires_grad and make(1.0)(weights, w_grads).requires_grad


@pytest.mark.parametrize("make", [StepL1Grad, StepL2Grad])
def test_step_norms_of_zero_gradients_move_nothing(make):
    weights, g = [torch.ones(4, requires_grad=True)], [torch.zeros(4, requires_grad=True)]
    make(1.0)(weights, g).backward()
    assert torch.equal(g[0].grad, torch.zeros(4)) and torch.equal(weights[0].grad, torch.zeros(4))


@pytest.mark.parametrize("n_bits", [2, 4])
def test_dampening_is_its_definition(n_bits):
    weights = [w.requires_grad_() for w in tensors()]
    penalty = Dampening(0.3, n_bits)(weights)
    expected = reference.dampening([w.detach() for w in weights], 0.3, n_bits)
    assert penalty.item() == pytest.approx(expected)
    penalty.backward()
    for w in weights:
        w_q, largest = uniform(w, n_bits), w.abs().max()
        clipped = w > largest * (2 ** (n_bits - 1) - 1) / (2 ** (n_bits - 1) - 0.5)
        expected = torch.where(clipped, 0, 0.6 * (w - w_q)).detach()
        torch.testing.assert_close(w.grad, expected)


def test_dampening_of_zero_weights_is_zero():
    w = torch.zeros(3, requires_grad=True)
    Dampening(1.0)([w]).backward()
    assert torch.equal(w.grad, torch.zeros(3))


def test_step_noise_is_uniform_in_half_a_step():
    weights, seen = [torch.linspace(-7.5, 3, 100_000), torch.full((1000,), 1.5)], []

    def loss_change(deltas):
        seen.extend(deltas)
        return torch.tensor(-0.25)

    assert StepNoise(2.0)(weights, loss_change).item() == -0.5
    assert [d.shape for d in seen] == [w.shape for w in weights]
    for delta, step in zip(seen, (1.0, 0.2), strict=True):
        assert 0.49 * step < delta.max() <= step / 2 and -0.49 * step > delta.min() >= -step / 2
        assert delta.std().item() == pytest.approx(step / math.sqrt(12), rel=0.1)
    StepNoise(2.0)(weights, loss_change)
    assert not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("bits", [1, 17, 2.5])
def test_bits_that_no_step_has_are_refused(bits):
    with pytest.raises(ValueError, match="target_bits"):
        make_regularizer("StepL2Grad", 1.0, target_bits=bits)


def test_combined_is_the_sum_however_nested():
    weights, w_grads, a_grads = tensors(0), tensors(1), tensors(2)
    terms = VarianceNorm(1.25), LPGrad(0.05, 2, only_weight_grads=True), LPGrad(0.1, 1)
    both = CombinedReg(CombinedReg(terms[0], terms[1]), terms[2])
    expected = (
        reference.variance_norm(weights, 1.25, False)
        + reference.lp_grad(w_grads, [], 0.05, 2)
        + reference.lp_grad(w_grads, a_grads, 0.1, 1)
    )
    torch.testing.assert_close(both(weights, w_grads, a_grads), expected)
    torch.testing.assert_close(both(w_grads=w_grads, a_grads=a_grads, weights=weights), expected)
    assert both.name == "VarianceNorm+L2Grad+L1Grad"


def test_combined_takes_lists_that_no_term_needs():
    weights, w_grads, a_grads = tensors(0), tensors(1), tensors(2)
    both = CombinedReg(VarianceNorm(1.0), RangeNorm(2.0))
    assert both(weights, w_grads, a_grads) == both(weights)


def test_combined_with_noise_is_the_sum():
    weights, w_grads = tensors(0), tensors(1)
    both = CombinedReg(StepNoise(0.5), LPGrad(0.05, 2, only_weight_grads=True))
    inputs_by_name = {
        "weights": weights,
        "w_grads": w_grads,
        "loss_change": lambda deltas: torch.tensor(3.0),
    }
    expected = reference.lp_grad(w_grads, [], 0.05, 2) + 1.5
    torch.testing.assert_close(both(*(inputs_by_name[name] for name in both.inputs)), expected)


@pytest.mark.parametrize(
    ("terms", "inputs"),
    [
        ((VarianceNorm(1), InverseVarianceNorm(1)), ("weights",)),
        ((VarianceNorm(1), LPGrad(1, 2, True)), ("weights", "w_grads")),
        ((LPGrad(1, 1), LPGrad(1, 2, True)), ("weights", "w_grads", "a_grads")),
        ((StepNoise(1), VarianceNorm(1)), ("weights", "loss_change")),
        ((RangeNorm(1, fold_bn=True), StepNoise(1)), ("weights", "loss_change", "folded_weights")),
        ((StepNoise(1), StepL1Grad(1)), ("weights", "w_grads", "loss_change")),
        ((RangeNorm(1, fold_bn=True), KurtosisNorm(1, fold_bn=True)), ("folded_weights",)),
    ],
)
def test_combined_asks_for_no_more_than_its_terms_need(terms, inputs):
    assert CombinedReg(*terms).inputs == inputs


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("l1grad", "L1Grad"),
        ("L10GRAD", "L10Grad"),
        ("variancenorm", "VarianceNorm"),
        ("StdDevNorm", "StdDevNorm"),
        ("inversevarianceNORM", "InverseVarianceNorm"),
        ("InverseStdDevNorm", "InverseStdDevNorm"),
        ("LINFGRAD", "LinfGrad"),
        ("kurtosisnorm", "KurtosisNorm"),
        ("rangeNorm", "RangeNorm"),
        ("stepl1grad", "StepL1Grad"),
        ("StepL2GRAD", "StepL2Grad"),
        ("stepnoise", "StepNoise"),
        ("dampening", "Dampening"),
        ("SHARPNESS", "Sharpness"),
        ("adaptivesharpness", "AdaptiveSharpness"),
    ],
)
def test_names_in_any_case(name, made):
    regularizer = make_regularizer(name, 0.5)
    assert (regularizer.name, regularizer.lmbda) == (made, 0.5)


def test_none_is_no_regularizer():
    assert make_regularizer("None", 1.0) is None


@pytest.mark.parametrize("name", ["L0Grad", "LGrad", "L-1Grad", "L1.5Grad", "L2Gradient", ""])
def test_unknown_names_are_refused_by_name(name):
    with pytest.raises(ValueError, match=name or "choose L<P>Grad"):
        make_regularizer(name, 1.0)


@pytest.mark.parametrize("lmbda", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["L2Grad", "VarianceNorm", "StepNoise"])
def test_bad_lambda_is_refused(name, lmbda):
    with pytest.raises(ValueError, match="lmbda"):
        make_regularizer(name, lmbda)


def test_options_of_other_regularizers_are_refused():
    with pytest.raises(ValueError, match="only_weight_grads"):
        make_regularizer("VarianceNorm", 1.0, only_weight_grads=True)


def test_options_go_to_those_that_take_them():
    options = {"only_weight_grads": True, "target_bits": 3}
    assert accepted_options("l2grad", options) == {"only_weight_grads": True}
    assert accepted_options("STEPNOISE", options) == {"target_bits": 3}
    assert accepted_options("VarianceNorm", options) == accepted_options("None", options) == {}
    assert make_regularizer("StepNoise", 1.0, target_bits=3).target_bits == 3


def test_arguments_have_the_defaults_that_their_flags_state():
    assert Dampening(1.0).target_bits == StepNoise(1.0).target_bits == 4
    assert KurtosisNorm(1.0).inputs == RangeNorm(1.0).inputs == ("weights",)
    assert (Sharpness(1.0).rho, Sharpness(1.0).adaptive) == (0.05, False)


def test_a_constructor_alone_gives_the_name_of_what_it_makes():
    made = [VarianceNorm(1, True), InverseVarianceNorm(1, True), Sharpness(1), VarianceNorm(1)]
    assert [reg.name for reg in (*made, Sharpness(1, adaptive=True))] == [
        "StdDevNorm",
        "InverseStdDevNorm",
        "Sharpness",
        "VarianceNorm",
        "AdaptiveSharpness",
    ]


def test_an_order_that_is_a_whole_number_is_one_in_the_name():
    assert LPGrad(1, 2.0).name == LPGrad(1, 2).name == "L2Grad"
    assert LPGrad(1, math.inf).name == "LinfGrad"


@pytest.mark.parametrize("name", ["L2.5Grad", "l-1grad"])
def test_a_number_that_no_name_has_is_refused_with_an_example(name):
    with pytest.raises(ValueError, match=f"{name}: <P> in L<P>Grad must be a whole number"):
        make_regularizer(name, 1.0)


def test_an_unknown_name_is_refused_with_all_choices():
    with pytest.raises(ValueError, match=f"choose {', '.join(REGULARIZERS)}"):
        make_regularizer("Variance", 1.0)


def test_an_annotated_argument_is_an_option(registry):
    names = ("StepL1Grad", "StepL2Grad", "StepNoise")
    with_bits = (*names, "Dampening")
    found = regularizer_options()
    assert set(found) == {"fold_bn", "target_bits", "detach_step", "rho"}
    assert found["rho"].defaults == (0.05, 0.5)
    assert (found["target_bits"].kind, set(found["target_bits"].defaults)) == (int, {4})
    assert (found["detach_step"].kind, found["detach_step"].regularizer_names) == (bool, names)
    assert {name for name in found if not found[name].tracked} == {"fold_bn", "detach_step"}

    class MyNorm(Regularizer):
        def __init__(self, lmbda, target_bits: TargetBits = 8):
            super().__init__(lmbda)

        def forward(self, weights):
            return self.lmbda * weights[0].sum()

    assert regularizer_options()["target_bits"].regularizer_names == (*with_bits, "MyNorm")


def test_a_new_regularizer_is_a_class(registry):
    class MyNorm(Regularizer):
        def forward(self, weights):
            return self.lmbda * sum(w.norm(4) for w in weights)

    made = make_regularizer("mynorm", 2.0)
    assert made([torch.ones(16)]).item() == pytest.approx(4.0)
    assert (made.name, made.inputs, MyNorm(1.0).name) == ("MyNorm", ("weights",), "MyNorm")


def test_name_and_inputs_can_be_given_by_the_class(registry):
    class MyNorm(Regularizer):
        name = "Mine"
        inputs = ("folded_weights", "w_grads")

        def forward(self, w, g):
            return w[0] * g[0]

    made = make_regularizer("MINE", 2.0)
    assert (made.name, made.inputs) == ("Mine", ("folded_weights", "w_grads"))
    assert "MyNorm" not in registry

    class Third(MyNorm):
        def __init__(self, lmbda):
            super().__init__(lmbda / 3)

    third = make_regularizer("third", 3.0)
    assert (third.name, third.inputs, third.lmbda) == ("Third", made.inputs, 1.0)


def test_what_has_no_forward_or_asks_not_to_is_no_choice(registry):
    before = dict(registry)

    class Family(Regularizer):
        pass

    class Helper(Regularizer, register=False):
        def forward(self, weights):
            return 0

    assert registry == before and Helper(1.0).inputs == ("weights",)
    with pytest.raises(ValueError, match="unknown regularizer 'Family'"):
        make_regularizer("Family", 1.0)


def test_an_alias_is_logged_under_its_own_name(registry):
    registry["Flat<target>"] = KurtosisNorm
    made = make_regularizer("flat2", 1.0)
    assert (made.name, made.target) == ("Flat2", 2)


@pytest.mark.parametrize("inputs", [("gradients",), ("weights", "gradients")])
def test_an_input_that_there_is_not_is_refused(inputs):
    class MyNorm(Regularizer, register=False):
        def __init__(self):
            super().__init__(1.0, inputs=inputs)

    with pytest.raises(ValueError, match="'gradients': .* weights, w_grads, a_grads, loss_change"):
        MyNorm()


def test_the_choices_are_in_the_order_in_which_they_were_always_listed():
    assert ", ".join(REGULARIZERS) == (
        "L<P>Grad, LinfGrad, VarianceNorm, StdDevNorm, InverseVarianceNorm, InverseStdDevNorm, "
        "KurtosisNorm, RangeNorm, StepL1Grad, StepL2Grad, StepNoise, Dampening, Sharpness, "
        "AdaptiveSharpness"
    )


def define(class_name, forward=lambda self, weights: 0, **attributes):
    return type(class_name, (Regularizer,), {"forward": forward, **attributes})


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("Rangenorm", "RangeNorm"),
        ("LINFGRAD", "LinfGrad"),
        ("L5Grad", "L<P>Grad"),
        ("l10grad", "L<P>Grad"),
        ("NONE", "none"),
        ("Loss", "loss"),
        ("accuracy", "accuracy"),
    ],
)
def test_a_name_that_means_something_else_is_refused_whatever_the_case(name, owner, registry):
    before = dict(registry)
    with pytest.raises(PenaltyError, match=f"called {name}: {owner} means something else"):
        define(name)
    with pytest.raises(PenaltyError, match=f"called {name}: "):
        define("MyNorm", name=name)
    assert registry == before


def test_a_class_may_be_defined_again_but_not_by_somebody_else(registry):
    define("MyNorm")
    again = define("MyNorm")
    assert registry["MyNorm"] is again
    with pytest.raises(PenaltyError, match="MyNorm means something else"):
        define("MyNorm", __module__="elsewhere")


def test_an_option_may_be_a_text_but_of_no_type_that_no_flag_has(registry):
    class MyNorm(Regularizer):
        def __init__(self, lmbda, kind: Annotated[str, "of the norm"] = "max"):
            super().__init__(lmbda)

        def forward(self, weights):
            return 0

    assert regularizer_options()["kind"].kind is str
    with pytest.raises(PenaltyError, match="Odd: the option orders is of type list: choose"):

        class Odd(MyNorm):
            def __init__(self, lmbda, orders: Annotated[list, "of the norms"] = ()):
                super().__init__(lmbda)


def test_inputs_are_given_by_position(registry):
    def forward(self, *, weights):
        return weights[0].sum()

    define("MyNorm", forward)
    with pytest.raises(ValueError, match="MyNorm: `forward` is given weights, by position: too"):
        make_regularizer("MyNorm", 1.0)


def test_parameters_that_nothing_would_train_are_refused(registry):
    class MyNorm(Regularizer):
        def __init__(self, lmbda, is_trained=True):
            super().__init__(lmbda)
            self.scale = torch.nn.Parameter(torch.ones(()), requires_grad=is_trained)

        def forward(self, weights):
            return self.scale * weights[0].sum()

    with pytest.raises(ValueError, match="MyNorm has parameters .* nothing trains: scale"):
        make_regularizer("MyNorm", 1.0)
    assert make_regularizer("MyNorm", 1.0, is_trained=False).scale == 1  # a constant
