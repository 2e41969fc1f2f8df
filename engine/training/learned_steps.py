"""Learned step size quantization (LSQ): training with quantized weights and activations.

v̂ = s·round(clip(v/s, −Q_N, Q_P)) of every convolution's and linear layer's weight and input, with a
step size s for each tensor that is trained like a weight. Source: Esser et al., ICLR 2020, arXiv
1902.08153. Q_N = 2^(b−1) and Q_P = 2^(b−1) − 1 for weights, and for inputs that may be negative;
Q_N = 0 and Q_P = 2^b − 1 for the others. Layers are those of the exported graph, but the network
itself is trained, with its full-precision weights: hooks on the module in whose forward a layer
runs put the quantized ones in their place. An input is quantized where it is that module's own.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves

from engine.networks.export import export_network
from engine.networks.graph import Operation, aten, layers, returning_values
from engine.networks.layers import LAYER_TYPES, image_dtype, trainable_parameters
from engine.quantization.bit_widths import check_bits
from engine.system import distributed
from engine.system.errors import FileError, NetworkError, StepSizeError
from engine.system.io import read_json

FIRST_LAST_BITS = 8  # at least, with --keep_first_last
PARAMETERS = {"weight": "learned_weight_step", "input": "learned_input_step"}  # of a layer
KEY = "learned_steps"  # in the record of a training
INPUT_TYPES = nn.modules.conv._ConvNd | nn.Linear  # modules that are one layer
EARLIER_INPUT_TYPES = LAYER_TYPES | nn.ConvTranspose2d  # whose inputs had steps in versions before


class _RoundToStep(torch.autograd.Function):
    """v̂ = s·round(clip(v/s, −Q_N, Q_P)), in the dtype of v; computed in that of s."""

    @staticmethod
    def forward(ctx, v, s, int_min, int_max, gradient_scale):
        ctx.save_for_backward(v, s)
        ctx.grid = int_min, int_max, gradient_scale
        return (v.to(s.dtype) / s).clamp_(int_min, int_max).round_().mul_(s).to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Return equations 5 and 3 of the paper, the latter times `gradient_scale`."""
        (v, s), (int_min, int_max, gradient_scale) = ctx.saved_tensors, ctx.grid
        x = v.to(s.dtype) / s
        is_inside = (x > int_min) & (x < int_max)
        ds = torch.where(is_inside, x.round() - x, x.clamp(int_min, int_max))
        return grad * is_inside, (grad * ds).sum() * gradient_scale, None, None, None


@dataclass(eq=False)
class LearnedStep:
    """The quantizer of one tensor. `n_values` is N, how many values a weight or an image has."""

    step: Tensor  # s, a scalar
    int_min: int  # −Q_N
    int_max: int  # Q_P
    n_values: int = 1
    is_set: bool = False  # else the first tensor sets the step

    def __call__(self, v: Tensor) -> Tensor:
        """Return v̂, of the same shape; the gradient of s is scaled by 1/√(N·Q_P), section 2.2."""
        if not self.is_set:
            self.set_step(v)
        gradient_scale = 1 / math.sqrt(self.n_values * self.int_max)
        return _RoundToStep.apply(v, self.step, self.int_min, self.int_max, gradient_scale)

    @torch.no_grad()
    def set_step(self, v: Tensor) -> None:
        """Set s to 2·mean|v|/√Q_P, the mean over all processes' shares of a batch."""
        total = torch.stack([v.abs().sum(dtype=self.step.dtype), self.step.new_tensor(v.numel())])
        size, n = distributed.batch_sum(total).unbind()
        s = 2 * size / n / math.sqrt(self.int_max)
        self.step.copy_(s.clamp(min=torch.finfo(s.dtype).tiny))  # of zeros, s would be 0
        self.is_set = True


@dataclass(frozen=True)
class Place:
    """Where the network runs a layer: in a module's forward, with the `tensor` of an `owner`."""

    module: str
    owner: str
    tensor: str
    takes_input: bool  # the module's input is the layer's
    runs: list[str] = field(default_factory=list)  # its layers in the graph, one for each run

    def weight(self, net: nn.Module) -> Tensor:
        """Return the weight as the network has it."""
        return getattr(net.get_submodule(self.owner), self.tensor)

    def parameter(self, kind: str) -> str:
        """Return the name that the step size of the "weight" or "input" has in its owner."""
        return self.tensor.removesuffix("weight") + PARAMETERS[kind]


@dataclass(frozen=True)
class LearnedSteps:
    """The quantizers of a network's layers."""

    layers: Mapping[str, dict[str, LearnedStep]]  # by layer, then "weight" or "input"
    places: Mapping[str, Place]
    weight_bits: int
    act_bits: int | None  # None: inputs are not quantized
    first_epoch: int = 0  # from which on the network is quantized

    @property
    def float_inputs(self) -> list[str]:
        """Return the layers whose inputs stay in float, as no module takes them, with act_bits."""
        return [name for name, kinds in self.layers.items() if self.act_bits and len(kinds) == 1]

    def steps(self) -> dict[str, LearnedStep]:
        """Return every quantizer, by layer and what it quantizes: "conv1.weight"."""
        return {f"{name}.{kind}": q for name, qs in self.layers.items() for kind, q in qs.items()}

    def bits_of_layers(self) -> dict[str, int]:
        """Return the bits of the weights of each layer of the graph, by name."""
        runs = self.by_run().items()
        return {run: (-kinds["weight"].int_min).bit_length() for run, kinds in runs}

    def by_run(self) -> dict[str, Mapping[str, LearnedStep]]:
        """Return the quantizers of each layer of the graph: one that runs twice is two there."""
        names = {run: name for name in self.layers for run in self.places[name].runs}
        return {run: self.layers[name] for run, name in names.items()}

    @contextmanager
    def quantized(self, net: nn.Module) -> Iterator[None]:
        """Context manager in which the layers of the network run quantized."""
        with ExitStack() as stack:
            for name, quantizers in self.layers.items():
                stack.enter_context(_quantized_layer(net, self.places[name], quantizers))
            yield

    @torch.no_grad()
    def quantized_weights(self, net: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield each layer's name, its weight w and ŵ."""
        for name, quantizers in self.layers.items():
            w = self.places[name].weight(net)
            yield name, w, quantizers["weight"](w)

    def check(self) -> None:
        """Raise StepSizeError, naming it, where a step size is no longer positive."""
        state = self.state_dict()
        values = torch.stack([*state.values()]).tolist()  # one copy from a GPU
        for name, value in zip(state, values, strict=True):
            if not value > 0:
                raise StepSizeError(
                    f"the learned step size of {name} is {value:.3g}, and must stay above 0: a "
                    "smaller --lr, or starting from trained weights, may help"
                )

    def state_dict(self) -> dict[str, Tensor]:
        """Return the step sizes by name, for a checkpoint."""
        return {name: quantizer.step.detach() for name, quantizer in self.steps().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], epochs_started: int) -> None:
        """Restore the step sizes of a training that has begun so many epochs."""
        for name, quantizer in self.steps().items():
            quantizer.step.copy_(state[name])
            quantizer.is_set = epochs_started > self.first_epoch

    def drop_unsaved_inputs(self, net: nn.Module, state: Mapping[str, Tensor]) -> list[Tensor]:
        """Leave inputs in float whose steps an earlier version's checkpoint lacks; return these."""
        dropped = []
        for name, kinds in self.layers.items():
            place = self.places[name]
            is_later = not isinstance(net.get_submodule(place.module), EARLIER_INPUT_TYPES)
            if is_later and "input" in kinds and f"{name}.input" not in state:
                dropped.append(kinds.pop("input").step)
                delattr(net.get_submodule(place.owner), place.parameter("input"))
        return dropped

    def record(self) -> dict[str, Any]:
        """Return what `read_steps` needs, as JSON can hold it: floats lose no bit."""
        layers: dict[str, dict[str, Any]] = {}
        for name, quantizers in self.layers.items():
            for kind, q in quantizers.items():
                saved = {"step": q.step.item(), "int_min": q.int_min, "int_max": q.int_max}
                layers.setdefault(name, {})[kind] = saved
        return {"weight_bits": self.weight_bits, "act_bits": self.act_bits, "layers": layers}


@contextmanager
def _quantized_layer(
    net: nn.Module, place: Place, quantizers: Mapping[str, LearnedStep]
) -> Iterator[None]:
    """Context manager in which a layer's weight is quantized, and its input if it has a quantizer.

    That is while its module runs, and while gradients go back through it: `torch.utils.checkpoint`
    then runs parts of its forward again.
    """
    owner, name = net.get_submodule(place.owner), place.tensor
    tensors = owner._parameters if name in owner._parameters else owner._buffers
    weights = []  # the full-precision one first, while a quantized one is in its place

    def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        weights.append(tensors[name])
        tensors[name] = quantizers["weight"](weights[0])
        if "input" not in quantizers:
            return args, kwargs
        if args:
            return (quantizers["input"](args[0]), *args[1:]), kwargs
        key = next(key for key, value in kwargs.items() if isinstance(value, Tensor))
        return args, {**kwargs, key: quantizers["input"](kwargs[key])}

    def end(module: nn.Module, args: tuple, output: Any) -> None:
        if not weights:
            return
        w_q, tensors[name] = tensors[name], weights.pop()
        for value in tree_leaves(output):
            if getattr(value, "grad_fn", None) is not None:
                value.register_hook(lambda grad: begin_backward(w_q))

    def begin_backward(w_q: Tensor) -> None:
        if not weights:
            weights.append(tensors[name])
            tensors[name] = w_q
            torch.autograd.Variable._execution_engine.queue_callback(restore)

    def restore() -> None:
        if weights:
            tensors[name] = weights[0]
            weights.clear()

    module = net.get_submodule(place.module)
    handles = [module.register_forward_pre_hook(begin, with_kwargs=True)]
    handles.append(module.register_forward_hook(end, always_call=True))
    try:
        yield
    finally:
        restore()  # of a backward pass that failed
        for handle in handles:
            handle.remove()


# --- of a network that is trained ------------------------------------------------------------


def make_steps(
    net: nn.Module,
    image_shape: Sequence[int],
    weight_bits: int,
    act_bits: int | None = None,
    *,
    keep_first_last: bool = False,
    first_epoch: int = 0,
) -> LearnedSteps:
    """Give the layers of a network step sizes, in place, as parameters that its files do not have.

    Layers are those of its graph for images of `image_shape` (3, H, W); the first and the last of
    them have at least 8 bits if `keep_first_last`. Inputs are signed where, of random images, some
    are negative. Raises NetworkError where it cannot be exported, and for weights that are computed
    or of several layers.
    """
    graph = export_network(net, image_shape)
    places = find_places(graph, net)
    read = returning_values(graph, [_before_padding(layer) for layer in layers(graph).values()])
    images = torch.randn(2, *image_shape, generator=torch.Generator().manual_seed(0))
    images = images.to(image_dtype(net))
    inputs = dict(zip(layers(graph), read(images), strict=True))
    ends = (next(iter(places)), next(reversed(places))) if keep_first_last else ()
    quantizers: dict[str, dict[str, LearnedStep]] = {}
    for name, place in places.items():
        least = FIRST_LAST_BITS if name in ends else 0
        w, x = place.weight(net), inputs[name]
        tensors = {"weight": (weight_bits, True, w.numel())}
        if act_bits and place.takes_input:
            tensors["input"] = (act_bits, bool((x < 0).any()), x[0].numel())
        quantizers[name] = {}
        for kind, (n_bits, is_signed, n_values) in tensors.items():
            step = nn.Parameter(w.new_ones(()))  # until it is set
            integers = _integers(max(n_bits, least), is_signed)
            quantizers[name][kind] = LearnedStep(step, *integers, n_values)
            net.get_submodule(place.owner).register_parameter(place.parameter(kind), step)
    net.register_state_dict_post_hook(_remove_steps)
    net.register_load_state_dict_post_hook(_allow_missing_steps)
    return LearnedSteps(quantizers, places, weight_bits, act_bits, first_epoch)


def _integers(n_bits: int, is_signed: bool) -> tuple[int, int]:
    """Return the least and the largest integer of n_bits."""
    int_min = -(2 ** (n_bits - 1)) if is_signed else 0
    return int_min, int_min + 2**n_bits - 1


def find_places(graph: fx.GraphModule, net: nn.Module) -> dict[str, Place]:
    """Return where the network runs each layer of its graph, in the order in which they first run.

    A module that runs several times counts once. Raises NetworkError, naming them, for weights
    that are computed, or read in the forward of several modules.
    """
    places: dict[str, Place] = {}
    first_readers: dict[int, str] = {}  # of a weight, by its id
    refused = []
    for name, layer in layers(graph).items():
        stored = layer.node.meta["stored"].get("weight")
        if stored is None:
            refused.append(f"the weight of {name} is computed")
            continue
        owner, _, tensor = stored.rpartition(".")
        module = layer.node.meta["path"]
        place = Place(module, owner, tensor, _takes_input(net.get_submodule(module), layer))
        first = first_readers.setdefault(id(place.weight(net)), name)
        if first == name:
            places[name] = place
        places[first].runs.append(name)
        if places[first].module != module:
            refused.append(f"{name} shares its weight with {first}")
    if refused:
        raise NetworkError(f"--qat_bits: {type(net).__name__}: {', '.join(refused)}")
    return places


def _takes_input(module: nn.Module, layer: Operation) -> bool:
    """Tell whether the module is that one layer, and what it is given is the layer's input."""
    if not isinstance(module, INPUT_TYPES):
        return False
    value = _before_padding(layer)
    return value.op == "placeholder" or value.meta["path"] != layer.node.meta["path"]


def _before_padding(layer: Operation) -> fx.Node:
    """Return what a convolution pads, or the layer's input: the same values, with as many signs."""
    value = layer.node.args[0]
    while value.target is aten.pad.default:
        value = value.args[0]
    return value


def _is_step(key: str) -> bool:
    return key.endswith(tuple(PARAMETERS.values()))


def _remove_steps(net: nn.Module, state: dict, prefix: str, metadata: object) -> None:
    for key in filter(_is_step, [*state]):
        del state[key]


def _allow_missing_steps(net: nn.Module, incompatible_keys: Any) -> None:
    missing = incompatible_keys.missing_keys
    missing[:] = [key for key in missing if not _is_step(key)]


def parameter_groups(net: nn.Module, steps: LearnedSteps | None) -> list[dict[str, Any]]:
    """Return the groups of trainable parameters for an optimizer: step sizes have no decay."""
    of_steps = [quantizer.step for quantizer in steps.steps().values()] if steps else []
    ids = {id(step) for step in of_steps}
    groups = [{"params": [p for p in trainable_parameters(net).values() if id(p) not in ids]}]
    return [*groups, {"params": of_steps, "weight_decay": 0.0}] if of_steps else groups


# --- of saved weights ------------------------------------------------------------------------


def read_steps(path: Path, net: nn.Module, graph: fx.GraphModule) -> LearnedSteps:
    """Return the quantizers in the record of a training, for a network with its weights.

    `graph` is that of `export_network`. FileError for other files and records of other networks.
    """
    places = find_places(graph, net)
    with read_json(path) as content:
        if KEY not in content:
            reason = "has no learned steps: it is no record of a --qat_bits training"
            raise FileError(f"{path} {reason}")
        saved = content[KEY]
        bits = {"weight": saved["weight_bits"], "input": saved["act_bits"]}
        bits = {kind: n_bits for kind, n_bits in bits.items() if n_bits is not None}
        for n_bits in bits.values():
            if not isinstance(n_bits, int):
                raise ValueError(f"{n_bits} bits is no whole number")
            check_bits(n_bits)
        # earlier versions had steps of convolutions and linear layers that ran as modules alone
        modules = {name: net.get_submodule(place.module) for name, place in places.items()}
        least = {name for name, module in modules.items() if isinstance(module, LAYER_TYPES)}
        if not least <= saved["layers"].keys() <= places.keys():
            raise FileError(f"{path}: its learned steps are not of the layers of this network")
        quantizers = {}
        for name, kinds in saved["layers"].items():
            had_input = isinstance(modules[name], EARLIER_INPUT_TYPES)
            has_input = places[name].takes_input and (had_input or "input" in kinds)
            if kinds.keys() != (bits.keys() if has_input else {"weight"}):
                raise ValueError(f"{name} has not one step for each of {', '.join(bits)}")
            w = places[name].weight(net)
            quantizers[name] = {k: _read_step(step, bits[k], w) for k, step in kinds.items()}
        return LearnedSteps(quantizers, places, bits["weight"], bits.get("input"))


def _read_step(saved: Mapping[str, Any], n_bits: int, w: Tensor) -> LearnedStep:
    """Return a quantizer to n_bits, or to those of the first and last layer, like the weight w."""
    step = w.new_tensor(float(saved["step"]))  # as the network has it: it may round to 0
    integers = saved["int_min"], saved["int_max"]
    possible = itertools.product((n_bits, max(n_bits, FIRST_LAST_BITS)), (False, True))
    if not 0 < step < math.inf or integers not in itertools.starmap(_integers, possible):
        raise ValueError(f"a step of {step:g} from {integers} is none of {n_bits} bits")
    return LearnedStep(step, *integers, is_set=True)
