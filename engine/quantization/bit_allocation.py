"""Mixed precision: how many bits the weights of each layer get within a budget."""

from collections.abc import Mapping

import numpy as np

BIT_CHOICES = (2, 3, 4, 5, 6, 8)  # bits that a layer may get


def allocate_bits(
    costs: Mapping[str, Mapping[int, float]], n_weights: Mapping[str, int], mean_bits: float
) -> dict[str, int]:
    """Return the bits of each layer, by name, of least Σ costs[layer][bits], exactly.

    `costs` are finite numbers for each choice of bits, and the mean number of bits per weight,
    Σ n_weights·bits / Σ n_weights, is at most `mean_bits`. It is a knapsack problem, solved as an
    integer program. Raises ValueError where the fewest bits are more than that.
    """
    # Every script reads BIT_CHOICES, and the solver takes half a second to import.
    from scipy.optimize import Bounds, LinearConstraint, milp

    choices = [(name, bits) for name, of_layer in costs.items() for bits in of_layer]
    of_layer = np.array([[name == layer for name, _ in choices] for layer in costs], dtype=float)
    used = np.array([n_weights[name] * bits for name, bits in choices], dtype=float)
    most = np.floor(mean_bits * sum(n_weights[name] for name in costs))
    of_choice = np.array([costs[name][bits] for name, bits in choices], dtype=float)
    # the solver stops within 1e-6 of the least sum, so the largest cost becomes 1e6
    of_choice = of_choice / (np.abs(of_choice).max() or 1.0) * 1e6
    solution = milp(
        of_choice,
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(of_layer, 1, 1), LinearConstraint(used[None], ub=most)],
        options={"mip_rel_gap": 0},
    )
    if not solution.success:
        raise ValueError(f"no choice of bits has a mean of {mean_bits:g}: {solution.message}")
    return dict(choice for choice, x in zip(choices, solution.x, strict=True) if x > 0.5)
