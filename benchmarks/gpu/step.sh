#!/usr/bin/env bash
# Times of a training step and of sampling, in at most five minutes; see step.py.
#
#   bash benchmarks/gpu/step.sh [flux|tiny] [options of step.py]
#
# Writes $OUT/step-<size>.csv, $OUT/kernels-<size>.csv and $OUT/step.log.

set -euo pipefail
cd "$(dirname "$0")/../.."
source benchmarks/gpu/environment.sh
size=${1:-flux}
shift || true
export PYTHONPATH=".:benchmarks${PYTHONPATH:+:$PYTHONPATH}"
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
timeout 300 "$PYTHON" benchmarks/gpu/step.py --size "$size" --out "$OUT" "$@" 2>&1 |
  tee "$OUT/step.log"
