#!/usr/bin/env bash
# torchao: weights of 1 bit are all 0, without a word, and with more bits each channel's largest weight is a tie.
#
# One would guess: IntxWeightOnlyConfig(weight_dtype=torch.int1) is refused or keeps something like the signs, and a symmetric
# grid of a few bits ends where the weights end.
# What happens: the scale of a grid from −2^(b−1) to 2^(b−1) − 1 is max|w| / (2^(b−1) − 1/2). With 1 bit that is 2·max|w|: no quotient is
# below −1/2, halves go to the even code, and every weight becomes 0; the layer answers 0 to all inputs. With more bits
# the largest weight of every channel is a half, which rounding errors decide: with 2 bits a largest weight of −1 becomes −4/3 in some
# channels and −2/3 in others, and one of +1 becomes 2/3. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.14.1 torchao==0.18.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - 2>warnings.log <<'PYTHON' || { cat warnings.log >&2; exit 1; }
import torch
import torchao
from torch import nn
from torchao.quantization import IntxWeightOnlyConfig, quantize_

print("torch", torch.__version__, "torchao", torchao.__version__)
torch.manual_seed(0)
weight = torch.randn(16, 4096)
weight[:, 0] = -weight.abs().amax(1)  # each channel's largest weight, once with either sign
weight[:, 1] = -weight[:, 0]
for n_bits in (1, 2, 3, 4, 8):
    layer = nn.Linear(4096, 16, bias=False)
    layer.weight.data.copy_(weight)
    quantize_(layer, IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{n_bits}")))
    codes = layer.weight.qdata
    ends = layer.weight.dequantize()[:, :2] / weight[:, 1:2]
    ends = {f"{end:+.3f}" for end in ends.flatten().tolist()}
    print(
        f"{n_bits} bits: codes {codes.min()} to {codes.max()}, {len(codes.unique())} of them; a channel's "
        f"largest weights, −1 and +1, become {', '.join(sorted(ends))}"
    )
    half_range = 2 ** (n_bits - 1) - 0.5
    if n_bits == 1:
        assert not codes.any() and not layer(torch.randn(8, 4096)).any(), "1 bit keeps something now"
    elif n_bits < 8:
        neighbours = [-half_range - 0.5, -half_range + 0.5, half_range - 0.5]  # +half_range + 1/2 is no code
        assert ends == {f"{code / half_range:+.3f}" for code in neighbours}, "the ends are others now"
PYTHON
echo "as described"
