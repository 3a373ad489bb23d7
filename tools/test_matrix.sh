#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'TEXT'
tools/test_matrix.sh sets up and tests this commit with several versions of Python and torch.

    bash tools/test_matrix.sh                                 every cell, the whole suite
    bash tools/test_matrix.sh --cell py310-torch2.2           one cell; may be given several times
    bash tools/test_matrix.sh --only tests/ops tests/layers   these tests alone; comes last

    --list           list the cells
    --wheel FILE     also install this wheel in each cell and compare its kernels with the reference
    --help           show this

It needs the Pythons of the cells, from pyenv or on the PATH, and 4 to 9 GB of disk and of downloads per cell.
Each cell is a clone of the commit in work_dirs/matrix/CELL, with an environment and logs of its own; SASA_MATRIX
names another folder than work_dirs/matrix. A cell that was run for this commit and these tests is not run again:
to repeat it, remove its file in CELL/results. It ends with a table in Markdown. The status is 1 if a test failed,
and 3 if only a set-up failed.
TEXT
}

# Name, Python, torch, packages, pip's constraints.
CELLS='
py310-torch2.2   3.10  2.2.2   openmmlab  numpy<2
py311-torch2.13  3.11  2.13.0  openmmlab
py312-torch2.13  3.12  2.13.0  openmmlab
py313-torch2.15  3.13  2.15.0  openmmlab
py311-onedl      3.11  2.13.0  onedl
'
say() { printf 'matrix: %s\n' "$*"; }
refuse() { printf 'matrix: %s\n' "$*" >&2; exit 2; }
names() { awk 'NF { print $1 }' <<<"$CELLS"; }
# field NAME NUMBER
field() { awk -v name="$1" -v field="$2" '$1 == name { print $field }' <<<"$CELLS"; }

chosen=() only=() wheel=''
while (($#)); do
    case "$1" in
        --cell)
            [[ -n "$(field "${2:-}" 1)" ]] || refuse "--cell must be one of: $(names | paste -sd ' '); not '${2:-}'"
            chosen+=("$2")
            shift 2 ;;
        --only)
            shift
            (($#)) || refuse '--only needs paths of tests'
            only=("$@")
            break ;;
        --wheel)
            [[ -f "${2:-}" ]] || refuse "--wheel: there is no file '${2:-}'"
            wheel="$(realpath "$2")"
            shift 2 ;;
        --list) awk 'NF' <<<"$CELLS"; exit ;;
        --help | -h) usage; exit ;;
        *) refuse "unknown argument '$1'; see --help" ;;
    esac
done
((${#chosen[@]})) || mapfile -t chosen < <(names)

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$ROOT"
MATRIX="${SASA_MATRIX:-$ROOT/work_dirs/matrix}"
COMMIT="$(git rev-parse HEAD)"
[[ -z "$(git status --porcelain --untracked-files=no)" ]] ||
    say "what is not committed is not tested: this is commit ${COMMIT:0:8}"
# A name for a result's file, of what was tested.
TESTS="${only[*]:-the whole suite}"
KEY="$COMMIT-$(tr -c 'a-zA-Z0-9\n' _ <<<"$TESTS")"
# Each cell has its own Python.
unset SASA_PYTHON VIRTUAL_ENV PYTHONPATH PYTHONHOME

# Print a Python of a version such as 3.13 that can make environments.
find_python() {
    local candidate
    for candidate in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python "$(command -v "python$1")"; do
        if [[ "$("$candidate" -c 'import ensurepip, sys, venv; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" == "$1" ]]; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    return 1
}

# run_cell NAME RESULT: write the result's line, which is a row of the table.
run_cell() {
    local name="$1" result="$2" version torch stack place clone venv python log versions outcome='' state begin
    version="$(field "$name" 2)" torch="$(field "$name" 3)" stack="$(field "$name" 4)"
    place="$MATRIX/$name"
    clone="$place/sasa_det" log="$place/logs/$KEY.log"
    venv="$clone/.venv"
    [[ "$stack" == openmmlab ]] || venv="$clone/.venv-$stack"
    mkdir -p "$place/logs" "$place/results"
    python="$(find_python "$version")" || {
        say "$name: no Python $version with its venv module was found, in pyenv or on the PATH"
        return 1
    }
    [[ -d "$clone" ]] || git init --quiet "$clone" || return
    # From this checkout, wherever it is now.
    git -C "$clone" fetch --quiet "$ROOT" HEAD && git -C "$clone" checkout --quiet --detach "$COMMIT" || return
    field "$name" 5 >"$place/constraints.txt"
    # The set-up completes an environment that is there, and would choose a Python of its own.
    [[ -x "$venv/bin/python" ]] || "$python" -m venv "$venv" || return
    say "$name: set-up with $python, then $TESTS; see $log"
    begin=$SECONDS
    if ! (
        cd "$clone" || exit
        export SASA_STACK="$stack" SASA_TORCH="torch==$torch"
        [[ -z "$(<"$place/constraints.txt")" ]] || export PIP_CONSTRAINT="$place/constraints.txt"
        exec bash -c 'set -euo pipefail; source tools/setup_env.sh pytest xdist hypothesis sklearn'
    ) >"$log" 2>&1; then
        tail -n 5 "$log" >&2
        say "$name: the set-up failed; see $log"
        return 1
    fi
    say "$name: set up after $((SECONDS - begin)) s"
    versions="$("$venv/bin/python" -c 'import platform, torch; print(platform.python_version(), torch.__version__, sep=" | ")')"
    if [[ -n "$wheel" ]]; then
        "$venv/bin/python" "$ROOT/tools/checks/wheel.py" "$wheel" >>"$log" 2>&1 && outcome='wheel good, ' ||
            outcome='wheel FAILED, '
    fi
    state="$(
        cd "$clone" || exit
        SASA_PYTHON="$venv/bin/python" bash tools/run_tests.sh -q ${only[@]+"${only[@]}"} >>"$log" 2>&1 || true
        # pytest's closing line, without its time.
        tail -n 1 "$log" | grep -oE '[0-9]+ (failed|passed|skipped|errors?|xfailed|xpassed)' | paste -sd, | sed 's/,/, /g'
    )"
    # No closing line: pytest did not start, or was killed. To try again, nothing is written.
    if [[ -z "$state" ]]; then
        tail -n 5 "$log" >&2
        say "$name: pytest did not finish; see $log"
        return 1
    fi
    printf '| %s | %s | %s | %s | %s |\n' "$name" "$versions" "$stack" "$TESTS" "$outcome$state" >"$result.half"
    grep -E '^(FAILED|ERROR) ' "$log" | sed 's/ - .*//; s/^/    /' >"$result.failed" || true
    mv "$result.half" "$result"
    say "$name: $outcome$state, after $((SECONDS - begin)) s"
}

status=0 rows=() failures=''
for name in "${chosen[@]}"; do
    result="$MATRIX/$name/results/$KEY"
    if [[ -f "$result" ]]; then
        say "$name: was run for this commit"
    else
        run_cell "$name" "$result" || { ((status)) || status=3; continue; }
    fi
    rows+=("$(<"$result")")
    [[ ! "${rows[-1]}" =~ failed|error|FAILED ]] || status=1
    [[ ! -s "$result.failed" ]] || failures+="$name:"$'\n'"$(<"$result.failed")"$'\n'
done
printf '\nCommit %s:\n\n| cell | Python | torch | packages | tests | result |\n|---|---|---|---|---|---|\n' "${COMMIT:0:8}"
((${#rows[@]} == 0)) || printf '%s\n' "${rows[@]}"
[[ -z "$failures" ]] || printf '\n%s' "$failures"
exit "$status"
