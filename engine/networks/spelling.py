"""Ways to write an operation made one: graphs of torch.export as the rest of the engine reads them.

Each function changes a graph in place, whose nodes have the `meta` that `engine/networks/graph.py`
describes.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import fx

from engine.networks.graph import BATCH, KINDS, aten, read_tensor
from engine.system.errors import NetworkError


def constants(module: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes whose values depend on neither images nor random numbers."""
    constant: set[fx.Node] = set()
    for node in module.graph.nodes:
        is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        is_value = node.op in ("get_attr", "call_function") and not is_random
        if is_value and all(source in constant for source in node.all_input_nodes):
            constant.add(node)
    return constant


def inline_regions(module: fx.GraphModule) -> None:
    """Put what runs inside a region, such as one without autocast, in the region's place."""
    for node in [*module.graph.nodes]:
        if not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        # settings such as a dtype, the graph of the region, its inputs
        start = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node))
        if node.args[start].op != "get_attr":  # a branch or a loop
            raise NetworkError(f"{node.target.name()} is no operation that can be quantized")
        inner = getattr(module, node.args[start].target).graph
        sources = inner.find_nodes(op="placeholder")
        values = dict(zip(sources, node.args[start + 1 :], strict=True))
        with module.graph.inserting_before(node):
            results = module.graph.graph_copy(inner, values)
        for user in [*node.users]:  # each takes one of the results
            user.replace_all_uses_with(results[user.args[1]])
            module.graph.erase_node(user)
        module.graph.erase_node(node)


def spell_one_way(module: fx.GraphModule) -> None:
    """Write each batch norm, squeezing, view and product with a constant in one form.

    A view becomes a reshape, which copies where strides need it: the network was traced in one
    memory layout, and may run in another. A product with a constant becomes a layer, and a linear
    map whose matrix depends on the images a matrix product.
    """
    constant = constants(module)
    for node in [*module.graph.nodes]:
        match node.target, node.args:
            case (aten._native_batch_norm_legit_no_training.default, _):
                x, gamma, beta, mean, var, momentum, eps = node.args
                arguments = (x, gamma, beta, mean, var, False, momentum, eps, False)
                [result] = node.users
                _replace(module, result, aten.batch_norm.default, arguments)
            case (aten._assert_tensor_metadata.default, _):  # of the precision it was exported in
                module.graph.erase_node(node)
            case (aten.squeeze.default, (x,)):  # which would squeeze a batch of one image as well
                shape = x.meta["shape"]
                ones = [i for i, n in enumerate(shape) if i and n == 1]
                _replace(module, node, aten.squeeze.dims, (x, ones))
            case (aten.view.default | aten.reshape.default, (x, shape)):
                # len(x) is the number of images that were exported; -1 is any
                (n, *before) = x.meta["shape"]
                (n_after, *after) = node.meta["shape"]
                if n == n_after == BATCH and math.prod(before) == math.prod(after):
                    shape = [-1, *after]
                new = _replace(module, node, aten.reshape.default, (x, shape))
                constant |= {new} if node in constant else set()
            case (target, (a, b)) if KINDS.get(target) == "matmul" and node not in constant:
                is_of_matrices = min(len(each.meta["shape"]) for each in (a, b)) > 1
                if b in constant:
                    _to_layer(module, node, a, b)
                elif a in constant and is_of_matrices:  # a b = (bᵀ aᵀ)ᵀ
                    x, w = _transposed(module, node, b), _transposed(module, node, a)
                    shape = _swapped(node.meta["shape"])
                    product = _insert(module, node, node.target, (x, w), shape)
                    _replace(module, node, aten.transpose.int, (product, -2, -1))
                    _to_layer(module, product, x, w)
            case (aten.addmm.default, (bias, x, w)) if w in constant and not node.kwargs:
                w = _transposed(module, node, w)
                _replace(module, node, aten.linear.default, (x, w, bias))
            case (aten.linear.default, (x, w, *bias)) if w not in constant:
                product = aten.matmul.default, (x, _transposed(module, node, w))
                if any(bias):
                    product = _insert(module, node, *product, node.meta["shape"])
                    product = aten.add.Tensor, (product, *bias)
                _replace(module, node, *product)


def _to_layer(module: fx.GraphModule, node: fx.Node, x: fx.Node, w: fx.Node) -> None:
    """Replace the product x w with a constant by a layer, where one computes it.

    It is linear(x, wᵀ) for one matrix w (k, n). For g of them, (g, k, n), in a batched product with
    x (g, m, k), it is a convolution of g groups with m images of one pixel.
    """
    insert = partial(_insert, module, node)
    *before, k, n = (1, *w.meta["shape"])
    is_one_matrix = math.prod(before) == 1 and len(before) < len(x.meta["shape"])
    if len(before) == 1 or (before and is_one_matrix):
        w = insert(aten.reshape.default, (w, (k, n)), (k, n))
        _replace(module, node, aten.linear.default, (x, _transposed(module, node, w)))
    elif node.target is aten.bmm.default:
        g, m, _ = x.meta["shape"]
        images = insert(aten.permute.default, (x, (1, 0, 2)), (m, g, k))
        images = insert(aten.reshape.default, (images, (-1, g * k, 1)), (m, g * k, 1))
        kernels = _transposed(module, node, w)  # (g, n, k)
        kernels = insert(aten.reshape.default, (kernels, (g * n, k, 1)), (g * n, k, 1))
        arguments = (images, kernels, None, [1], [0], [1], g)
        y = insert(aten.conv1d.default, arguments, (m, g * n, 1))
        y = insert(aten.reshape.default, (y, (-1, g, n)), (m, g, n))
        _replace(module, node, aten.permute.default, (y, (1, 0, 2)))


def _transposed(module: fx.GraphModule, before: fx.Node, x: fx.Node) -> fx.Node:
    """Add x with its last two dimensions exchanged before a node."""
    return _insert(module, before, aten.transpose.int, (x, -2, -1), _swapped(x.meta["shape"]))


def _swapped(shape: Sequence[int]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


def split_attention(module: fx.GraphModule) -> None:
    """Write scaled dot-product attention softmax(q kᵀ·scale + mask) v as these operations."""
    for node in [*module.graph.nodes]:
        if node.target is not aten.scaled_dot_product_attention.default:
            continue
        query, key, value, mask, dropout, is_causal = (*node.args, None, 0.0, False)[:6]
        if dropout or node.kwargs.get("enable_gqa"):
            continue  # and `export_network` refuses it
        q_shape = query.meta["shape"]
        k_shape = key.meta["shape"]
        scale = node.kwargs.get("scale") or q_shape[-1] ** -0.5
        shape = (*q_shape[:-1], k_shape[-2])
        k_t = _transposed(module, node, key)
        scores = _insert(module, node, aten.matmul.default, (query, k_t), shape)
        scores = _insert(module, node, aten.mul.Tensor, (scores, scale), shape)
        if is_causal:
            with module.graph.inserting_before(node):
                lower = torch.ones(shape[-2:], dtype=torch.bool).tril()
                mask = read_tensor(module, f"{node.name}.mask", lower)
        if mask is not None and mask.meta["is_bool"]:
            out = _insert(module, node, aten.logical_not.default, (mask,), mask.meta["shape"])
            masked = (scores, out, -math.inf)
            scores = _insert(module, node, aten.masked_fill.Scalar, masked, shape)
        elif mask is not None:
            scores = _insert(module, node, aten.add.Tensor, (scores, mask), shape)
        weights = _insert(module, node, aten.softmax.int, (scores, -1), shape)
        _replace(module, node, aten.matmul.default, (weights, value))


def _insert(
    module: fx.GraphModule, before: fx.Node, target: Callable, args: tuple, shape: Sequence[int]
) -> fx.Node:
    """Add an operation of the same module before a node."""
    with module.graph.inserting_before(before):
        node = module.graph.call_function(target, args)
    node.meta = {**before.meta, "shape": tuple(shape)}
    return node


def _replace(module: fx.GraphModule, node: fx.Node, target: Callable, args: tuple) -> fx.Node:
    new = _insert(module, node, target, args, node.meta["shape"])
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)
    return new
