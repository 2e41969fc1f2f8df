"""The grid of a study: its variants, how their networks are quantized, and how they are trained.

study.py has one of its own; others are TOML files, see `analysis.study.grid_file`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

CONTROL = "control"  # the variant that others are compared with
TUNING = "tuning"  # the quantization that λ is chosen by, on held-out images
TRUNK = "trunk"  # the training that all variants of a seed have in common


@dataclass(frozen=True)
class Variant:
    """What is done in the last third of a run.

    In `flags`, {first}, {late} and {last} are epochs (see `epoch_names`), and {lmbda} is λ.
    """

    flags: str  # of train.py or, if they contain --phases, of combined_protocol.py
    lmbdas: tuple[float, ...] = ()  # candidates; () where the flags say it all
    cost: float = 1.0  # of an epoch, in epochs of the control: for estimates before the first one
    lambda_from: str = ""  # the variant whose λ and cost this one takes over


@dataclass(frozen=True)
class Quantization:
    """One call of quant_inference.py on every trained network."""

    flags: str
    seconds: float  # estimated, until one is measured
    names: Mapping[str, str] = field(default_factory=dict)  # of schemes in tables, if not their own
    full_precision: bool = False  # whether its float32 row is the one in the tables


@dataclass(frozen=True)
class Grid:
    """All that a study runs for each network and seed."""

    training: str  # flags of every training, with {first} and so on
    variants: Mapping[str, Variant]
    quantizations: Mapping[str, Quantization]
    tuning: Mapping[str, str] = field(default_factory=dict)  # flags of TUNING, by network
    note: str = ""  # what the quantizations are, under the tables


def lambda_text(lmbda: float) -> str:
    """Return λ as flags, files and tables have it: with all its digits, and no more."""
    short = f"{lmbda:g}"
    return short if float(short) == lmbda else repr(lmbda)


def training_name(variant: str, lmbda: float | None) -> str:
    """Return what the files of a variant's training are called, λ among it where it is chosen."""
    return variant if lmbda is None else f"{variant}_{lambda_text(lmbda)}"


def quantized_name(training: str, quantization: str) -> str:
    """Return what the folder of a quantization of such a training is called."""
    return f"{training}_{quantization}"


def choice_name(variant: str) -> str:
    """Return what the file of the choice of a variant's λ is called."""
    return f"{variant}_choice"
