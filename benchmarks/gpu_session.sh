#!/usr/bin/env bash
# One sitting at a machine with an NVIDIA GPU: what is there, the tests, the measurements, in this order.
#   [PYTHON=python3] [PYTHONPATH=/tmp/site] [ASSETS=...] bash benchmarks/gpu_session.sh [look] [test] [bench [FILE.onnx ...]]
# With no step, all three. Each step ends within STEP seconds (default 180), so all of it takes less than ten minutes; a
# step that is cut keeps what it printed. OUT (default: a new folder) gets a log of each; their ends are printed last.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3} out=${OUT:-$(mktemp -d)} limit=${STEP:-180}
mkdir -p "$out"
steps=() files=()
for word in "$@"; do
  case $word in look | test | bench) steps+=("$word") ;; *) files+=("$word") ;; esac
done
[[ ${#steps[@]} -gt 0 ]] || steps=(look test bench)

look() {
  nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,memory.used --format=csv
  "$python" --version
  "$python" - <<'PY'
import runtimes
from importlib.metadata import PackageNotFoundError, version

for name in ("numpy", "onnx", "onnx-ir", "onnxscript", "onnxsim", "torch", "onnxruntime", "onnxruntime-gpu", "tensorrt",
             "tensorrt-rtx-cu13-libs", "cuda-bindings", "pycuda", "polygraphy", "pytest", "pillow"):
    try:
        print(f"{name:<24}{version(name)}")
    except PackageNotFoundError:
        print(f"{name:<24}-")
for name, state in runtimes.available().items():
    print(f"{name:<16}{'works, ' + str(state.version) if state.available else 'no: ' + str(state.reason)}")
PY
}
test() { "$python" -m pytest -q -rs --tb=short -o addopts= -p no:cacheprovider tests/gpu; }
bench() { "$python" benchmarks/gpu.py --seconds "${SECONDS_EACH:-1}" "${files[@]}"; }

run() {
  export -f "$1"
  export python
  timeout --kill-after=10 "$limit" bash -c 'files=("${@:2}"); "$1"' _ "$1" "${files[@]}" >"$out/$1.log" 2>&1
  echo "$?" >"$out/$1.rc"
}
for step in "${steps[@]}"; do run "$step"; done
for step in "${steps[@]}"; do
  code=$(cat "$out/$step.rc")
  [[ $code == 124 ]] && code="124, cut after $limit s"
  echo "== $step, exit code $code, whole log in $out/$step.log"
  # Why tests were skipped, once each. The line of JSON is long, and in the log.
  sed -n 's/^SKIPPED \[\([0-9]*\)\] [^ ]* /skipped: /p' "$out/$step.log" | cut -c 1-180 | sort | uniq -c
  grep -v '^{\|^SKIPPED' "$out/$step.log" | tail -n 60 | cut -c 1-200
done
