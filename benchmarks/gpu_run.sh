#!/usr/bin/env bash
# One run on an NVIDIA GPU, in at most nine minutes: what is right, what it costs, and what races.
#
#     OUT=gpu_results bash benchmarks/gpu_run.sh        --dry-run: on the CPU, small, to see that it runs
#
# Each step is a process with a limit of its own. Its output goes to $OUT/STEP.txt as it comes, and its tables to
# $OUT/*.md and $OUT/*.json; $OUT/summary.txt has one line per step. A step that fails does not stop the others.
# Needs Python with torch and Triton. The detectors also need mmcv and mmdet, the tests pytest, and the races
# compute-sanitizer. PYTHON names another Python.
set -uo pipefail
dry=()
if [[ "${1:-}" == --dry-run ]]; then
    dry=(--dry-run)
    export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
elif (($#)); then
    echo "usage: [OUT=folder] [PYTHON=python] bash $0 [--dry-run]" >&2
    exit 2
fi

out="${OUT:-gpu_results}"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

failed=0
: >"$out/summary.txt"
# step NAME SECONDS COMMAND...
step() {
    local name="$1" limit="$2" begin=$SECONDS status=0 said=ok
    shift 2
    ((${#dry[@]} == 0)) || limit=$((10 * limit)) # a CPU may be busy
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.txt" 2>&1 || status=$?
    case $status in
        0) ;;
        124 | 137) said="stopped after $limit s" ;;
        *) said="failed with status $status: $(tail -n 1 "$out/$name.txt")" ;;
    esac
    ((status == 0)) || failed=1
    printf '%-10s %4d s  %s\n' "$name" $((SECONDS - begin)) "$said" | tee -a "$out/summary.txt"
}
skip() {
    printf '%-10s          not run: %s\n' "$1" "$2" | tee -a "$out/summary.txt"
}
has() {
    "$python" -c "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))" "$@"
}

# What decides first, in case the machine is taken away. The limits add up to 535 s.
gpu=("$python" -m benchmarks.attention_gpu "${dry[@]}")
step numerics 60 "$python" -m benchmarks.gpu_steps numerics --out "$out" "${dry[@]}"
step shapes 150 "${gpu[@]}" --subjects conv3x3 core core-cuda layer --detectors --minutes 2.2 --out "$out/shapes"
if has mmcv mmdet; then
    step detectors 120 "${gpu[@]}" --shapes --detectors 2 16 --minutes 1.5 --out "$out/detectors"
else
    skip detectors 'mmcv and mmdet are not installed'
fi
step kernels 45 "$python" -m benchmarks.gpu_steps kernels --out "$out" "${dry[@]}"
if ! has pytest; then
    skip tests 'pytest is not installed'
else
    step tests 100 "$python" -m pytest -q -x -p no:cacheprovider "${dry[@]/--dry-run/--collect-only}" \
        tests/ops/backends/test_*_gpu.py
fi
if command -v compute-sanitizer >/dev/null; then
    step races 60 compute-sanitizer --tool racecheck --error-exitcode 9 \
        "$python" -m benchmarks.gpu_steps small "${dry[@]}"
else
    # Also without a sanitizer it shows whether the smallest map works.
    step small 30 "$python" -m benchmarks.gpu_steps small "${dry[@]}"
    skip races 'there is no compute-sanitizer'
fi
echo "results: $out"
exit $failed
