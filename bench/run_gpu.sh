#!/usr/bin/env bash
# What wants a CUDA machine, without a network and in calls of less than ten minutes: builds the package with its CUDA
# part, runs the tests on real kernels instead of the interpreter, checks memory accesses, benchmarks, and leaves one JSON
# with tables in OUTDIR (default runs/gpu). A part that fails does not stop the next; the exit code is the number of parts
# that failed. Parts that have no time left are named at the end, for a second call with the same OUTDIR.
#
#   bench/run_gpu.sh [OUTDIR [PART...]]
#
# Parts, or groups of them; without any, all but the slow tests:
#   checks    build info tests memcheck
#   ops       steps iterates losses attention filters
#   clips     clips-ViT-B-32 clips-ViT-B-16 clips-ViT-L-14: whole attacks at full size, precision, memory (bench/clips.py)
#   jobs      pgd engines attacks train
#   slow      the slow tests
#
# Environment:
#   PYTHON            interpreter that has torch (default python3)
#   RVLM_WHEELS       folder of wheels that `build` installs first, without their dependencies: what the machine lacks of
#                     pybind11 (else the host module is not built) open_clip_torch ftfy wcwidth jsonargparse
#                     docstring_parser typeshed_client, and as peers torchattacks pyautoattack liger_kernel; foolbox
#                     needs eagerpy gitpython gitdb smmap beside it
#   RVLM_GPU_SECONDS  for the whole call (default 560)
#   RVLM_BENCH_CPU=1  dry run on a CPU: tiny sizes, nothing installed; shows that this script works
set -uo pipefail
cd "$(dirname "$0")/.."

out="${1:-runs/gpu}"
mkdir -p "$out" && out="$(cd "$out" && pwd)"
python="${PYTHON:-python3}"
dry="${RVLM_BENCH_CPU:-0}"
total="${RVLM_GPU_SECONDS:-560}"
failed=0
left=()
clips=(clips-ViT-B-32 clips-ViT-B-16 clips-ViT-L-14)
[[ "$dry" == 1 ]] && clips=(clips-tiny-vit)
declare -A groups=(
  [checks]="build info tests memcheck" [ops]="steps iterates losses attention filters" [clips]="${clips[*]}"
  [jobs]="pgd engines attacks train"
)
parts=()
for name in "${@:2}"; do
  read -ra more <<< "${groups[$name]:-$name}" && parts+=("${more[@]}")
done
((${#parts[@]})) || read -ra parts <<< "${groups[checks]} ${groups[ops]} ${groups[clips]} ${groups[jobs]}"
for name in "${parts[@]}"; do
  if [[ " ${groups[*]} slow " != *" $name "* ]]; then
    echo "unknown part $name: expected ${!groups[*]}, or one of ${groups[*]} slow" >&2
    exit 2
  fi
done
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
unset TRITON_INTERPRET RVLM_BACKEND
touch "$out/parts.tsv"

# part NAME SECONDS COMMAND...: the command, for at most so long and never past the total; its output goes to a log. Nothing
# new is to begin after three quarters of it ($seconds).
part() {
  local name="$1" limit="$2" began="$SECONDS" code=0
  shift 2
  if ((limit > total - SECONDS)); then limit=$((total - SECONDS)); fi
  if ((limit < 15)); then
    left+=("$name")
    return
  fi
  export seconds=$((limit * 3 / 4))
  printf '== %s\n' "$name"
  sed -i "/^$name\t/d" "$out/parts.tsv"
  rm -f "$out/$name.json"
  timeout -s INT -k 10 "$limit" "$@" > "$out/$name.log" 2>&1 || code=$?
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

# tests SELECTION: a process for every core but four, one thread each; a file's tests share what they have trained.
tests() {
  local workers=()
  "$python" -c "import xdist" 2> /dev/null && workers=(-n "$(($(nproc) > 8 ? $(nproc) - 4 : 4))" --dist loadfile)
  if [[ "$dry" == 1 ]]; then
    "$python" -m pytest -q -m "$1" tests/ops/test_dispatch.py
  else
    OMP_NUM_THREADS=1 "$python" -m pytest -q -m "$1" --durations=20 "${workers[@]}"
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
  RVLM_BENCH_SECONDS="$seconds" "$python" -m pytest -q -rs "bench/bench_$1.py" --benchmark-disable-gc --benchmark-json="$out/$1.json" || return
  # Where everything was skipped (a peer is not installed, the time is spent) pytest-benchmark writes nothing.
  [[ -e "$out/$1.json" ]] || echo '{"machine_info": {}, "benchmarks": []}' > "$out/$1.json"
}

clips() { "$python" bench/clips.py --models "$1" --seconds "$seconds" --out "$out/clips-$1.json"; }

export -f build info tests memory_check bench clips
export out python dry

[[ "$dry" == 1 ]] && export RVLM_BENCH_QUICK=1 CUDA_VISIBLE_DEVICES=""
for name in "${parts[@]}"; do
  case "$name" in
    build) [[ "$dry" == 1 ]] || part build 150 bash -c build ;;
    info) part info 40 bash -c info ;;
    tests) part tests 260 bash -c 'tests "not slow"' ;;
    slow) part slow 500 bash -c 'tests slow' ;;
    memcheck)
      if [[ "$dry" == 1 ]] || command -v compute-sanitizer > /dev/null; then
        part memcheck 120 bash -c memory_check
      else
        sed -i "/^memcheck\t/d" "$out/parts.tsv"
        printf 'memcheck\t0\t0\tskipped: no compute-sanitizer here\n' | tee -a "$out/parts.tsv"
      fi
      ;;
    steps) part steps 110 bash -c "bench steps" ;;
    iterates) part iterates 60 bash -c "bench iterates" ;;
    losses) part losses 65 bash -c "bench losses" ;;
    attention) part attention 60 bash -c "bench attention" ;;
    filters) part filters 30 bash -c "bench filters" ;;
    clips-*) part "$name" 165 bash -c "clips ${name#clips-}" ;;
    pgd) part pgd 110 bash -c "bench pgd" ;;
    engines) part engines 160 bash -c "bench engines" ;;
    attacks) part attacks 110 bash -c "bench attacks" ;;
    train) part train 140 bash -c "bench train" ;;
  esac
done

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
mapfile -t measured < <(cut -f 1 "$out/parts.tsv" | grep -vE '^(build|info|tests|slow|memcheck)$')
if ((${#measured[@]})); then
  files=("${measured[@]/#/$out/}")
  "$python" bench/report.py --out "$out/result" --parts "$out/parts.json" "${files[@]/%/.json}" || failed=$((failed + 1))
fi
((${#left[@]})) && printf '\nno time left for: %s\n' "${left[*]}"
printf '\n%s part(s) failed; %s s; %s\n' "$failed" "$SECONDS" "$out"
exit "$failed"
