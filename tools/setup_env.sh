# Sourced by quickstart.sh and run_tests.sh, with the Python modules that these need as arguments.
# Sets $ROOT, the project's folder, and $PYTHON, a Python with all that sasa_det needs:
#   SASA_PYTHON=/path/to/python   this Python, unchanged; must pass the doctor's check
#   an active virtual environment unchanged too, if it passes the check
#   otherwise .venv/              made here, and completed if something is missing
# SASA_TORCH names another torch for .venv, with pip's options if any:
#   SASA_TORCH='torch==2.5.1 --index-url https://download.pytorch.org/whl/cu124'
# SASA_STACK=onedl uses the maintained fork of mmdet, mmcv and mmengine instead, in .venv-onedl/.
# shellcheck shell=bash

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# Only mmcv is built from source.
case "${SASA_STACK:=openmmlab}" in
    openmmlab)
        SASA_MMCV=mmcv
        SASA_VENV="$ROOT/.venv" ;;
    onedl)
        SASA_MMCV=onedl-mmcv
        SASA_VENV="$ROOT/.venv-onedl" ;;
    *)
        printf "setup: SASA_STACK must be openmmlab or onedl, not '%s'\n" "$SASA_STACK" >&2
        exit 1 ;;
esac
SASA_STAMP="$SASA_VENV/setup.done"
SASA_LOG="$SASA_VENV/setup.log"

say() { printf 'setup: %s\n' "$*"; }
give_up() { printf 'setup: %s\n' "$@" >&2; exit 1; }

# --- A Python that is there already

# The checkout need not be installed there: PYTHONPATH includes it.
doctor_passes() { PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" "$1" -m sasa_det doctor --quiet; }

use_as_is() {
    local module
    for module in "${@:2}"; do
        "$1" -c "import $module" 2>/dev/null ||
            give_up "$1 lacks the module $module; this installs all that sasa_det's tools need:" \
                "    $1 -m pip install --no-build-isolation --editable '$ROOT[tests]'"
    done
    PYTHON="$1"
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
}

# --- .venv

# A change of this key makes .venv incomplete. A virtual environment cannot be moved, hence the folder.
setup_key() {
    { cat "$ROOT"/{setup.py,pyproject.toml,sasa_det.pth,sasa_det.start,sasa_det/environment/stack.py} \
          "$ROOT"/sasa_det/ops/csrc/*.{cpp,h}
      echo "$ROOT ${SASA_TORCH:-} $SASA_STACK"; } | cksum
}

is_complete() {
    [[ -x "$SASA_VENV/bin/python" && -f "$SASA_STAMP" && "$(<"$SASA_STAMP")" == "$(setup_key)" ]]
}

find_base_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.10 python3; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' \
            2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    give_up 'no Python of version 3.10 or later with its venv module was found.' \
        'Install python3.11 (Debian, Ubuntu: apt install python3.11 python3.11-venv python3.11-dev),' \
        'or name a Python that has all packages: SASA_PYTHON=/path/to/python.'
}

# step NAME EXPECTED COMMAND...: run the command, print its time, show the log's end if it fails.
step() {
    local name="$1" expected="$2" begin=$SECONDS beat status=0
    shift 2
    say "$name ($expected) ..."
    printf '\n== %s: %s\n' "$name" "$*" >>"$SASA_LOG"
    # It ends by itself once this script is gone. The sleep may outlive the script, so it holds
    # neither the terminal nor the lock.
    (while sleep 60 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
        say "  still at it, $(((SECONDS - begin) / 60)) min; the details are in $SASA_LOG"
    done) 9>&- &
    beat=$!
    "$@" >>"$SASA_LOG" 2>&1 9>&- || status=$?
    kill "$beat" 2>/dev/null || true
    wait "$beat" 2>/dev/null || true
    if ((status)); then
        tail -n 25 "$SASA_LOG" >&2
        give_up "$name failed; the lines above are the end of $SASA_LOG." \
            'Run the same command again once the cause is mended: what is done is not done twice.'
    fi
    say "  done in $((SECONDS - begin)) s"
}

ops_import() { "$SASA_VENV/bin/python" -c 'import mmcv.ops' >>"$SASA_LOG" 2>&1; }
pip_install() { "$SASA_VENV/bin/python" -m pip install "$@"; }
# Print pip's requirement for a distribution.
pin() { "$SASA_VENV/bin/python" "$ROOT/sasa_det/environment/stack.py" "$@"; }
build_mmcv() { MMCV_WITH_OPS=1 pip_install --no-build-isolation "$@" "$(pin "$SASA_MMCV")"; }

need_compiler() {
    command -v g++ >/dev/null ||
        give_up 'g++ was not found; it is needed once, to build mmcv.' \
            'Install it (Debian, Ubuntu: apt install g++ python3.11-dev) and run the same command again.'
}

rebuild_mmcv() {
    need_compiler
    "$SASA_VENV/bin/python" -m pip cache remove "$SASA_MMCV" || true
    build_mmcv --force-reinstall --no-deps --no-binary "$SASA_MMCV"
}

install_sasa_det() {
    if [[ "$SASA_STACK" == openmmlab ]]; then
        pip_install --no-build-isolation --editable "$ROOT[tests]"
        return
    fi
    # Its requirements name OpenMMLab's packages, which would overwrite the fork's modules of the same names.
    pip_install --no-build-isolation --no-deps --editable "$ROOT" || return
    "$SASA_VENV/bin/python" - >"$SASA_VENV/requirements.txt" <<'EOF' || return
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement


def wanted(extra):
    for requirement in map(Requirement, requires('sasa_det')):
        if requirement.marker and not requirement.marker.evaluate({'extra': extra}):
            continue
        if requirement.name in ('sasa_det', 'sasa-det'):
            for other in requirement.extras:
                yield from wanted(other)
        elif requirement.name not in ('mmengine', 'mmcv', 'mmdet'):
            yield f'{requirement.name}{requirement.specifier}'


print(*sorted(set(wanted('tests'))), sep='\n')
EOF
    # shellcheck disable=SC2046  # one word each
    pip_install $(pin onedl-mmengine onedl-mmcv onedl-mmdetection) -r "$SASA_VENV/requirements.txt"
}

complete_venv() {
    local base
    say "making $SASA_VENV complete; this is done once and may be interrupted"
    if ! "$SASA_VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        base="$(find_base_python)"
        # The existing one is half made, or was moved.
        rm -rf "$SASA_VENV"
        mkdir "$SASA_VENV"
        step "virtual environment with $("$base" --version)" '10 s' "$base" -m venv "$SASA_VENV"
    fi
    rm -f "$SASA_STAMP"
    # mmcv's build needs torch and pkg_resources, which newer setuptools lack. torch refuses Python's
    # own older setuptools, and would install the newest.
    step 'build tools' '10 s' pip_install 'setuptools>=77.0.3,<81' wheel ninja
    local torch="${SASA_TORCH:-$(pin torch)}"
    # shellcheck disable=SC2086  # options beside the requirement are meant to be split
    step "$torch" '1 min and the download' pip_install $torch
    if ! ops_import; then
        "$SASA_VENV/bin/python" -m pip cache list "$SASA_MMCV" 2>/dev/null | grep -q '\.whl' || need_compiler
        step "$(pin "$SASA_MMCV") with its ops" "1 min from pip's cache, else built in 11 min on 2 cores" \
            build_mmcv
        # pip's cache may hold a wheel without ops, or one built against another torch.
        ops_import || step "$(pin "$SASA_MMCV") again, as pip's cached one does not import" \
            '11 min on 2 cores' rebuild_mmcv
        ops_import || give_up "mmcv was built, but \`import mmcv.ops\` fails; see $SASA_LOG."
    fi
    step 'sasa_det with its C++ kernels, mmdet and the tools for tests' '2 min' install_sasa_det
    if ! "$SASA_VENV/bin/python" -c 'import cv2' >>"$SASA_LOG" 2>&1; then
        # For a server without graphics libraries: the same module without GUI.
        step 'opencv-python-headless, as opencv-python does not import' '20 s' \
            pip_install --force-reinstall --no-deps opencv-python-headless
    fi
    "$SASA_VENV/bin/python" -m sasa_det doctor --quiet || give_up 'the check above did not pass.'
    setup_key >"$SASA_STAMP"
    say 'complete'
}

set_up() {
    if [[ -n "${SASA_PYTHON:-}" ]]; then
        # Made absolute, as the scripts change the folder. Links are kept: resolving them would leave
        # the environment.
        [[ "$SASA_PYTHON" != */* ]] ||
            SASA_PYTHON="$(cd "$(dirname "$SASA_PYTHON")" && pwd)/$(basename "$SASA_PYTHON")"
        doctor_passes "$SASA_PYTHON" || give_up \
            "SASA_PYTHON=$SASA_PYTHON does not pass the check of sasa-det doctor, see above."
        use_as_is "$SASA_PYTHON" "$@"
        return
    fi
    if [[ -n "${VIRTUAL_ENV:-}" && ! "$VIRTUAL_ENV" -ef "$SASA_VENV" ]]; then
        if doctor_passes "$VIRTUAL_ENV/bin/python" 2>/dev/null; then
            use_as_is "$VIRTUAL_ENV/bin/python" "$@"
            return
        fi
        say "the active environment $VIRTUAL_ENV does not pass the doctor's check; using $SASA_VENV"
    fi
    PYTHON="$SASA_VENV/bin/python"
    is_complete && return
    exec 9>"$SASA_VENV.lock"
    if command -v flock >/dev/null && ! flock -n 9; then
        say 'another set-up is at work here; waiting for it'
        flock 9
    fi
    is_complete || complete_venv
    exec 9>&-
}

set_up "$@"
