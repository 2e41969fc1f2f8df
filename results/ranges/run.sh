#!/usr/bin/env bash
# Ranges of activations and equalized channels of weights/control.pt at (4,4) and at 4 bits of weights,
# on the first 2,000 test images. Run from the root of the repository; files are written to runs/ranges.
set -euo pipefail
python=${PYTHON:-python}

quantize() { # NAME FLAGS…
    "$python" quant_inference.py weights/control.pt --fold_bn --bits 4 --schemes uniform --test_subset 2000 \
        --no_plots --data_dir "${DATA_DIR:-./data}" --output "runs/ranges/$1" "${@:2}"
}

for equalize in "" --equalize; do
    quantize "weights$equalize" $equalize
    for rule in topk_median percentile mse; do
        quantize "$rule$equalize" --act_bits same --calibration "$rule" $equalize
    done
done
