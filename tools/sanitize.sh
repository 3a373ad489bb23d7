#!/usr/bin/env bash
# Build the C++ kernels with AddressSanitizer and UndefinedBehaviorSanitizer, in a separate folder.
# Then run the operator's tests on them: tools/sanitize.sh [pytest's arguments]
set -euo pipefail
# shellcheck source=tools/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" pytest
copy="$(mktemp -d)"
trap 'rm -rf "$copy"' EXIT
cd "$ROOT"
cp -r sasa_det tests tools benchmarks setup.py pyproject.toml README.md LICENSE sasa_det.* _sasa_det_startup.py "$copy"
cd "$copy"
rm -f sasa_det/ops/_native*.so

flags='-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1'
CFLAGS="$flags" LDFLAGS="$flags" "$PYTHON" setup.py -q build_ext --inplace
# Without the kernels the tests would be skipped, and pass.
ls sasa_det/ops/_native*.so >/dev/null
# Python itself is built without the sanitizers, so they must be preloaded. Leaks are ignored, as
# Python frees little.
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" \
    ASAN_OPTIONS=detect_leaks=0 PYTHONPATH="$copy" \
    "$PYTHON" -m pytest -p no:cacheprovider tests/ops -k 'native or project' "$@"
