#!/usr/bin/env bash
# Rounding to nearest and learned rounding of the control's weights, on the first 2,000 test images.
# Run from the root of the repository; files are written to runs/quantizers. Two can run side by side.
set -euo pipefail
export OMP_NUM_THREADS=1
for scheme in ${SCHEMES:-uniform clip}; do
    for rounding in nearest adaround; do
        "${PYTHON:-python}" quant_inference.py weights/control.pt --bits 4 3 2 --schemes "$scheme" \
            --rounding "$rounding" --test_subset 2000 --no_plots --output "runs/quantizers/${rounding}_$scheme"
    done
done
