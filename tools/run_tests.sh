#!/usr/bin/env bash
# Run the tests; makes an environment first if there is none: tools/run_tests.sh [pytest's arguments]
set -euo pipefail
# shellcheck source=tools/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" pytest xdist hypothesis sklearn
cd "$ROOT"
# One process per core, each of one thread: a second thread hardly speeds up the many short trainings.
# Tests of threads set their own number. `-n 0` runs all in this process, for a debugger.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal "$@"
