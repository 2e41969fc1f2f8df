"""Rewrites a graph of torch.export so that each operation appears in one form only.

Each function changes a graph in place, whose nodes have the `meta` that `engine/networks/graph.py`
describes.
"""

import math
import operator
from collections.abc import Callable, Sequence

import torch
from torch import fx

from engine.networks.graph import BATCH, KINDS, aten, read_tensor
from engine.system.errors import NetworkError

Shape = Sequence[int]


def constants(module: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes whose values depend on neither images nor random numbers."""
    constant: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "get_attr" or _is_constant(node, constant):
            constant.add(node)
    return constant


def _is_constant(node: fx.Node, constant: set[fx.Node]) -> bool:
    """Tell whether an operation takes constants only, and draws nothing."""
    is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    sources = node.all_input_nodes
    return node.op == "call_function" and not is_random and all(s in constant for s in sources)


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


def follow_batch(module: fx.GraphModule) -> None:
    """Replace sizes that count the images of the export, as len(x) does, by those of any batch."""
    [images] = module.graph.find_nodes(op="placeholder")
    with module.graph.inserting_after(images):
        n_images = module.graph.call_function(aten.sym_size.int, (images, 0))
    n_images.meta = {**images.meta, "shape": ()}
    for node in [*module.graph.nodes]:

        def followed(size: fx.node.Argument, node: fx.Node = node) -> fx.node.Argument:
            if type(size) is not int or size <= 0 or size % BATCH:
                return size
            if size == BATCH:
                return n_images
            with module.graph.inserting_before(node):
                product = module.graph.call_function(operator.mul, (n_images, size // BATCH))
            product.meta = {**n_images.meta}
            return product

        node.args = fx.node.map_aggregate(node.args, followed)


def normalize_operations(module: fx.GraphModule) -> None:
    """Write each batch norm, squeezing, view and product with a constant in one form.

    A view becomes a reshape, which copies where strides need it: the network was traced in one
    memory layout, and may run in another. A product with a constant becomes a layer, and a linear
    map whose matrix depends on the images a matrix product.
    """
    graph = _Rewriting(module)
    for node in [*module.graph.nodes]:
        match node.target, node.args:
            case (aten._native_batch_norm_legit_no_training.default, _):
                x, gamma, beta, mean, var, momentum, eps = node.args
                arguments = (x, gamma, beta, mean, var, False, momentum, eps, False)
                [result] = node.users
                graph.replace(result, aten.batch_norm.default, arguments)
            case (aten._assert_tensor_metadata.default, _):  # of the precision it was exported in
                module.graph.erase_node(node)
            case (aten.squeeze.default, (x,)) if x not in graph.constant:
                # which would squeeze a batch of one image as well
                shape = x.meta["shape"]
                ones = [i for i, n in enumerate(shape) if i and n == 1]
                graph.replace(node, aten.squeeze.dims, (x, ones))
            case (aten.view.default | aten.reshape.default, (x, shape)):
                before, after = x.meta["shape"], node.meta["shape"]
                if before[:1] == after[:1] == (BATCH,):
                    shape = [-1, *after[1:]]  # which reads nothing of the images beside x
                graph.replace(node, aten.reshape.default, (x, shape))
            case (aten.addmm.default, (bias, x, w)) if not node.kwargs:
                if w in graph.constant and bias in graph.constant and len(bias.meta["shape"]) == 1:
                    w = graph.transposed(node, w)
                    graph.replace(node, aten.linear.default, (x, w, bias))
                else:
                    product = graph.insert(node, aten.mm.default, (x, w), node.meta["shape"])
                    graph.replace(node, aten.add.Tensor, (product, bias))
                    graph.to_layer(product)
            case (aten.linear.default, (x, w, *bias)) if w not in graph.constant:
                if len(w.meta["shape"]) == 2:
                    product = aten.matmul.default, (x, graph.transposed(node, w))
                    if any(bias):
                        product = graph.insert(node, *product, node.meta["shape"])
                        product = aten.add.Tensor, (product, *bias)
                    graph.replace(node, *product)
            case (target, _) if KINDS.get(target) == "matmul" and node not in graph.constant:
                graph.to_layer(node)


class _Rewriting:
    """A graph whose operations are replaced by others; `constant` are its `constants`."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.graph = module.graph
        self.constant = constants(module)

    def insert(self, before: fx.Node, target: Callable, args: tuple, shape: Shape) -> fx.Node:
        """Add an operation of the same module before a node."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args)
        node.meta = {**before.meta, "shape": tuple(shape)}
        if _is_constant(node, self.constant):
            self.constant.add(node)
        return node

    def replace(self, node: fx.Node, target: Callable, args: tuple) -> fx.Node:
        """Put an operation in the place of a node."""
        new = self.insert(node, target, args, node.meta["shape"])
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        return new

    def transposed(self, before: fx.Node, x: fx.Node) -> fx.Node:
        """Add x with its last two dimensions exchanged before a node."""
        return self.insert(before, aten.transpose.int, (x, -2, -1), _swapped(x.meta["shape"]))

    def to_layer(self, product: fx.Node) -> None:
        """Replace a matrix product by a layer, where one factor is a constant that one can have."""
        a, b = product.args
        if b in self.constant:
            self._to_layer(product, a, b)
        elif a in self.constant and min(len(each.meta["shape"]) for each in (a, b)) > 1:
            x, w = (self.transposed(product, each) for each in (b, a))  # a b = (bᵀ aᵀ)ᵀ
            shape = _swapped(product.meta["shape"])
            new = self.insert(product, product.target, (x, w), shape)
            self.replace(product, aten.transpose.int, (new, -2, -1))
            self._to_layer(new, x, w)

    def _to_layer(self, product: fx.Node, x: fx.Node, w: fx.Node) -> None:
        """Replace the product x w with a constant by a layer, where one computes it.

        It is linear(x, wᵀ) for one matrix w (k, n). For g of them, (g, k, n), each with vectors
        (m, k) of its own in x (g, m, k), it is a convolution of g groups with m images of a pixel.
        """
        x_shape = x.meta["shape"]
        *before, k, n = (1, *w.meta["shape"])
        is_one_matrix = math.prod(before) == 1 and len(before) < len(x_shape)
        if len(before) == 1 or (before and is_one_matrix):
            w = self.insert(product, aten.reshape.default, (w, (k, n)), (k, n))
            self.replace(product, aten.linear.default, (x, self.transposed(product, w)))
        elif len(x_shape) == len(w.meta["shape"]) == 3 and x_shape[0] == before[-1]:
            g, m, _ = x_shape
            images = self.insert(product, aten.permute.default, (x, (1, 0, 2)), (m, g, k))
            shape = (m, g * k, 1)
            images = self.insert(product, aten.reshape.default, (images, (-1, g * k, 1)), shape)
            kernels = self.transposed(product, w)  # (g, n, k)
            shape = (g * n, k, 1)
            kernels = self.insert(product, aten.reshape.default, (kernels, shape), shape)
            arguments = (images, kernels, None, [1], [0], [1], g)
            y = self.insert(product, aten.conv1d.default, arguments, (m, g * n, 1))
            y = self.insert(product, aten.reshape.default, (y, (-1, g, n)), (m, g, n))
            self.replace(product, aten.permute.default, (y, (1, 0, 2)))


def _swapped(shape: Shape) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


def split_attention(module: fx.GraphModule) -> None:
    """Write scaled dot-product attention softmax(q kᵀ·scale + mask) v as these operations."""
    graph = _Rewriting(module)
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
        k_t = graph.transposed(node, key)
        scores = graph.insert(node, aten.matmul.default, (query, k_t), shape)
        scores = graph.insert(node, aten.mul.Tensor, (scores, scale), shape)
        if is_causal:
            with module.graph.inserting_before(node):
                lower = torch.ones(shape[-2:], dtype=torch.bool).tril()
                mask = read_tensor(module, f"{node.name}.mask", lower)
        if mask is not None and mask.meta["is_bool"]:
            out = graph.insert(node, aten.logical_not.default, (mask,), mask.meta["shape"])
            masked = (scores, out, -math.inf)
            scores = graph.insert(node, aten.masked_fill.Scalar, masked, shape)
        elif mask is not None:
            scores = graph.insert(node, aten.add.Tensor, (scores, mask), shape)
        weights = graph.insert(node, aten.softmax.int, (scores, -1), shape)
        graph.replace(node, aten.matmul.default, (weights, value))
