#!/usr/bin/env bash
# The tests marked `gpu`, in at most 90 seconds. Without CUDA: EC2FACE_GPU_TESTS=cpu.
#
#   bash benchmarks/gpu/check.sh [options of pytest]
#
# Writes $OUT/check.log.

set -euo pipefail
cd "$(dirname "$0")/../.."
source benchmarks/gpu/environment.sh
timeout 90 "$PYTHON" -m pytest -m gpu -p no:cacheprovider -q \
  tests/core/test_gpu.py tests/lab/test_gpu.py "$@" 2>&1 | tee "$OUT/check.log"
