#!/usr/bin/env bash
# Integer models of the stronger quantizers: the control at (4,4), verified on all test images. As run.sh:
# from the root of the repository, about two minutes a case; finished cases are skipped.
set -euo pipefail
python=${PYTHON:-python}
folder=runs/deploy_quantizers/control

verify() { # CASE FLAGS…
    mkdir -p "$folder"
    [ -f "$folder/w4a4_$1.verified.json" ] && return
    "$python" quant_inference.py weights/control.pt --bits 4 --act_bits 4 --fold_bn --no_plots --device cpu \
        --export "$folder/w4a4_$1.onnx" --verify --output "$folder" "${@:2}"
}

verify adaround --schemes uniform --calibration mse --equalize --rounding adaround
verify adaround_per_channel --schemes uniform --calibration mse --per_channel --rounding adaround
verify clip --schemes clip --calibration mse
verify equalize --schemes uniform --calibration percentile --equalize
verify clip_per_channel --schemes clip --calibration mse --per_channel
verify adaround_clip --schemes clip --calibration mse --equalize --rounding adaround
"$python" benchmarks/deploy_table.py runs/deploy_quantizers --output results/deploy/quantizers
