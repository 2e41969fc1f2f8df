"""Quantizing the graph of a network: grids, weights, inputs, and what repairs the result."""
