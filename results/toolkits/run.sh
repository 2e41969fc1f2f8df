#!/usr/bin/env bash
# weights/control.pt with each step size of `uniform`, with `clip`, with biases corrected for the outputs'
# mean errors, and with bits for each layer, on the first 2,000 test images. Run from the root of the repository;
# files are written to runs/toolkits, and `python results/toolkits/table.py` makes table.md of records.jsonl.gz.
set -euo pipefail
python=${PYTHON:-python}

quantize() { # NAME FLAGS…
    "$python" quant_inference.py weights/control.pt --fold_bn --test_subset 2000 --calibration_images 512 \
        --no_plots --data_dir "${DATA_DIR:-./data}" --output "runs/toolkits/$1" "${@:2}"
}

for correction in "" --output_bias_correction; do
    for step in half full auto; do
        schemes="uniform clip"
        [ "$step" = half ] || schemes=uniform # clip has no step size
        how="--step_size $step --schemes $schemes $correction"
        quantize "weights-$step$correction" --bits 4 3 $how
        quantize "weights-equalize-$step$correction" --bits 4 3 --equalize $how
        quantize "weights-per_channel-$step$correction" --bits 4 3 2 --per_channel $how
        for range in "" --equalize --per_channel; do
            quantize "both$range-$step$correction" --bits 4 --act_bits same $range $how
        done
    done
done

for bits in 4 3; do
    quantize "budget-$bits" --budget_bits "$bits" --schemes uniform
done
