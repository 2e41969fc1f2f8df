#!/usr/bin/env bash
# Every quantizer on every network, on the first 2,000 test images: weights alone at 4, 3 and 2 bits, and
# 4-bit weights and activations. The networks are those of weights/ and of train.sh, or those named:
# `bash results/quantizers/run.sh weights/control.pt`. Run from the root of the repository; files are
# written to runs/quantizers. What is there already is skipped. One thread, so two can run side by side.
set -euo pipefail
export OMP_NUM_THREADS=1
out=runs/quantizers

quantize() { # CASE FLAGS…: the network is $file, the folder $out/NETWORK/CASE
    local folder=$out/$(basename "$file" .pt)/$1
    [ -f "$folder/seconds.json" ] && return
    SECONDS=0
    "${PYTHON:-python}" quant_inference.py "$file" --test_subset 2000 --no_plots --output "$folder" "${@:2}"
    echo "$SECONDS" > "$folder/seconds.json"
}

alone=(--bits 4 3 2)
both=(--bits 4 --act_bits 4 --fold_bn)
quantize_file() { # FILE
    file=$1
    quantize uniform "${alone[@]}" --schemes uniform
    quantize pwlq "${alone[@]}" --schemes pwlq
    quantize clip "${alone[@]}" --schemes clip
    quantize equalize "${alone[@]}" --schemes uniform --fold_bn --equalize
    quantize adaround "${alone[@]}" --schemes uniform --rounding adaround
    quantize uniform_a4 "${both[@]}" --schemes uniform
    quantize pwlq_a4 "${both[@]}" --schemes pwlq
    quantize clip_a4 "${both[@]}" --schemes clip --calibration mse
    quantize equalize_a4 "${both[@]}" --schemes uniform --calibration percentile --equalize
    quantize adaround_a4 "${both[@]}" --schemes uniform --calibration mse --equalize --rounding adaround
    local record=${file%.pt}.json
    if grep -q learned_steps "$record" 2> /dev/null; then
        quantize lsq_a4 --bits 4 --act_bits 4 --schemes uniform --steps_from "$record"
    fi
}

[ $# -gt 0 ] || set -- weights/*.pt "$out"/*.pt
for path in "$@"; do
    [ "$path" = "$out/trunk.pt" ] || quantize_file "$path"
done
