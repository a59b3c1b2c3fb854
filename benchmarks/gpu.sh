#!/usr/bin/env bash
# Checks and times everything that wants a GPU, on a machine with one, in under 9 minutes; needs torch and triton there,
# and the other packages in the environment or as wheels in .whl/. Results: the folder $OUT, default gpu_results/.
# Of a copy without .git, COMMIT says which one it is.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu_results}
mkdir -p "$OUT"
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1
if [ -d .whl ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site .whl/*.whl && PYTHONPATH="$PWD:/tmp/site"
fi
failed=0
timed() { # seconds, name, module and arguments
  local limit=$1 name=$2
  shift 2
  timeout "$limit" python3 -m "$@" --json "$OUT/$name.json" 2>&1 | tee "$OUT/$name.log" || failed=1
}
timed 125 check_gpu benchmarks.check_gpu
timed 115 ffn benchmarks.ffn_gpu --profile "$OUT/ffn_profile.txt"
timed 65 inference benchmarks.inference
timed 40 peers benchmarks.peers --quick
timed 75 step benchmarks.step --model gpt-124m --turns 5 --eager --profile "$OUT/step"
timed 50 compiled benchmarks.step --model gpt-124m --layers 4 --turns 5 --compile
timed 40 switch benchmarks.switch --model gpt-1.3b --layers 4 --tokens 16384
timeout 25 python3 examples/selfcheck/selfcheck.py 2>&1 | tee "$OUT/selfcheck.log" || failed=1
exit "$failed"
