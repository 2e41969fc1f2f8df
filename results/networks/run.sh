#!/usr/bin/env bash
# Real CIFAR-10 with networks other than ConvNet: ResNet20 for 20 epochs, then quantized; an epoch with
# L2Grad of VGGSmall, and one of 6,400 images of MobileNetV2. Run from the root of the repository; files
# are written to runs/networks. Finished runs are skipped, others resume.
set -euo pipefail
out=runs/networks
mkdir -p "$out"
python=${PYTHON:-python}

run() { # NAME FLAGS…
    [ -f "$out/$1.pt" ] && return
    "$python" train.py --run_name "$1" --save_file "$out/$1" --resume "${@:2}" 2>&1 | tee -a "$out/$1.log"
}

quantize() { # NAME FLAGS…
    [ -f "$out/$1/results.json" ] && return
    "$python" quant_inference.py "$out/resnet20.pt" --fold_bn --no_plots --output "$out/$1" "${@:2}"
}

run resnet20 --model ResNet20 --n_epochs 20 --lr 0.1 --weight_decay 1e-4 --scheduler cosine
quantize weights --bits 8 6 4 3
quantize weights_per_channel --bits 8 6 4 3 --per_channel
both=(--bits 8 4 --act_bits same --schemes uniform)
quantize activations "${both[@]}"
quantize sums "${both[@]}" --quantize_sums
quantize sums_keep_first_last "${both[@]}" --quantize_sums --keep_first_last
quantize sums_per_channel "${both[@]}" --quantize_sums --per_channel

l2grad=(--n_epochs 1 --regularizer L2Grad --lmbda 0.01 --weight_decay 5e-4 --no_test_penalty)
run vggsmall_l2grad --model VGGSmall --width 0.5 --lr 0.01 "${l2grad[@]}"
run mobilenetv2_l2grad --model MobileNetV2 --lr 0.1 --train_subset 6400 "${l2grad[@]}"

"$python" - "$out" <<'PY'
"""Gather the records of all runs into one file, a line each: {"path": …, "content": …}."""
import json, pathlib, sys

from analysis.study.records import pack_records

folder = pathlib.Path(sys.argv[1])
paths = [*folder.glob("*.json"), *folder.glob("*/results.json")]
records = {path.relative_to(folder).as_posix(): json.loads(path.read_text()) for path in paths}
pathlib.Path("results/networks/records.jsonl.gz").write_bytes(pack_records(records))
PY
