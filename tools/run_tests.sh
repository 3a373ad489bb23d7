#!/usr/bin/env bash
# Run the tests, making an environment first where there is none: tools/run_tests.sh [pytest's arguments]
set -euo pipefail
# shellcheck source=tools/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" pytest xdist hypothesis sklearn
cd "$ROOT"
# A process a core, each of one thread: the tests are many short trainings that a second thread hardly
# helps. Tests of threads set their number themselves. `-n 0` runs all in this process, for a debugger.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal "$@"
