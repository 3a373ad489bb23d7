#!/usr/bin/env bash
# Run the tests, making an environment first where there is none: tools/run_tests.sh [pytest's arguments]
set -euo pipefail
# shellcheck source=tools/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" pytest hypothesis sklearn
cd "$ROOT"
exec "$PYTHON" -m pytest "$@"
