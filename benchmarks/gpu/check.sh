#!/usr/bin/env bash
# The tests marked `gpu`, in at most 90 seconds. Without CUDA: EC2FACE_GPU_TESTS=cpu.
#
#   bash benchmarks/gpu/check.sh                        the renderer and the core
#   bash benchmarks/gpu/check.sh tests/lab/test_gpu.py  the comparison systems, too
#
# Arguments are pytest's. Writes $OUT/check.log.

set -euo pipefail
cd "$(dirname "$0")/../.."
source benchmarks/gpu/environment.sh
faces=tests/lab/test_gpu.py::test_faces_of_the_gpu_are_those_of_the_cpu
[ $# -gt 0 ] || set -- "$faces" tests/core/test_gpu.py
# an interrupted pytest says what failed until then
timeout -s INT -k 5 90 "$PYTHON" -m pytest -m gpu -p no:cacheprovider --tb=short -v "$@" 2>&1 |
  tee "$OUT/check.log"
