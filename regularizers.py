"""The regularizers: pure functions of weights and gradients, each with its λ inside.

A regularizer lists in `inputs` what its `forward` takes. To add one, write a class and a line in
`REGULARIZERS`; the training loop, --help and the logs find it there:

    class MyNorm(Regularizer):
        \"\"\"λ · Σ_l ‖W_l‖₄ (say where it comes from).\"\"\"

        name, inputs = "MyNorm", ("weights",)

        def forward(self, weights):
            return self.lmbda * sum(w.norm(4) for w in weights)

Inputs (l counts layers, B is the batch size):
    weights         W_l, the weight of every Conv2d and Linear in module order
    w_grads         ∂L/∂W_l of the batch-mean loss L, same shapes
    a_grads         ∂L/∂A_l of the activations that the network returns, each (B, …)
    loss_change     the function Δ ↦ L(W + Δ) − L(W) of a list of Δ_l, on the same batch
    folded_weights  Ŵ_l = W_l·γ_l/√(σ_l² + ε), with the batch norm that follows folded in, as
                    quantization with --fold_bn sees it; W_l where none follows. σ_l² is the
                    running variance, a constant
    detached_w_grads
                    w_grads, held constant when the penalty is differentiated

All of them are those of the whole batch, also in a run of several processes. Whatever is computed
from them is differentiated through them.

An argument of a constructor that is annotated as an option, such as TargetBits, is also a flag of
the scripts (--target_bits): of type bool, int or float, and with a name that no flag has yet.
`name` is the key in REGULARIZERS. What `forward` draws from torch's random stream is fresh in each
batch and the same when the run is repeated.
"""

import inspect
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.quantization.bit_widths import check_bits
from engine.step.norms import lp_norm, lp_norms, per_image_lp_norms

Tensors = Sequence[Tensor]
LossChange = Callable[[Tensors], Tensor]

# What a regularizer can take. Gradients cost a second backward pass, unless they are detached, each
# call of loss_change one more plain step.
INPUTS = (
    "weights", "w_grads", "a_grads", "loss_change", "folded_weights", "detached_w_grads",
)  # fmt: skip


class Regularizer(nn.Module):
    """A penalty R, λ included.

    Attributes:
        name: as it is logged.
        inputs: which of INPUTS `forward` takes, in the order of its arguments.
    """

    name: str
    inputs: tuple[str, ...]

    def __init__(self, lmbda: float) -> None:
        """Keep λ; ValueError unless it is finite and not negative."""
        super().__init__()
        if not (math.isfinite(lmbda) and lmbda >= 0):
            raise ValueError(f"lmbda is {lmbda}: it must be finite and at least 0")
        self.lmbda = lmbda

    @property
    def label(self) -> str:
        """Name and λ, as a plan shows them: "L2Grad λ=0.01"."""
        return f"{self.name} λ={self.lmbda:g}"


# Marks an option that --track ignores: what is tracked means the same whatever is penalized.
PENALTY_ONLY = "of the penalty only"

MAX_P = 1_000_000  # beyond it the norm is max|g| to the last bit


class LPGrad(Regularizer):
    """λ · ( Σ_l ‖∂L/∂W_l‖_p + Σ_l B^(−1/p) · ‖∂L/∂A_l‖_p ).

    With only_weight_grads the second sum is left out.
    P = 1 is the gradient ℓ1 regularizer of Alizadeh et al., arXiv 2002.07520; P = 2 is our own;
    P = ∞ is max|g|, with B^(−1/P) = 1.
    """

    def __init__(self, lmbda: float, P: float, only_weight_grads: bool = False) -> None:
        """Take the order P of the norm; ValueError unless it is an integer ≥ 1 or math.inf."""
        super().__init__(lmbda)
        if P != math.inf and not (1 <= P <= MAX_P and P == int(P)):
            raise ValueError(f"L{P}Grad: P must be an integer from 1 to {MAX_P:,}, or infinite")
        self.P = P if P == math.inf else int(P)
        self.only_weight_grads = only_weight_grads
        self.name = f"L{self.P}Grad"
        self.inputs = ("w_grads",) if only_weight_grads else ("w_grads", "a_grads")

    @property
    def label(self) -> str:
        """Name and λ; "@weights" where the gradients of activations are left out."""
        return f"{self.name}{'@weights' if self.only_weight_grads else ''} λ={self.lmbda:g}"

    def forward(self, w_grads: Tensors, a_grads: Tensors = ()) -> Tensor:
        """Return the penalty (scalar) of w_grads and, unless only_weight_grads, of a_grads."""
        total = sum(lp_norms(w_grads, self.P))
        if not self.only_weight_grads:
            total = total + sum(per_image_lp_norms(a_grads, self.P))
        return self.lmbda * total


class VarianceNorm(Regularizer):
    """λ · Σ_l Var(W_l), or λ · √(Σ_l Var(W_l)) with std_dev; Var(W) = mean((W − mean W)²)."""

    inputs = ("weights",)

    def __init__(self, lmbda: float, std_dev: bool = False) -> None:
        """std_dev takes the square root of the sum."""
        super().__init__(lmbda)
        self.std_dev = std_dev
        self.name = "StdDevNorm" if std_dev else "VarianceNorm"

    def forward(self, weights: Tensors) -> Tensor:
        """Return the penalty (scalar) of the weights."""
        total = sum(w.var(correction=0) for w in weights)
        return self.lmbda * (total.sqrt() if self.std_dev else total)


class InverseVarianceNorm(Regularizer):
    """λ · mean_l(1 / Var(W_l)), or λ · √(mean_l(1 / Var(W_l))) with std_dev."""

    inputs = ("weights",)

    def __init__(self, lmbda: float, std_dev: bool = False) -> None:
        """std_dev takes the square root of the mean."""
        super().__init__(lmbda)
        self.std_dev = std_dev
        self.name = "InverseStdDevNorm" if std_dev else "InverseVarianceNorm"

    def forward(self, weights: Tensors) -> Tensor:
        """Return the penalty (scalar) of the weights."""
        mean = sum(1 / w.var(correction=0) for w in weights) / len(weights)
        return self.lmbda * (mean.sqrt() if self.std_dev else mean)


FoldBN = Annotated[bool, "penalize the weights with batch norms folded in", PENALTY_ONLY]


class ShapeRegularizer(Regularizer):
    """Of how weights are distributed: of W_l, or with fold_bn of Ŵ_l, the folded ones (ours)."""

    def __init__(self, lmbda: float, fold_bn: FoldBN = False) -> None:
        """fold_bn: of the weights that a network without batch norms would have."""
        super().__init__(lmbda)
        self.inputs = ("folded_weights",) if fold_bn else ("weights",)


class KurtosisNorm(ShapeRegularizer):
    """λ · mean_l (Kurt(W_l) − target)², Kurt(W) = mean(((W − mean W) / √Var(W))⁴).

    KURE of Shkolnik et al. 2020, arXiv 2002.07686: weights that are distributed uniformly, whose
    kurtosis is 1.8 (Gaussian: 3), lose least when the quantization step is not quite the best one.
    """

    name = "KurtosisNorm"

    def __init__(self, lmbda: float, target: float = 1.8, fold_bn: FoldBN = False) -> None:
        """Take the kurtosis to aim at."""
        super().__init__(lmbda, fold_bn)
        self.target = target

    def forward(self, weights: Tensors) -> Tensor:
        """Return the penalty (scalar) of the weights, or of the folded ones."""
        total = sum((_kurtosis(w) - self.target) ** 2 for w in weights)
        return self.lmbda * total / len(weights)


def _kurtosis(w: Tensor) -> Tensor:
    """The fourth moment of w about its mean over the square of the second; 0 of equal values.

    Folded weights are all zero where γ is, as it is initialized in some residual networks.
    """
    squares = (w - w.mean()).square()
    variance = squares.mean()
    return squares.square().mean() / torch.where(variance > 0, variance, 1).square()


class RangeNorm(ShapeRegularizer):
    """λ · Σ_l max|W_l|.

    The L∞ loss of Range Regularization, arXiv 2303.08253. The margin and soft-min-max
    losses of that paper train a parameter of their own in each layer, which a penalty that is a
    function of weights and gradients does not have: they are left out.
    """

    name = "RangeNorm"

    def forward(self, weights: Tensors) -> Tensor:
        """Return the penalty (scalar) of the weights, or of the folded ones."""
        return self.lmbda * sum(w.abs().amax() for w in weights)


# --- the loss change that quantization itself makes ------------------------------------------

TargetBits = Annotated[int, "bits that the weights are to survive, 2 to 16"]
DetachStep = Annotated[
    bool, "differentiate with the quantization steps held constant", PENALTY_ONLY
]


class StepRegularizer(Regularizer):
    """What these have in common: s_l = 2·max|W_l| / (2^b − 1), the step of b-bit quantization.

    Rounding moves each weight by up to s_l/2. W_l → c·W_l before a batch norm changes neither the
    function nor any of these penalties, because ∂L/∂W_l → (∂L/∂W_l)/c.
    """

    def __init__(
        self, lmbda: float, target_bits: TargetBits = 4, detach_step: DetachStep = False
    ) -> None:
        """Take b; detach_step: no derivative through s_l. ValueError unless b is in 2…16."""
        super().__init__(lmbda)
        try:
            check_bits(target_bits)
        except ValueError as error:
            raise ValueError(f"target_bits: {error}") from None
        self.target_bits, self.detach_step = int(target_bits), detach_step

    def steps(self, weights: Tensors) -> list[Tensor]:
        """Return s_l of each layer (scalars)."""
        steps = [w.abs().amax() / (2 ** (self.target_bits - 1) - 0.5) for w in weights]
        return [s.detach() for s in steps] if self.detach_step else steps


class StepL1Grad(StepRegularizer):
    """λ · Σ_l (s_l/2) · ‖∂L/∂W_l‖₁: the most that rounding can change the loss, to first order.

    The bound of gradient ℓ1 regularization (arXiv 2002.07520) with the size of the
    perturbation of each layer left in.
    """

    name, inputs = "StepL1Grad", ("weights", "w_grads")

    def forward(self, weights: Tensors, w_grads: Tensors) -> Tensor:
        """Return the penalty (scalar) of the weights and their gradients."""
        terms = zip(self.steps(weights), lp_norms(w_grads, 1), strict=True)
        return self.lmbda * sum(s / 2 * norm for s, norm in terms)


class StepL2Grad(StepRegularizer):
    """λ · √( Σ_l (s_l²/12) · ‖∂L/∂W_l‖₂² ): what rounding typically changes the loss by.

    The root mean square of the first-order change when every weight moves independently and
    uniformly in ±s_l/2, whose variance is s_l²/12. Our own.
    """

    name, inputs = "StepL2Grad", ("weights", "w_grads")

    def forward(self, weights: Tensors, w_grads: Tensors) -> Tensor:
        """Return the penalty (scalar) of the weights and their gradients."""
        terms = zip(self.steps(weights), lp_norms(w_grads, 2), strict=True)
        norms = torch.stack([s * norm for s, norm in terms])
        return self.lmbda * torch.linalg.vector_norm(norms) / math.sqrt(12)


class StepNoise(StepRegularizer):
    """λ · ( L(W + Δ) − L(W) ), each element of Δ_l uniform in ±s_l/2, fresh in each batch.

    What rounding changes the loss by, to all orders: noise of quantization's size in training, as
    in DiffQ (Défossez et al., arXiv 2104.09987), here a penalty beside the clean loss.
    """

    name, inputs = "StepNoise", ("weights", "loss_change")

    def forward(self, weights: Tensors, loss_change: LossChange) -> Tensor:
        """Return one sample of the penalty (scalar); it can be negative."""
        steps = zip(self.steps(weights), weights, strict=True)
        return self.lmbda * loss_change([s * (torch.rand_like(w) - 0.5) for s, w in steps])


class Dampening(StepRegularizer):
    """λ · Σ_l ‖Q(W_l) − clip(W_l)‖₂²: draws weights to the middle of their quantization bin.

    Q rounds to the nearest point of the grid of step s_l and clips, both held constant; weights
    beyond the last point of the grid are not moved. Nagel et al., arXiv 2203.11086, which trains
    with quantized weights and steps that are learned: here the weights stay in full precision.
    """

    name, inputs = "Dampening", ("weights",)

    def __init__(self, lmbda: float, target_bits: TargetBits = 4) -> None:
        """Take the bits of the grid."""
        super().__init__(lmbda, target_bits, detach_step=True)

    def forward(self, weights: Tensors) -> Tensor:
        """Return the penalty (scalar) of the weights."""
        n, terms = 2 ** (self.target_bits - 1), []
        for s, w in zip(self.steps(weights), weights, strict=True):
            x_int = (w.detach() / s.clamp(min=torch.finfo(s.dtype).tiny)).round().clamp(-n, n - 1)
            terms.append((s * x_int - w.clamp(-n * s, (n - 1) * s)).square().sum())
        return self.lmbda * sum(terms)


# --- the loss nearby -------------------------------------------------------------------------

Rho = Annotated[float, "radius ρ of the step to where the loss is taken, above 0"]


class Sharpness(Regularizer):
    """λ · ( L(W + ε) − L(W) ), ε = ρ·g/‖g‖₂ held constant; g is ∂L/∂W over all layers l.

    SAM (Foret et al., arXiv 2010.01412) as a penalty: λ = 1 gives its gradient, that at W + ε. Only
    the weights of convolutions and linear layers are moved. With `adaptive` it is ASAM's step,
    ε = ρ·T²g/‖Tg‖₂ with T = |W| + 0.01 (Kwon et al., arXiv 2102.11600).
    """

    inputs = ("weights", "detached_w_grads", "loss_change")

    def __init__(self, lmbda: float, rho: Rho = 0.05, adaptive: bool = False) -> None:
        """Take ρ; ValueError unless it is finite and above 0."""
        super().__init__(lmbda)
        if not (math.isfinite(rho) and rho > 0):
            raise ValueError(f"rho is {rho}: it must be finite and above 0")
        self.rho, self.adaptive = rho, adaptive
        self.name = "AdaptiveSharpness" if adaptive else "Sharpness"

    def forward(
        self, weights: Tensors, detached_w_grads: Tensors, loss_change: LossChange
    ) -> Tensor:
        """Return the penalty (scalar)."""
        scales = [w.detach().abs() + 0.01 if self.adaptive else 1.0 for w in weights]  # T
        scaled = [t * g for t, g in zip(scales, detached_w_grads, strict=True)]  # T·g
        norm = lp_norm(torch.stack([*lp_norms(scaled, 2)]), 2)
        factor = self.rho / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        steps = [factor * t * g for t, g in zip(scales, scaled, strict=True)]
        return self.lmbda * loss_change(steps)


# --- sums and names --------------------------------------------------------------------------


class CombinedReg(Regularizer):
    """R1 + R2, each with its own λ. Combine more than two by nesting."""

    def __init__(self, reg1: Regularizer, reg2: Regularizer) -> None:
        """Take the two terms."""
        super().__init__(lmbda=1.0)
        self.terms = nn.ModuleList([reg1, reg2])
        self.name = f"{reg1.name}+{reg2.name}"
        # (weights, w_grads, a_grads) up to the last that a term takes, then the others it takes
        taken = set(reg1.inputs + reg2.inputs)
        n_lists = max((i for i, name in enumerate(INPUTS[:3], start=1) if name in taken), default=0)
        self.inputs = INPUTS[:n_lists] + tuple(name for name in INPUTS[3:] if name in taken)

    @property
    def label(self) -> str:
        """The labels of both terms."""
        return " + ".join(term.label for term in self.terms)

    def forward(self, *inputs: Tensors | LossChange, **named: Tensors | LossChange) -> Tensor:
        """Return the sum of the penalties (scalar) of (weights, w_grads, a_grads), or of `inputs`.

        Lists at the end that no term takes may be left out or given; names work too.
        """
        by_name = dict(zip(self.inputs, inputs, strict=False), **named)
        return sum(term(*(by_name[name] for name in term.inputs)) for term in self.terms)


# What --regularizer offers. <P> stands for a number, passed to the constructor under that name.
REGULARIZERS: dict[str, Callable[..., Regularizer]] = {
    "L<P>Grad": LPGrad,
    "LinfGrad": partial(LPGrad, P=math.inf),
    "VarianceNorm": VarianceNorm,
    "StdDevNorm": partial(VarianceNorm, std_dev=True),
    "InverseVarianceNorm": InverseVarianceNorm,
    "InverseStdDevNorm": partial(InverseVarianceNorm, std_dev=True),
    "KurtosisNorm": KurtosisNorm,
    "RangeNorm": RangeNorm,
    "StepL1Grad": StepL1Grad,
    "StepL2Grad": StepL2Grad,
    "StepNoise": StepNoise,
    "Dampening": Dampening,
    "Sharpness": Sharpness,
    "AdaptiveSharpness": partial(Sharpness, rho=0.5, adaptive=True),
}


def make_regularizer(name: str, lmbda: float, **options: object) -> Regularizer | None:
    """Make the regularizer of that name (upper or lower case), None for "none".

    Args:
        name: a key of REGULARIZERS, with a number for <P>, or "none".
        lmbda: λ, the factor of the penalty.
        options: further arguments of the constructor, such as only_weight_grads.

    Raises:
        ValueError: for an unknown name, or a λ, number or option that does not go with it.
    """
    if name.lower() == "none":
        return None
    make, numbers = _lookup(name)
    for option in options.keys() - inspect.signature(make).parameters.keys():
        raise ValueError(f"{name} has no option {option}")
    try:
        regularizer = make(lmbda, **numbers, **options)
    except TypeError as error:  # the constructor takes other arguments
        raise ValueError(f"{name}: {error}") from error
    return check_regularizer(regularizer, name)


def check_regularizer(regularizer: Regularizer, key: str) -> Regularizer:
    """Return the regularizer; ValueError where its class does not say what it must."""
    if not isinstance(regularizer, Regularizer):
        raise ValueError(f"{key} in REGULARIZERS makes no Regularizer")
    name = getattr(regularizer, "name", None)
    if not isinstance(name, str) or name.lower() != key.lower():
        raise ValueError(f"{key}: `name` is {name!r}: it must be the key in REGULARIZERS, {key!r}")
    inputs = getattr(regularizer, "inputs", None)
    if not isinstance(inputs, tuple) or not set(inputs) <= set(INPUTS):
        raise ValueError(f"{key}: `inputs` is {inputs!r}: a tuple out of {', '.join(INPUTS)}")
    return regularizer


def _lookup(name: str) -> tuple[Callable[..., Regularizer], dict[str, int]]:
    """Return the constructor of that name and the numbers in the name; ValueError if unknown."""
    for template, make in REGULARIZERS.items():
        pattern = re.sub(r"<(\w+)>", r"(?P<\1>\\d+)", template)
        if match := re.fullmatch(pattern, name, re.IGNORECASE):
            return make, {key: int(digits) for key, digits in match.groupdict().items()}
    for template in REGULARIZERS:
        if re.fullmatch(re.sub(r"<\w+>", ".+", template), name, re.IGNORECASE):
            raise ValueError(f"{name}: <P> in {template} must be a whole number, such as 2")
    raise ValueError(f"unknown regularizer {name!r}: choose none, {', '.join(REGULARIZERS)}")


def accepted_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return those of the options that the regularizer of that name accepts; "none" has none."""
    if name.lower() == "none":
        return {}
    parameters = inspect.signature(_lookup(name)[0]).parameters
    return {key: value for key, value in options.items() if key in parameters}


class Option(NamedTuple):
    """An annotated argument of constructors: what a script needs for a flag of that name."""

    kind: type
    help: str
    defaults: tuple[object, ...]  # in the order of regularizer_names
    tracked: bool  # also used for the regularizers that --track names
    regularizer_names: tuple[str, ...]  # keys of REGULARIZERS that accept it


def regularizer_options() -> dict[str, Option]:
    """Return every annotated argument of the constructors in REGULARIZERS, by name."""
    options: dict[str, Option] = {}
    for name, make in REGULARIZERS.items():
        for key, parameter in inspect.signature(make).parameters.items():
            if metadata := getattr(parameter.annotation, "__metadata__", ()):
                text, *marks = metadata
                kind, tracked = parameter.annotation.__origin__, PENALTY_ONLY not in marks
                _, _, defaults, _, names = options.get(key, Option(kind, text, (), tracked, ()))
                defaults, names = (*defaults, parameter.default), (*names, name)
                options[key] = Option(kind, text, defaults, tracked, names)
    return options
