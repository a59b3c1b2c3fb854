#!/usr/bin/env bash
# Checks and times the sparse feed-forward network on a machine with one GPU, in under 8 minutes. Needs Python 3.11 with
# torch >= 2.11 and its triton, nothing else. Results: the folder $OUT, default gpu_results/.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu_results}
mkdir -p "$OUT"
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1
failed=0
timeout 230 python3 -m benchmarks.check_gpu --json "$OUT/check_gpu.json" 2>&1 | tee "$OUT/check_gpu.log" || failed=1
timeout 230 python3 -m benchmarks.ffn_gpu --json "$OUT/ffn_gpu.json" --profile "$OUT/ffn_gpu_profile.txt" 2>&1 |
  tee "$OUT/ffn_gpu.log" || failed=1
exit "$failed"
