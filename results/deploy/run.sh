#!/usr/bin/env bash
# Integer models of three trained networks: simulated and real accuracy, predictions that differ,
# times and bytes. Run from the root of the repository on a machine with nothing else to do, about a
# minute a case; finished cases are skipped. Files are written to runs/deploy. $WEIGHTS holds the
# networks: two are in weights/, the third is made as they are, see weights/run.sh, with
#   branch rangenorm_folded --first_regularized_epoch 6 --regularizer RangeNorm --fold_bn --lmbda 0.1
set -euo pipefail
python=${PYTHON:-python}
weights=${WEIGHTS:-weights}

verify() { # NAME BITS ACT_BITS CASE FLAGS…
    local folder=runs/deploy/$1
    mkdir -p "$folder"
    [ -f "$folder/w$2a$3$4.verified.json" ] && return
    "$python" quant_inference.py "$weights/$1.pt" --bits "$2" --act_bits "$3" --fold_bn --no_plots \
        --export "$folder/w$2a$3$4.onnx" --verify --output "$folder" --data_dir "${DATA_DIR:-./data}" \
        --device cpu "${@:5}"
}

for name in control rangenorm_folded kurtosisnorm_folded; do
    for bits in "8 8" "6 6" "4 4" "4 8"; do
        verify "$name" $bits "" --schemes uniform
        verify "$name" $bits _per_channel --schemes uniform --per_channel
    done
    verify "$name" 4 4 _pwlq --schemes pwlq --overlapping
done
"$python" benchmarks/deploy_table.py runs/deploy --output results/deploy
