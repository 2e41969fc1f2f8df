"""How far the largest weight of each layer stands out, and what uniform quantization loses by it.

Prints, for each layer of each .pt file, m/σ (m = max|W|, σ = std(W)) and the relative squared
error Σ(w_q − w)² / Σw² of uniform quantization to --bits, per tensor. Both are blind to the scale
of W, as a layer before a batch norm is. The last line of a file is the geometric mean over layers.
"""

import statistics
from pathlib import Path

import _root  # noqa: F401

import quant_utils as qu
from engine.networks.export import export_network
from engine.networks.folding import fold_batch_norms
from engine.networks.graph import weights
from engine.system import cli
from engine.system.errors import FileError
from engine.system.io import load_weights
from models import MODELS


def main() -> None:
    """Print the table."""
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_argument("weights", nargs="+", type=Path, metavar="FILE", help=".pt files")
    bits = cli.bounded_number(int, at_least=2, below=17)
    parser.add_argument("--bits", type=bits, default=4, help="of a weight: 2 to 16")
    cli.add_choice(parser, "--model", MODELS, "ConvNet", "network that the files are of")
    parser.add_argument("--fold_bn", action="store_true", help="with batch norms folded in")
    args = parser.parse_args()
    for path in args.weights:
        net = MODELS[args.model]()
        try:
            load_weights(net, path)
            graph = export_network(net, (3, 32, 32))
            graph = fold_batch_norms(graph) if args.fold_bn else graph
        except (FileError, OSError, ValueError) as error:
            parser.exit_with(1, f"error: {error}")
        print(f"{path}: layer, m/σ, relative squared error at {args.bits} bits")
        rows = []
        for name, w in weights(graph).items():
            error = (qu.uniform(w, args.bits) - w).square().sum() / w.square().sum()
            rows.append(((w.abs().max() / w.std()).item(), error.item()))
            print(f"{name:12}  {rows[-1][0]:6.2f}  {rows[-1][1]:.5f}")
        m, error = map(statistics.geometric_mean, zip(*rows, strict=True))
        print(f"{'mean':12}  {m:6.2f}  {error:.5f}")


if __name__ == "__main__":
    main()
