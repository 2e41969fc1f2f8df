"""How many bits a quantized number may have."""

MIN_BITS, MAX_BITS = 2, 16


def parse_bits(text: str) -> int:
    """Return the number of bits that the text says; ValueError where it says none."""
    if not text.isdecimal():
        raise ValueError(f"{text!r} is not a whole number")
    n_bits = int(text)
    check_bits(n_bits)
    return n_bits


def check_bits(n_bits: float) -> None:
    """Raise ValueError unless n_bits is a whole number from 2 to 16."""
    if not MIN_BITS <= n_bits <= MAX_BITS or n_bits != int(n_bits):
        raise ValueError(f"{n_bits} bits: choose {MIN_BITS} to {MAX_BITS}")
