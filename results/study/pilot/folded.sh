#!/usr/bin/env bash
# Where (4,4) loses, on held-out images: networks of results/study/tuning, which study.py makes.
# From the root: bash results/study/pilot/folded.sh > results/study/pilot/folded.log
set -euo pipefail
export OMP_NUM_THREADS=1

run() {
    echo "\$ python quant_inference.py $*"
    python quant_inference.py "$@" --fold_bn --holdout 5000 --output "$(mktemp -d)" 2>&1 |
        grep -E " (none|uniform|pwlq) "
}
tuning=results/study/tuning
run $tuning/rangenorm_0.1.pt --bits 4 --schemes uniform
run $tuning/rangenorm_0.1.pt --bits 4 8 --schemes uniform --act_bits 4
for net in rangenorm_0.1 rangenorm_folded_0.03 rangenorm_folded_0.1 rangenorm_folded_0.3; do
    run $tuning/$net.pt --bits 4 8 --schemes uniform --act_bits 4 --calibration percentile
done
for net in rangenorm_0.1 rangenorm_folded_0.1 rangenorm_folded_0.3 kurtosisnorm_folded_0.01 \
    kurtosisnorm_folded_0.1; do
    run $tuning/$net.pt --bits 4 8 --schemes uniform --act_bits 4 --calibration percentile \
        --bias_correction
done
for net in control rangenorm_0.1 rangenorm_folded_0.1 rangenorm_folded_0.3 kurtosisnorm_folded_0.01; do
    run $tuning/$net.pt --bits 4 8 --schemes pwlq --act_bits 4 --calibration percentile \
        --bias_correction
done
