#!/usr/bin/env bash
# Everything that wants a CUDA machine, in one call of about eight minutes and without a network: builds the package
# with its CUDA part, runs the tests on real kernels instead of the interpreter, checks memory accesses, benchmarks, and
# leaves one JSON with a table in OUTDIR (default runs/gpu). A part that fails does not stop the next; the exit code is
# the number of parts that failed.
#
#   bench/run_gpu.sh [OUTDIR]
#
# Environment:
#   PYTHON            interpreter that has torch (default python3)
#   RVLM_WHEELS       folder of wheels to install first, without their dependencies (open_clip_torch, torchattacks,
#                     liger_kernel, ...)
#   RVLM_BENCH_CPU=1  dry run on a CPU: tiny sizes, nothing installed; shows that this script works
set -uo pipefail
cd "$(dirname "$0")/.."

out="${1:-runs/gpu}"
mkdir -p "$out" && out="$(cd "$out" && pwd)"
python="${PYTHON:-python3}"
dry="${RVLM_BENCH_CPU:-0}"
total=480
failed=0
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
unset TRITON_INTERPRET RVLM_BACKEND
rm -f "$out"/{parts.tsv,info.json,{steps,iterates,losses,attention,filters,pgd,engines,attacks,train}.json}

# part NAME SECONDS COMMAND...: the command, for at most so long and never past the total; its output goes to a log.
part() {
  local name="$1" limit="$2" began="$SECONDS" code=0
  shift 2
  if ((limit > total - SECONDS)); then limit=$((total - SECONDS)); fi
  printf '== %s\n' "$name"
  if ((limit < 5)); then
    code=124
    echo "no time left" > "$out/$name.log"
  else
    timeout -s INT -k 10 "$limit" "$@" > "$out/$name.log" 2>&1 || code=$?
  fi
  if ((code != 0)); then
    failed=$((failed + 1))
    tail -n 25 "$out/$name.log"
  fi
  printf '%s\t%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - began))" "$(tail -n 1 "$out/$name.log" | tr '\t' ' ')" |
    tee -a "$out/parts.tsv"
}

build() {
  if [[ -n "${RVLM_WHEELS:-}" ]]; then
    "$python" -m pip install -q --no-index --no-deps "$RVLM_WHEELS"/*.whl || return
  fi
  FORCE_CUDA=1 "$python" -m pip install -q --no-build-isolation --no-deps -e .
}

info() { "$python" -m rvlm info --json > "$out/info.json" && cat "$out/info.json"; }

unit_tests() {
  local workers=()
  "$python" -c "import xdist" 2> /dev/null && workers=(-n 4)
  if [[ "$dry" == 1 ]]; then
    "$python" -m pytest -q -m "not slow" tests/ops/test_dispatch.py
  else
    "$python" -m pytest -q -m "not slow" "${workers[@]}"
  fi
}

# Allocations of their own, so that an access past the end of one does not land in the next; odd sizes are among them.
memory_check() {
  local tool=(compute-sanitizer --tool memcheck --error-exitcode 9)
  [[ "$dry" == 1 ]] && tool=()
  RVLM_BENCH_QUICK=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${tool[@]}" \
    "$python" -m pytest -q bench/bench_{steps,iterates,losses,attention}.py -k "triton or cpp" --benchmark-disable
}

bench() {
  "$python" -m pytest -q -rs "bench/bench_$1.py" --benchmark-disable-gc --benchmark-json="$out/$1.json" || return
  # Where everything was skipped (a peer is not installed, the time is spent) pytest-benchmark writes nothing.
  [[ -e "$out/$1.json" ]] || echo '{"machine_info": {}, "benchmarks": []}' > "$out/$1.json"
}

export -f build info unit_tests memory_check bench
export out python dry

if [[ "$dry" == 1 ]]; then
  export RVLM_BENCH_QUICK=1 CUDA_VISIBLE_DEVICES=""
else
  part build 150 bash -c build
fi
part info 40 bash -c info
part tests 130 bash -c unit_tests
RVLM_BENCH_SECONDS=90 part steps 130 bash -c "bench steps"
RVLM_BENCH_SECONDS=40 part iterates 60 bash -c "bench iterates"
RVLM_BENCH_SECONDS=45 part losses 65 bash -c "bench losses"
RVLM_BENCH_SECONDS=30 part attention 60 bash -c "bench attention"
RVLM_BENCH_SECONDS=20 part filters 30 bash -c "bench filters"
RVLM_BENCH_SECONDS=75 part pgd 140 bash -c "bench pgd"
RVLM_BENCH_SECONDS=60 part engines 120 bash -c "bench engines"
RVLM_BENCH_SECONDS=40 part attacks 90 bash -c "bench attacks"
RVLM_BENCH_SECONDS=30 part train 60 bash -c "bench train"
if [[ "$dry" == 1 ]] || command -v compute-sanitizer > /dev/null; then
  part memcheck 60 bash -c memory_check
else
  printf 'memcheck\t0\t0\tskipped: no compute-sanitizer here\n' | tee -a "$out/parts.tsv"
fi

"$python" - "$out" << 'PY'
import json, pathlib, sys

out = pathlib.Path(sys.argv[1])
fields = ("name", "exit_code", "seconds", "last_line")
parts = [dict(zip(fields, line.split("\t"))) for line in (out / "parts.tsv").read_text().splitlines()]
try:
    info = json.loads((out / "info.json").read_text())
except (OSError, ValueError):
    info = None
(out / "parts.json").write_text(json.dumps({"parts": parts, "info": info}))
PY
"$python" bench/report.py --out "$out/result" --parts "$out/parts.json" "$out"/{steps,iterates,losses,attention,filters,pgd,engines,attacks,train}.json || failed=$((failed + 1))
printf '\n%s part(s) failed; %s s; %s\n' "$failed" "$SECONDS" "$out/result.json"
exit "$failed"
