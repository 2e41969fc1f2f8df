"""One network that is quantized in many ways: what is known of it is worked out once.

A `Quantization` is one of these ways, with its quantizer's options bound. `Conditions` and `Images`
are what all networks of a run are measured under and on.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from analysis.report import FLOAT_BITS, Row, Trial
from analysis.taylor import TaylorTerms, taylor_terms
from engine.deploy.integer_network import IntegerNetwork, shared_ranges
from engine.images.loader import Loader
from engine.networks.folding import fold_batch_norms, recalibrate_statistics
from engine.networks.graph import copy_graph, layers, weights
from engine.networks.layers import moved
from engine.networks.outputs import foreign_code
from engine.quantization import activations as acts
from engine.quantization.adaround import learn_rounding
from engine.quantization.bit_allocation import BIT_CHOICES, allocate_bits
from engine.quantization.block_reconstruction import learn_block_rounding
from engine.quantization.coverage import Coverage, coverage
from engine.quantization.output_correction import correct_outputs, correct_outputs_better
from engine.quantization.weights import (
    NO_EXCEPTIONS,
    Correction,
    QuantizedLayer,
    Quantizer,
    model_error,
    quantize_layer,
    quantize_weights,
)
from engine.step.evaluation import evaluate
from engine.system import distributed
from engine.training.learned_steps import FIRST_LAST_BITS, LearnedSteps


@dataclass(frozen=True)
class Quantization:
    """One way to quantize a network.

    Attributes:
        scheme: the quantizer's name.
        n_bits, act_bits: of weights and of inputs; FLOAT_BITS: not quantized.
        make_quantizer: returns the quantizer with its options for a trial, each with its own seed.
        n_trials: how often it is repeated.
        bias_range, correction: see `quantize_layer`.
        learns: whether the rounding of weights is learned.
        n_levels: how many values a quantized weight can take; None: it depends.
        is_mixed: each layer has bits of its own, n_bits per weight on average at most.
    """

    scheme: str
    n_bits: float
    act_bits: int
    make_quantizer: Callable[[int], Quantizer]
    n_trials: int
    bias_range: str | None
    correction: Correction | None
    learns: bool
    n_levels: int | None = None
    is_mixed: bool = False

    def layer_options(self) -> dict[str, Any]:
        """Return the options of `quantize_layer`."""
        return {"bias_range": self.bias_range, "correction": self.correction}


@dataclass(frozen=True)
class Images:
    """Loaders of test images, and of training images where something asks for them."""

    test: Loader
    calibration: Loader | None = None  # for ranges of inputs, means of outputs, bits of layers
    recalibration: Loader | None = None  # for batch-norm statistics of the quantized network
    expansion: Loader | None = None  # for the loss, one layer at a time
    rounding: Loader | None = None  # for learning to round weights


@dataclass(frozen=True)
class Conditions:
    """How networks are quantized and measured, whatever the quantization."""

    device: str
    dtype: torch.dtype = torch.float32  # of products
    memory_format: torch.memory_format = torch.channels_last
    calibration: str = "topk_median"
    sums: bool = False  # inputs of sums are quantized as well
    asymmetric: bool = False  # signed inputs have a zero point
    keep_first_last: bool = False
    # biases make up for the mean errors of layers' outputs on "quantized" or "float" inputs, or on
    # those that change predictions less ("auto"); None: they do not
    output_correction: str | None = None
    rounding_iterations: int = 500  # of learned rounding, in each layer or block
    by_blocks: bool = False  # it is learned for blocks of layers, with quantized inputs
    in_integers: bool = False  # simulate what an integer runtime computes
    avg_in_layer: bool = False
    tick: Callable[[], Any] = lambda: None  # called after each measurement


@dataclass(eq=False)
class MeasuredNetwork:
    """A network in float, on the CPU, and how it fares when it is quantized.

    Attributes:
        graph: as it is quantized, with batch norms folded and channels equalized if asked for.
        net: the network itself, for learned step sizes.
    """

    name: str
    graph: fx.GraphModule
    net: nn.Module
    conditions: Conditions
    images: Images

    def __post_init__(self) -> None:
        # of --output_bias_correction auto, by inputs: (scheme, bits, act_bits) → divergences
        self.divergences: dict[tuple[str, float, int], dict[str, float]] = {}
        self._ranges: dict[int, dict[str, acts.Range]] = {}
        self._rounding: tuple[Any, dict[str, Tensor]] = (None, {})
        self._mixed: dict[tuple[str, float], dict[str, int]] = {}
        self._weights: tuple[Any, tuple[fx.GraphModule, list[QuantizedLayer]]] = (None, None)

    @cached_property
    def unquantized(self) -> Trial:
        """Loss and accuracy without quantizing."""
        return Trial(**self._measure(self.prepared(self.graph), self.images.test))

    @cached_property
    def ends(self) -> tuple[str, str]:
        """The names of the first and the last layer."""
        names = [*layers(self.graph)]
        return names[0], names[-1]

    def layer_bits(self, n_bits: int) -> dict[str, int]:
        """Return the bits of layers, by name, that have others than n_bits."""
        bits = max(n_bits, FIRST_LAST_BITS)
        return dict.fromkeys(self.ends, bits) if self.conditions.keep_first_last else {}

    def weight_bits(self, how: Quantization) -> dict[str, int]:
        """Return the bits of each layer's weights, by name.

        Where each layer has its own, those of the least sum of the rises of the loss, see
        `loss_rises`: how inputs, biases and rounding are treated otherwise does not matter to it.
        """
        if not how.is_mixed:
            return dict.fromkeys(layers(self.graph), how.n_bits) | self.layer_bits(how.n_bits)
        key = how.scheme, how.n_bits
        if key not in self._mixed:
            self._mixed[key] = allocate_bits(self.loss_rises(how), self.n_weights, how.n_bits)
        return self._mixed[key]

    @cached_property
    def n_weights(self) -> dict[str, int]:
        """The number of weights of each layer, by name."""
        return {name: w.numel() for name, w in weights(self.graph).items()}

    def mean_bits(self, bits: Mapping[str, int]) -> float:
        """Return the mean number of bits per weight with these bits of each layer, by name."""
        n_weights = self.n_weights
        total = sum(n * bits.get(name, FLOAT_BITS) for name, n in n_weights.items())
        return total / sum(n_weights.values())

    def loss_rises(self, how: Quantization) -> dict[str, dict[int, float]]:
        """Return by how much the loss on the calibration images rises, by layer and its bits.

        With the weights of that layer alone quantized, to nearest.
        """
        loss = self._measure(self.prepared(self.graph), self.images.calibration)["loss"]

        def rise(name: str, n_bits: int) -> float:
            graph, _ = self.with_one_layer(how, name, n_bits)
            return self._measure(self.prepared(graph), self.images.calibration)["loss"] - loss

        return {name: {n: rise(name, n) for n in BIT_CHOICES} for name in layers(self.graph)}

    def with_one_layer(
        self, how: Quantization, name: str, n_bits: int, round_up: Tensor | int | None = None
    ) -> tuple[fx.GraphModule, QuantizedLayer]:
        """Return a copy of the graph in which that layer alone is quantized, and what became of it.

        `round_up`: where its weights are rounded up; None: to nearest.
        """
        graph = copy_graph(self.graph)
        options = {**how.layer_options(), "round_up": round_up}
        layer, quantizer = layers(graph)[name], how.make_quantizer(0)
        return graph, quantize_layer(graph, layer, quantizer, n_bits, **options)

    @cached_property
    def _calibrated(self) -> dict[str, acts.Range]:
        """The range of each input that is quantized, before bits are known."""
        how = self.conditions
        images = batches(self.images.calibration)
        return acts.calibrate(self.prepared(self.graph), images, how.calibration, how.sums)

    def ranges(self, act_bits: int) -> dict[str, acts.Range]:
        """Return the range of each input, by name; none where inputs stay in float."""
        how = self.conditions
        if act_bits == FLOAT_BITS:
            return {}
        if act_bits not in self._ranges:
            ranges = self._calibrated
            if acts.CALIBRATIONS[how.calibration].least_error:
                ranges = acts.least_error_ranges(
                    self.prepared(self.graph),
                    batches(self.images.calibration),
                    ranges,
                    act_bits,
                    self.layer_bits(act_bits),
                    how.asymmetric,
                )
            if how.in_integers:  # a runtime keeps a tensor on one grid, whoever reads it
                ranges = shared_ranges(self.graph, ranges)
            self._ranges[act_bits] = ranges
        return self._ranges[act_bits]

    def grids(self, act_bits: int) -> dict[str, acts.Grid]:
        """Return the grid of each input, by name."""
        bits = self.layer_bits(act_bits)
        asymmetric = self.conditions.asymmetric
        return acts.activation_grids(self.ranges(act_bits), act_bits, bits, asymmetric)

    def coverage(self, act_bits: int) -> Coverage:
        """Return what of the network is quantized with these bits of inputs."""
        in_float = act_bits == FLOAT_BITS
        inputs = None if in_float else acts.quantized_inputs(self.graph, self.conditions.sums)
        return coverage(self.graph, inputs)

    def learned_coverage(self, steps: LearnedSteps) -> Coverage:
        """Return what of the network is quantized with learned step sizes."""
        quantized = steps.by_run()
        inputs = {name for name, kinds in quantized.items() if "input" in kinds}
        return coverage(self.graph, inputs if steps.act_bits else None, quantized)

    def prepared(self, graph: fx.GraphModule) -> fx.GraphModule:
        """Return a copy of a graph of this network as it is evaluated.

        Batch norms that are left are folded, which changes no output and halves the time.
        """
        return self._moved(fold_batch_norms(graph))

    def _moved(self, net: nn.Module) -> nn.Module:
        """Move a network to where it is measured; return it."""
        return moved(net, self.conditions.device, self.conditions.memory_format)

    def _measure(self, net: nn.Module, loader: Loader) -> dict[str, float]:
        """Return the mean "loss" (cross entropy) and the "accuracy" of a network on images."""
        measured = evaluate(net, nn.CrossEntropyLoss(), loader, self.conditions.dtype)
        self.conditions.tick()
        return measured

    def trial(self, how: Quantization, trial: int) -> Trial:
        """Quantize the network and measure it on the test images."""
        graph, quantized = self.quantized_weights(how, trial)
        if self.conditions.in_integers:
            net = self.integers(how, trial)
        else:
            net = acts.quantize_activations(self.prepared(graph), self.grids(how.act_bits))
        measured = self._measure(net, self.images.test)
        error = model_error(quantized, self.conditions.avg_in_layer)
        return Trial(**measured, squared_error=error)

    def learned(self, steps: LearnedSteps) -> Trial:
        """Measure the network with the learned step sizes of its training, as the training ran it.

        Batch norms are not folded: rounding would then see activations that differ in their last
        bits.
        """
        errors = [
            QuantizedLayer(name, (w_q - w).double().square().sum().item(), w.numel())
            for first, w, w_q in steps.quantized_weights(self.net)
            for name in steps.places[first].runs
        ]
        net = self._moved(copy.deepcopy(self.net))
        with steps.quantized(net):
            measured = self._measure(net, self.images.test)
        return Trial(**measured, squared_error=model_error(errors, self.conditions.avg_in_layer))

    def quantized_weights(
        self, how: Quantization, trial: int = 0
    ) -> tuple[fx.GraphModule, list[QuantizedLayer]]:
        """Return a copy of the graph with quantized weights, and what became of each layer.

        With batch norms that were estimated again, if that is asked for.
        """
        corrects = self.conditions.output_correction is not None
        # bits of inputs matter to what makes up for them alone: biases, and rounding by blocks
        reads_inputs = corrects or (how.learns and self.conditions.by_blocks)
        key = how.scheme, how.n_bits, trial, how.act_bits if reads_inputs else None
        if self._weights[0] != key:
            graph, quantized = quantize_weights(
                self.graph,
                how.make_quantizer(trial),
                how.n_bits,
                layer_bits=self.weight_bits(how),
                round_up=self.round_up(how),
                **how.layer_options(),
            )
            graph = self.corrected(graph, how) if corrects else graph
            graph = self._recalibrated(graph) if self.images.recalibration else graph
            self._weights = key, (graph, quantized)
        return self._weights[1]

    def _recalibrated(self, graph_q: fx.GraphModule) -> fx.GraphModule:
        """Return a copy, on the CPU, whose batch norms were estimated again."""
        on_device = graph_q.to(self.conditions.device)
        images = batches(self.images.recalibration)
        return recalibrate_statistics(on_device, images).cpu()

    def corrected(self, graph_q: fx.GraphModule, how: Quantization) -> fx.GraphModule:
        """Return a copy, on the CPU, whose biases make up for the mean errors of its outputs."""
        where = self.conditions
        part = distributed.get_rank(), distributed.get_world_size()
        graph, graph_q = (self._moved(copy_graph(each)) for each in (self.graph, graph_q))
        images = partial(batches, self.images.calibration, *part)
        arguments = graph, graph_q, self.grids(how.act_bits), images
        if where.output_correction != "auto":
            return correct_outputs(*arguments, where.output_correction).cpu()
        corrected, divergences = correct_outputs_better(*arguments)
        self.divergences[how.scheme, how.n_bits, how.act_bits] = divergences
        return corrected.cpu()

    def round_up(self, how: Quantization) -> Mapping[str, Tensor]:
        """Return where weights are rounded up, by the name of their layer; none: to nearest.

        Layer by layer, inputs are not quantized while it is learned: one result serves them all.
        """
        if not how.learns:
            return NO_EXCEPTIONS
        by_blocks = self.conditions.by_blocks
        key = how.scheme, how.n_bits, how.act_bits if by_blocks else None
        if self._rounding[0] != key:
            bits = self.weight_bits(how)

            def quantized(name: str, round_up: Tensor | int | None) -> dict[str, Tensor]:
                graph, _ = self.with_one_layer(how, name, bits[name], round_up)
                tensors = layers(graph)[name].tensors
                return {kind: graph.get_buffer(each) for kind, each in tensors.items()}

            # by blocks, one process learns, from all images
            part = (0, 1) if by_blocks else (distributed.get_rank(), distributed.get_world_size())
            learn = learn_rounding
            if by_blocks:
                learn = partial(learn_block_rounding, self.grids(how.act_bits))
            learned = learn(
                self.graph,
                quantized,
                lambda: batches(self.images.rounding, *part),
                self.conditions.rounding_iterations,
                self.conditions.device,
            )
            self._rounding = key, learned
        return self._rounding[1]

    def integers(self, how: Quantization, trial: int = 0) -> IntegerNetwork:
        """Return the network in integer arithmetic, with biases on the int32 grid.

        Raises NetworkError for an operation that has no integer form, and ValueError, naming the
        layer, where quantized weights are on no uniform grid.
        """
        graph, quantized = self.quantized_weights(how, trial)
        parts = {layer.name: layer.parts for layer in quantized}
        return IntegerNetwork.from_graph(graph, self.grids(how.act_bits), parts)

    def check_integer_form(self, act_bits: int) -> None:
        """Raise NetworkError, naming it, where an operation has no integer form.

        Nothing is measured for that: the ranges of inputs do not matter to it.
        """
        inputs = acts.quantized_inputs(self.graph, self.conditions.sums)
        ranges = dict.fromkeys(inputs, (0.0, 1.0))
        grids = acts.activation_grids(ranges, act_bits, self.layer_bits(act_bits))
        IntegerNetwork.from_graph(self.graph, grids, {})

    def per_layer(self, quantizations: Sequence[Quantization], rows: list[Row]) -> None:
        """Quantize the weights of one layer at a time; add a row for each way and layer.

        `accuracy_change` is on test images. `loss_change` is measured on training images; beside it
        are the terms of its Taylor expansion there, see analysis/taylor.py: None until all rows are
        there, so that an interruption leaves those that were measured. Raises NetworkError, with
        all rows added, for a network that has no second derivative.
        """
        loss = self._measure(self.prepared(self.graph), self.images.expansion)["loss"]
        deltas = []
        for how in quantizations:
            for name in layers(self.graph):
                graph, quantized = self.with_one_layer(how, name, how.n_bits)
                names = layers(graph)[name].tensors.values()
                deltas.append({n: graph.get_buffer(n) - self.graph.get_buffer(n) for n in names})
                ready = self.prepared(graph)
                accuracy = self._measure(ready, self.images.test)["accuracy"]
                change = self._measure(ready, self.images.expansion)["loss"] - loss
                row = {"checkpoint": self.name, "scheme": how.scheme, "bits": how.n_bits}
                row |= {"layer": name, "accuracy_change": accuracy - self.unquantized.accuracy}
                row["squared_error"] = model_error([quantized], self.conditions.avg_in_layer)
                rows.append(row | {"loss_change": change} | dict.fromkeys(TaylorTerms._fields))
        graph = copy_graph(self.graph).to(self.conditions.device)
        with foreign_code(f"{self.name}: no terms of its loss, it cannot be differentiated twice"):
            terms = taylor_terms(graph, self.images.expansion, deltas, self.conditions.tick)
        for row, each in zip(rows[-len(terms) :], terms, strict=True):
            row |= each._asdict()


def batches(loader: Loader, start: int = 0, step: int = 1) -> Iterator[Tensor]:
    """Yield the loader's batches, every step-th from the start-th on, without labels."""
    return (x for x, _ in loader.batches(0, start, step))
