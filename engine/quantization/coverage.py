"""How much of a network is quantized, and what stays in floating point.

Two shares are told with every result: that of the multiply-adds of convolutions, linear maps and
matrix products, and that of the learned numbers of at least two dimensions (weights, embeddings,
scales of channels; not biases and batch norms).
"""

import math
from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

from torch import fx

from engine.networks.graph import Operation, operations

MAX_NAMES = 4  # of layers, in a line
AS_INPUT = "its weight is an input of the product, which --act_bits quantizes"
NO_WEIGHT = "no weight in this product: --act_bits quantizes its inputs"
MOVES = set("expand view reshape permute transpose unsqueeze slice clone".split())


class Coverage(NamedTuple):
    """Shares from 0 to 1, and why each thing that stays in float does, by its name."""

    multiply_adds: float
    weights: float
    in_float: dict[str, str]

    def __str__(self) -> str:
        """Return a line: shares, and what stays in float and why."""
        shares = (
            f"quantized: {self.multiply_adds:.1%} of multiply-adds, {self.weights:.1%} of weights"
        )
        left = [f"{first_names(each)} ({why})" for why, each in by_reason(self.in_float).items()]
        return shares + (f"; in float: {'; '.join(left)}" if left else "")


def by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the names that have each reason."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return names


def first_names(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def coverage(
    graph: fx.GraphModule, inputs: Container[str] | None, weights: Container[str] | None = None
) -> Coverage:
    """Return what of an exported network is quantized: weights of layers, and the named inputs.

    `inputs` is None where inputs stay in float on purpose: then only weights count. `weights` are
    the layers whose weights are quantized; None: all.
    """
    in_float: dict[str, str] = {}
    covered: set[fx.Node] = set()  # what is quantized, weights and inputs
    left: set[fx.Node] = set()  # weights of layers that are not
    as_inputs: set[fx.Node] = set()  # what was learned and is an input of a product
    products = all_products = covered_weights = all_weights = 0
    for operation in operations(graph):
        n = operation.multiply_adds()
        sources = {name: _unmoved(operation.source(name)) for name in operation.inputs}
        factors = {each for each in sources.values() if each.meta.get("learned")}
        as_inputs |= factors if operation.is_product else set()
        is_left = operation.is_layer and weights is not None and operation.name not in weights
        reason = _reason(operation, inputs, bool(factors))
        reason = "its weight is not quantized" if is_left else reason
        all_products += n
        products += 0 if reason else n
        if reason and n:
            in_float[operation.name] = reason
        if operation.is_layer:
            (left if is_left else covered).add(operation.node.args[1])
        covered |= {source for name, source in sources.items() if name in (inputs or ())}
    for node in graph.graph.nodes:
        is_weight = node in covered | left and node.op == "get_attr"
        learned = node.meta.get("learned")
        if not is_weight and not (learned and len(node.meta["shape"]) > 1):
            continue
        n = math.prod(node.meta["shape"])
        all_weights += n
        covered_weights += n if node in covered else 0
        if node not in covered | left:
            reader = next(iter(node.users)).name.rstrip("_0123456789")
            reason = AS_INPUT if node in as_inputs else f"read by {reader}, by no product"
            in_float[", ".join(learned)] = reason
    shares = products / max(all_products, 1), covered_weights / max(all_weights, 1)
    return Coverage(*shares, in_float)


def _unmoved(node: fx.Node) -> fx.Node:
    """Return the node whose numbers these are, such as a token that was expanded."""
    while getattr(node.target, "_opname", "") in MOVES:
        node = node.args[0]
    return node


def _reason(operation: Operation, inputs: Container[str] | None, has_weight: bool) -> str | None:
    """Return why a product is not one of quantized numbers; None where it is."""
    if inputs is None:
        if operation.is_layer:
            return None
        return AS_INPUT if has_weight else NO_WEIGHT
    missing = [name for name in operation.inputs if name not in inputs]
    return f"its input {missing[0]} is not quantized" if missing else None
