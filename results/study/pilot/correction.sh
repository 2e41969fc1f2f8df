#!/usr/bin/env bash
# --bias_correction against --mean_correction, on held-out images: networks of results/study/tuning.
# From the root: bash results/study/pilot/correction.sh > results/study/pilot/correction.log
set -euo pipefail
export OMP_NUM_THREADS=1

run() {
    echo "\$ python quant_inference.py $*"
    python quant_inference.py "$@" --holdout 5000 --output "$(mktemp -d)" 2>&1 |
        grep -E " (uniform|pwlq) "
}
for net in control rangenorm_0.1 kurtosisnorm_1 rangenorm_folded_0.1 l2grad_0.03; do
    for correction in --bias_correction --mean_correction; do
        run results/study/tuning/$net.pt --bits 2 3 4 --schemes uniform --precision bf16 $correction
        run results/study/tuning/$net.pt --bits 4 --schemes uniform pwlq $correction --fold_bn \
            --act_bits same --calibration percentile
    done
done
