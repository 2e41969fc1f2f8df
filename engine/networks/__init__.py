"""What a network is made of: fast layers, its activations, its graph, folding."""
