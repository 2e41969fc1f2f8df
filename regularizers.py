"""The regularizers: pure functions of weights and gradients, each with its λ inside.

To add one, write a class; the training loop, --help and the logs find it by its name:

    class MyNorm(Regularizer):
        \"\"\"λ · Σ_l ‖W_l‖₄ (say where it comes from).\"\"\"

        def forward(self, weights):
            return self.lmbda * sum(w.norm(4) for w in weights)

The arguments of `forward` say what it takes: `PenaltyInputs` in engine/step/penalty_inputs.py lists
what there is. All of it is of the whole batch, also in a run of several processes. Whatever is
computed from it is differentiated through it, but for detached_w_grads. Gradients cost a second
backward pass, unless they are detached, and each call of loss_change costs one more plain step.

An argument of a constructor that is annotated as an option, such as TargetBits, is also a flag of
the scripts (--target_bits): of type bool, int, float or str, and with a name that no flag has yet.
`forward` is a pure function: it keeps nothing from one call to the next and writes into none of its
inputs, and there are no parameters to train. What it draws from torch's random stream is fresh in
each batch and the same when the run is repeated.
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
from engine.step.penalty_inputs import INPUTS
from engine.system.errors import PenaltyError

Tensors = Sequence[Tensor]
LossChange = Callable[[Tensors], Tensor]

# What --regularizer offers, by name; <P> stands for a number, passed to the constructor under that
# name. Classes put themselves in.
REGULARIZERS: dict[str, Callable[..., "Regularizer"]] = {}

# Names that mean something else: no penalty, and what is logged beside the penalty's value.
RESERVED_NAMES = ("none", "loss", "accuracy")

OPTION_KINDS = (bool, int, float, str)  # what a flag's value can be read as


class Regularizer(nn.Module):
    """A penalty R, λ included. A subclass with a `forward` is in REGULARIZERS, by its name.

    `forward` takes the inputs that it names and returns R, a scalar tensor. It is a pure function
    of them. To define a subclass raises PenaltyError where its name is taken, upper and lower case
    being the same, or one of its options is of a type that no flag has. The same class may be
    defined again, as a notebook does.

    Attributes:
        name: as it is logged; unless given, that of the class.
        inputs: what `forward` takes, in order, out of INPUTS; unless given, its arguments' names.
    """

    name: str = ""
    inputs: tuple[str, ...] = ()

    def __init_subclass__(cls, register: bool = True, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.name = vars(cls).get("name", cls.__name__)
        if "forward" in vars(cls) and "inputs" not in vars(cls):
            _, *arguments = inspect.signature(cls.forward).parameters
            cls.inputs = tuple(arguments)
        if register and cls.forward is not nn.Module.forward:
            _check_name(cls)
            _check_options(cls)
            REGULARIZERS[cls.name] = cls

    def __init__(
        self, lmbda: float, *, name: str | None = None, inputs: tuple[str, ...] | None = None
    ) -> None:
        """Keep λ, and a name and inputs that depend on the constructor's arguments.

        Raises ValueError for a λ that is negative or not finite, an input that there is not, or a
        `forward` that does not take its inputs by position.
        """
        super().__init__()
        if not (math.isfinite(lmbda) and lmbda >= 0):
            raise ValueError(f"lmbda is {lmbda}: it must be finite and at least 0")
        self.lmbda = lmbda
        self.name = name or self.name
        self.inputs = self.inputs if inputs is None else inputs
        is_tuple = isinstance(self.inputs, tuple)
        if unknown := [i for i in self.inputs if i not in INPUTS] if is_tuple else [self.inputs]:
            raise ValueError(
                f"{self.name}: `forward` takes {', '.join(map(repr, unknown))}: "
                f"its inputs are a tuple out of {', '.join(INPUTS)}"
            )
        try:
            inspect.signature(self.forward).bind(*self.inputs)
        except TypeError as error:
            raise ValueError(
                f"{self.name}: `forward` is given {', '.join(self.inputs)}, by position: {error}"
            ) from error

    @property
    def label(self) -> str:
        """Name and λ, as a plan shows them: "L2Grad λ=0.01"."""
        return f"{self.name} λ={self.lmbda:g}"


def _check_name(cls: type[Regularizer]) -> None:
    """Raise PenaltyError where the name of a new class means something else already."""
    of_class = cls.__module__, cls.__qualname__
    taken = {reserved: reserved for reserved in RESERVED_NAMES}
    taken |= {
        template: _pattern(template)
        for template, make in REGULARIZERS.items()
        if (make.__module__, getattr(make, "__qualname__", "")) != of_class
    }
    for owner, pattern in taken.items():
        if cls.name.lower() == owner.lower() or re.fullmatch(pattern, cls.name, re.IGNORECASE):
            raise PenaltyError(
                f"a regularizer cannot be called {cls.name}: {owner} means something else already, "
                "whatever the case; choose another name"
            )


def _check_options(cls: type[Regularizer]) -> None:
    """Raise PenaltyError where an option of a new class is of a type that no flag has."""
    for key, parameter in _annotated_arguments(cls).items():
        kind = parameter.annotation.__origin__
        if kind not in OPTION_KINDS:
            allowed = ", ".join(each.__name__ for each in OPTION_KINDS)
            raise PenaltyError(
                f"{cls.name}: the option {key} is of type {getattr(kind, '__name__', kind)}: "
                f"choose one of {allowed}"
            )


def _pattern(template: str) -> str:
    """Return the regular expression of the names that a key of REGULARIZERS stands for."""
    return re.sub(r"<(\w+)>", r"(?P<\1>\\d+)", template)


def _annotated_arguments(make: Callable[..., Regularizer]) -> dict[str, inspect.Parameter]:
    """Return the arguments of a constructor that are annotated as options, by name."""
    parameters = inspect.signature(make).parameters
    return {key: p for key, p in parameters.items() if hasattr(p.annotation, "__metadata__")}


# Marks an option that --track ignores: what is tracked means the same whatever is penalized.
PENALTY_ONLY = "of the penalty only"

MAX_P = 1_000_000  # beyond it the norm is max|g| to the last bit


class LPGrad(Regularizer):
    """λ · ( Σ_l ‖∂L/∂W_l‖_p + Σ_l B^(−1/p) · ‖∂L/∂A_l‖_p ).

    With only_weight_grads the second sum is left out.
    P = 1 is the gradient ℓ1 regularizer of Alizadeh et al., arXiv 2002.07520; P = 2 is our own;
    P = ∞ is max|g|, with B^(−1/P) = 1.
    """

    name = "L<P>Grad"

    def __init__(self, lmbda: float, P: float, only_weight_grads: bool = False) -> None:
        """Take the order P of the norm; ValueError unless it is an integer ≥ 1 or math.inf."""
        if P != math.inf and not (1 <= P <= MAX_P and P == int(P)):
            raise ValueError(f"L{P}Grad: P must be an integer from 1 to {MAX_P:,}, or infinite")
        P = P if P == math.inf else int(P)
        inputs = ("w_grads",) if only_weight_grads else ("w_grads", "a_grads")
        super().__init__(lmbda, name=f"L{P}Grad", inputs=inputs)
        self.P = P
        self.only_weight_grads = only_weight_grads

    @property
    def label(self) -> str:
        """Name and λ; "@weights" where the gradients of activations are left out."""
        return f"{self.name}{'@weights' if self.only_weight_grads else ''} λ={self.lmbda:g}"

    def forward(self, w_grads: Tensors, a_grads: Tensors = ()) -> Tensor:
        total = sum(lp_norms(w_grads, self.P))
        if not self.only_weight_grads:
            total = total + sum(per_image_lp_norms(a_grads, self.P))
        return self.lmbda * total


REGULARIZERS["LinfGrad"] = partial(LPGrad, P=math.inf)


class VarianceNorm(Regularizer):
    """λ · Σ_l Var(W_l), or λ · √(Σ_l Var(W_l)) with std_dev; Var(W) = mean((W − mean W)²)."""

    def __init__(self, lmbda: float, std_dev: bool = False) -> None:
        super().__init__(lmbda, name=self.name.replace("Variance", "StdDev") if std_dev else None)
        self.std_dev = std_dev

    def forward(self, weights: Tensors) -> Tensor:
        total = sum(w.var(correction=0) for w in weights)
        return self.lmbda * (total.sqrt() if self.std_dev else total)


REGULARIZERS["StdDevNorm"] = partial(VarianceNorm, std_dev=True)


class InverseVarianceNorm(VarianceNorm):
    """λ · mean_l(1 / Var(W_l)), or λ · √(mean_l(1 / Var(W_l))) with std_dev."""

    def forward(self, weights: Tensors) -> Tensor:
        mean = sum(1 / w.var(correction=0) for w in weights) / len(weights)
        return self.lmbda * (mean.sqrt() if self.std_dev else mean)


REGULARIZERS["InverseStdDevNorm"] = partial(InverseVarianceNorm, std_dev=True)

FoldBN = Annotated[bool, "penalize the weights with batch norms folded in", PENALTY_ONLY]


class ShapeRegularizer(Regularizer):
    """A penalty of how weights are distributed: W_l or, with fold_bn, the folded Ŵ_l (ours).

    Ŵ_l are the weights that a network without batch norms would have.
    """

    def __init__(self, lmbda: float, fold_bn: FoldBN = False) -> None:
        super().__init__(lmbda, inputs=("folded_weights",) if fold_bn else ("weights",))


class KurtosisNorm(ShapeRegularizer):
    """λ · mean_l (Kurt(W_l) − target)², Kurt(W) = mean(((W − mean W) / √Var(W))⁴).

    KURE of Shkolnik et al. 2020, arXiv 2002.07686: weights that are distributed uniformly, whose
    kurtosis is 1.8 (Gaussian: 3), lose least when the grid's step size is not quite the best one.
    """

    def __init__(self, lmbda: float, target: float = 1.8, fold_bn: FoldBN = False) -> None:
        super().__init__(lmbda, fold_bn)
        self.target = target

    def forward(self, weights: Tensors) -> Tensor:
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

    The L∞ loss of Range Regularization, arXiv 2303.08253. Its margin and soft-min-max losses, which
    train a parameter of their own in each layer, are no functions of weights and gradients.
    """

    def forward(self, weights: Tensors) -> Tensor:
        return self.lmbda * sum(w.abs().amax() for w in weights)


# --- the loss change that quantization itself makes ------------------------------------------

TargetBits = Annotated[int, "bits that the weights are to survive, 2 to 16"]
DetachStep = Annotated[bool, "differentiate with the step sizes held constant", PENALTY_ONLY]


class StepRegularizer(Regularizer):
    """A penalty with s_l = 2·max|W_l| / (2^b − 1), the step size of b-bit quantization, in it.

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
        self.target_bits = int(target_bits)
        self.detach_step = detach_step

    def step_sizes(self, weights: Tensors) -> list[Tensor]:
        """Return s_l of each layer (scalars)."""
        sizes = [w.abs().amax() / (2 ** (self.target_bits - 1) - 0.5) for w in weights]
        return [s.detach() for s in sizes] if self.detach_step else sizes


class StepL1Grad(StepRegularizer):
    """λ · Σ_l (s_l/2) · ‖∂L/∂W_l‖₁: the most that rounding can change the loss, to first order.

    The bound of gradient ℓ1 regularization (arXiv 2002.07520), with each layer's perturbation.
    """

    def forward(self, weights: Tensors, w_grads: Tensors) -> Tensor:
        terms = zip(self.step_sizes(weights), lp_norms(w_grads, 1), strict=True)
        return self.lmbda * sum(s / 2 * norm for s, norm in terms)


class StepL2Grad(StepRegularizer):
    """λ · √( Σ_l (s_l²/12) · ‖∂L/∂W_l‖₂² ): what rounding typically changes the loss by.

    The root mean square of the first-order change when every weight moves independently and
    uniformly in ±s_l/2, whose variance is s_l²/12. Our own.
    """

    def forward(self, weights: Tensors, w_grads: Tensors) -> Tensor:
        terms = zip(self.step_sizes(weights), lp_norms(w_grads, 2), strict=True)
        norms = torch.stack([s * norm for s, norm in terms])
        return self.lmbda * torch.linalg.vector_norm(norms) / math.sqrt(12)


class StepNoise(StepRegularizer):
    """λ · ( L(W + Δ) − L(W) ), each element of Δ_l uniform in ±s_l/2, fresh in each batch.

    What rounding changes the loss by, to all orders: noise of quantization's size in training, as
    in DiffQ (Défossez et al., arXiv 2104.09987), here a penalty beside the clean loss.
    """

    def forward(self, weights: Tensors, loss_change: LossChange) -> Tensor:
        pairs = zip(self.step_sizes(weights), weights, strict=True)
        return self.lmbda * loss_change([s * (torch.rand_like(w) - 0.5) for s, w in pairs])


class Dampening(StepRegularizer):
    """λ · Σ_l ‖Q(W_l) − clip(W_l)‖₂²: draws weights to the middle of their quantization bin.

    Q rounds to the nearest multiple of s_l and clips, both held constant; weights beyond the last
    point of the grid are not moved. Nagel et al., arXiv 2203.11086, which trains with quantized
    weights and learned step sizes: here the weights stay in full precision.
    """

    def __init__(self, lmbda: float, target_bits: TargetBits = 4) -> None:
        super().__init__(lmbda, target_bits, detach_step=True)

    def forward(self, weights: Tensors) -> Tensor:
        n = 2 ** (self.target_bits - 1)
        terms = []
        for s, w in zip(self.step_sizes(weights), weights, strict=True):
            x_int = (w.detach() / s.clamp(min=torch.finfo(s.dtype).tiny)).round().clamp(-n, n - 1)
            terms.append((s * x_int - w.clamp(-n * s, (n - 1) * s)).square().sum())
        return self.lmbda * sum(terms)


# --- the loss nearby -------------------------------------------------------------------------

Rho = Annotated[float, "distance ρ from the weights to where the loss is taken, above 0"]


class Sharpness(Regularizer):
    """λ · ( L(W + ε) − L(W) ), ε = ρ·g/‖g‖₂ held constant; g is ∂L/∂W over all layers l.

    SAM (Foret et al., arXiv 2010.01412) as a penalty: λ = 1 gives its gradient, that at W + ε. Only
    the weights of convolutions and linear layers are moved. With `adaptive`,
    ε = ρ·T²g/‖Tg‖₂ with T = |W| + 0.01 (ASAM: Kwon et al., arXiv 2102.11600).
    """

    def __init__(self, lmbda: float, rho: Rho = 0.05, adaptive: bool = False) -> None:
        """Take ρ; ValueError unless it is finite and above 0."""
        super().__init__(lmbda, name="AdaptiveSharpness" if adaptive else None)
        if not (math.isfinite(rho) and rho > 0):
            raise ValueError(f"rho is {rho}: it must be finite and above 0")
        self.rho = rho
        self.adaptive = adaptive

    def forward(
        self, weights: Tensors, detached_w_grads: Tensors, loss_change: LossChange
    ) -> Tensor:
        scales = [w.detach().abs() + 0.01 if self.adaptive else 1.0 for w in weights]  # T
        scaled = [t * g for t, g in zip(scales, detached_w_grads, strict=True)]  # T·g
        norm = lp_norm(torch.stack([*lp_norms(scaled, 2)]), 2)
        factor = self.rho / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        epsilon = [factor * t * g for t, g in zip(scales, scaled, strict=True)]
        return self.lmbda * loss_change(epsilon)


REGULARIZERS["AdaptiveSharpness"] = partial(Sharpness, rho=0.5, adaptive=True)


# --- sums and names --------------------------------------------------------------------------


class CombinedReg(Regularizer, register=False):
    """R1 + R2, each with its own λ. Combine more than two by nesting."""

    def __init__(self, reg1: Regularizer, reg2: Regularizer) -> None:
        # (weights, w_grads, a_grads) up to the last that a term takes, then the others it takes
        taken = set(reg1.inputs + reg2.inputs)
        n_lists = max((i for i, name in enumerate(INPUTS[:3], start=1) if name in taken), default=0)
        inputs = INPUTS[:n_lists] + tuple(name for name in INPUTS[3:] if name in taken)
        super().__init__(lmbda=1.0, name=f"{reg1.name}+{reg2.name}", inputs=inputs)
        self.terms = nn.ModuleList([reg1, reg2])

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


def make_regularizer(name: str, lmbda: float, **options: object) -> Regularizer | None:
    """Make the regularizer of that name, a key of REGULARIZERS in any case; None for "none".

    `options` are further arguments of the constructor, such as only_weight_grads. Raises ValueError
    for an unknown name, a λ, number or option that does not go with it, or a regularizer with
    parameters to train.
    """
    if name.lower() == "none":
        return None
    make, numbers, own_name = _lookup(name)
    for option in options.keys() - inspect.signature(make).parameters.keys():
        raise ValueError(f"{name} has no option {option}")
    try:
        regularizer = make(lmbda, **numbers, **options)
    except TypeError as error:  # the constructor takes other arguments
        raise ValueError(f"{name}: {error}") from error
    if trained := [key for key, p in regularizer.named_parameters() if p.requires_grad]:
        raise ValueError(
            f"{own_name} has parameters of its own, which nothing trains: {', '.join(trained)}; a "
            "penalty is a function of the network"
        )
    regularizer.name = own_name  # also of an alias, so that it is logged as it was asked for
    return regularizer


def _lookup(name: str) -> tuple[Callable[..., Regularizer], dict[str, int], str]:
    """Return the constructor of that name, the numbers in the name, and the name as we write it.

    Raises ValueError where it is unknown.
    """
    for template, make in REGULARIZERS.items():
        if match := re.fullmatch(_pattern(template), name, re.IGNORECASE):
            numbers = {key: int(digits) for key, digits in match.groupdict().items()}
            for key, number in numbers.items():
                template = template.replace(f"<{key}>", str(number))
            return make, numbers, template
    for template in REGULARIZERS:
        if re.fullmatch(re.sub(r"<\w+>", ".+", template), name, re.IGNORECASE):
            raise ValueError(f"{name}: <P> in {template} must be a whole number, such as 2")
    raise ValueError(f"unknown regularizer {name!r}: choose {', '.join(REGULARIZERS)}")


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
        for key, parameter in _annotated_arguments(make).items():
            text, *marks = parameter.annotation.__metadata__
            kind, tracked = parameter.annotation.__origin__, PENALTY_ONLY not in marks
            option = options.get(key, Option(kind, text, (), tracked, ()))
            options[key] = option._replace(
                defaults=(*option.defaults, parameter.default),
                regularizer_names=(*option.regularizer_names, name),
            )
    return options
