"""How many bits a quantized number may have."""

MIN_BITS, MAX_BITS = 2, 16


def check_bits(n_bits: float) -> None:
    """Raise ValueError unless n_bits is a whole number from 2 to 16."""
    if not MIN_BITS <= n_bits <= MAX_BITS or n_bits != int(n_bits):
        raise ValueError(f"{n_bits} bits: choose {MIN_BITS} to {MAX_BITS}")
