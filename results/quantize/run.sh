#!/usr/bin/env bash
# Real CIFAR-10: what quantization costs the control and the late L2Grad run of results/training.
# Run from the root of the repository, after results/training/run.sh; files are written to runs/quantize.
set -euo pipefail
python=${PYTHON:-python}

run() { # NAME FLAGS…
    mkdir -p "runs/quantize/$1"
    "$python" quant_inference.py runs/training/control_10.pt runs/training/l2grad_10.pt \
        --output "runs/quantize/$1" "${@:2}" 2>&1 | tee "runs/quantize/$1/run.log"
}

case ${1:-all} in
    all) for table in per_tensor per_channel activations; do "$0" $table; done ;;
    per_tensor) run per_tensor --bits 2 3 4 5 6 7 8 ;;
    per_channel) run per_channel --bits 2 3 4 5 6 7 8 --per_channel ;;
    activations) run activations --bits 8 6 4 --act_bits same --fold_bn --schemes uniform pwlq ;;
esac
