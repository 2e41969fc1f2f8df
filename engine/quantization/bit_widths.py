"""How many bits a quantized number may have."""

import argparse

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


def bit_widths(text: str) -> list[int]:
    """Return the bit-widths that a number or a range such as "4-8" means: an argparse type."""
    try:
        bounds = [parse_bits(number) for number in text.split("-", 1)]
        if bounds != sorted(bounds):
            raise ValueError("the first is above the last")
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number from 2 to 16, or a range of them such as 4-8"
        ) from error
    return list(range(bounds[0], bounds[-1] + 1))


def act_bit_widths_or_same(text: str) -> list[int | str]:
    """Return bit-widths, or "same": an argparse type."""
    if text.lower() == "same":
        return ["same"]
    try:
        return bit_widths(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f'{error}, or "same"') from error
