# Sourced by quickstart.sh and run_tests.sh, with the Python modules that these need as arguments.
# Sets $ROOT, the project's folder, and $PYTHON, a Python with all that sasa_det needs:
#   SASA_PYTHON=/path/to/python   this Python, unchanged; must pass the doctor's check
#   an active virtual environment unchanged too, if it passes the check
#   otherwise .venv/              made here, and completed if something is missing
# SASA_TORCH names another torch for .venv, with pip's options if any:
#   SASA_TORCH='torch==2.5.1 --index-url https://download.pytorch.org/whl/cu124'
# SASA_STACK=onedl uses the maintained fork of mmdet, mmcv and mmengine instead, in .venv-onedl/.
# shellcheck shell=bash

# Without links, as a virtual environment knows its folder by one name.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
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

# --- Pythons

# Print a Python's version, such as 3.11; fails if it does not start.
python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
# Say whether .venv may be made with this version.
is_tried() { [[ "$1" =~ ^3\.1[0-3]$ ]]; }
has_venv() { "$1" -c 'import venv, ensurepip' 2>/dev/null; }
has_headers() {
    "$1" -c 'import os, sys, sysconfig
sys.exit(not os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")))' 2>/dev/null
}

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
          "$ROOT"/sasa_det/{ops,export}/csrc/*.{cpp,h}
      echo "$ROOT ${SASA_TORCH:-} $SASA_STACK $(python_version "$SASA_VENV/bin/python")"; } | cksum
}

is_complete() {
    [[ -x "$SASA_VENV/bin/python" && -f "$SASA_STAMP" && "$(<"$SASA_STAMP")" == "$(setup_key)" ]]
}

# Print the Python to make .venv with: the first one that has its headers, else the first one without.
find_base_python() {
    local candidate version found='' reasons=()
    for candidate in python3.11 python3.12 python3.13 python3.10 python3; do
        version="$(python_version "$candidate")" || continue
        if ! is_tried "$version"; then
            reasons+=("    $candidate is Python $version")
        elif ! has_venv "$candidate"; then
            reasons+=("    $candidate lacks its venv module (Debian, Ubuntu: apt install python$version-venv)")
        elif has_headers "$candidate"; then
            found="$candidate"
            break
        else
            found="${found:-$candidate}"
        fi
    done
    [[ -n "$found" ]] || give_up 'no Python of a version from 3.10 to 3.13 with its venv module was found.' \
        ${reasons[@]+"${reasons[@]}"} \
        'Install python3.11 (Debian, Ubuntu: apt install python3.11 python3.11-venv python3.11-dev),' \
        'or name a Python that has all packages: SASA_PYTHON=/path/to/python.'
    printf '%s\n' "$found"
}

# Print why the existing .venv must be made anew; nothing if it can be completed.
why_remake() {
    local version
    if ! version="$(python_version "$SASA_VENV/bin/python")"; then
        echo 'its Python does not start'
    elif ! is_tried "$version"; then
        echo "its Python is $version, and 3.10 to 3.13 are supported"
    elif [[ ! -d "$SASA_VENV/lib/python$version" ]]; then
        echo "its Python is now $version, and was another version when it was made"
    elif ! "$SASA_VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        echo 'its pip does not start'
    elif ! grep -qsF -- "$SASA_VENV/bin/" "$SASA_VENV/bin/pip"; then
        echo 'it was moved here from another folder'
    fi
}

make_venv() {
    local base why
    if [[ -e "$SASA_VENV" ]]; then
        why="$(why_remake)"
        [[ -n "$why" ]] || return 0
        [[ -f "$SASA_LOG" ]] || give_up "$SASA_VENV cannot be used, and was not made by this script: $why." \
            'Remove it, or name a Python that has all packages: SASA_PYTHON=/path/to/python.'
        say "making $SASA_VENV anew: $why"
    fi
    base="$(find_base_python)"
    rm -rf "$SASA_VENV"
    mkdir "$SASA_VENV"
    step "virtual environment with $("$base" --version)" '10 s' "$base" -m venv "$SASA_VENV"
}

# step NAME EXPECTED COMMAND...: run the command, print its time, show the log's end if it fails.
step() {
    local name="$1" expected="$2" begin=$SECONDS beat status=0 output
    shift 2
    say "$name ($expected) ..."
    printf '\n== %s: %s\n' "$name" "$*" >>"$SASA_LOG"
    output=$(($(wc -c <"$SASA_LOG") + 1))
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
        output="$(tail -c "+$output" "$SASA_LOG")"
        [[ ! "$output" =~ (NewConnection|NameResolution|ConnectTimeout|Proxy)Error ||
            ! "$output" =~ 'No matching distribution'|'Could not install packages due to' ]] ||
            give_up "$name failed, as pip cannot reach its package index; see $SASA_LOG." \
                'Run the same command again with a network, or with PIP_INDEX_URL=https://a.mirror/simple.'
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
# check_torch REQUIREMENT: refuse a version that sasa_det does not support.
check_torch() {
    local why
    why="$("$SASA_VENV/bin/python" "$ROOT/sasa_det/environment/stack.py" check "$1" 2>&1)" || give_up "$why"
}

mmcv_build() { PYTHONPATH="$ROOT" "$SASA_VENV/bin/python" -m sasa_det.environment.mmcv_build "$@"; }
# Print why mmcv's source does not build as it is. The fork's does.
obstacles() { [[ "$SASA_MMCV" != mmcv ]] || mmcv_build obstacles; }

# Say whether pip's cache has mmcv's wheel for this Python.
is_cached() {
    local wheel
    wheel="$(pin "$SASA_MMCV")"
    wheel="${wheel//-/_}"
    [[ "$("$SASA_VENV/bin/python" -m pip cache list "$SASA_MMCV" 2>/dev/null)" == \
        *"${wheel/==/-}-cp$(python_version "$SASA_VENV/bin/python" | tr -d .)-"* ]]
}

# Before each download: what mmcv's build needs.
need_compiler() {
    local version why
    version="$(python_version "$SASA_VENV/bin/python")"
    command -v "${CXX:-g++}" >/dev/null ||
        give_up "${CXX:-g++} was not found; it is needed once, to build mmcv." \
            "Install it (Debian, Ubuntu: apt install g++ python$version-dev) and run the same command again."
    has_headers "$SASA_VENV/bin/python" ||
        give_up "Python $version lacks its header Python.h, which is needed to build mmcv." \
            "Install it (Debian, Ubuntu: apt install python$version-dev) and run the same command again."
    [[ -n "${MAX_JOBS:-}" ]] || why="$(mmcv_build jobs 2>&1)" || give_up "$why."
}

# In a subshell, so that the temporary folder goes however it ends.
build_mmcv() (
    place="$(mktemp -d)" || exit
    trap 'rm -rf "$place"' EXIT
    trap 'exit 130' INT TERM
    jobs="${MAX_JOBS:-$(mmcv_build jobs)}" || exit
    export MMCV_WITH_OPS=1 MAX_JOBS="$jobs"
    # torch knows compilers by their names, and does not quote them. The wrapper is for gcc only, and the
    # folder may forbid to run what is in it.
    cp "$ROOT/tools/pch_cxx.sh" "$place/g++"
    if [[ -z "${CXX:-}" && "$place" != *[[:space:]]* &&
        "$("$place/g++" --version 2>/dev/null)" == *'Free Software Foundation'* ]]; then
        export CXX="$place/g++" SASA_PCH_DIR="$place"
    fi
    source="$(pin "$SASA_MMCV")"
    if [[ -n "$(obstacles)" ]]; then
        source="$place/mmcv"
        mmcv_build source "$source" || exit
    fi
    pip_install --no-build-isolation "$@" "$source"
)

forget_mmcv() { "$SASA_VENV/bin/python" -m pip cache remove "$SASA_MMCV" >>"$SASA_LOG" 2>&1 || true; }

install_mmcv() {
    local why rebuild=()
    ops_import && return
    why="$(obstacles)"
    [[ -z "$why" ]] || say "$why: its source is mended before the build, see $SASA_LOG"
    if [[ -z "$why" ]] && is_cached; then
        step "$(pin "$SASA_MMCV") with its ops, from pip's cache" '1 min' build_mmcv
        ops_import && return
        say "pip's cached $SASA_MMCV does not import, as it lacks ops or was built with another torch"
        forget_mmcv
    fi
    need_compiler
    # One that is installed but does not import would satisfy pip.
    ! "$SASA_VENV/bin/python" -m pip show --quiet "$SASA_MMCV" 2>/dev/null ||
        rebuild=(--force-reinstall --no-deps --no-binary "$SASA_MMCV")
    step "$(pin "$SASA_MMCV") with its ops" 'about 4 min on 2 cores' build_mmcv ${rebuild[@]+"${rebuild[@]}"}
    ops_import || give_up "mmcv was built, but \`import mmcv.ops\` fails; see $SASA_LOG."
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
    say "making $SASA_VENV complete; this is done once and may be interrupted"
    # What cannot work is refused before anything is downloaded.
    command -v flock >/dev/null || say 'flock was not found: start no second set-up here before this one ends'
    make_venv
    [[ -z "${SASA_TORCH:-}" ]] || check_torch "$SASA_TORCH"
    ops_import || { is_cached && [[ -z "$(obstacles)" ]]; } || need_compiler
    rm -f "$SASA_STAMP"
    # mmcv's build needs torch and pkg_resources, which newer setuptools lack. torch refuses Python's
    # own older setuptools, and would install the newest.
    step 'build tools' '10 s' pip_install 'setuptools>=77.0.3,<81' wheel ninja
    local torch="${SASA_TORCH:-$(pin torch)}"
    # shellcheck disable=SC2086  # options beside the requirement are meant to be split
    step "$torch" '1 min and the download' pip_install $torch
    check_torch "torch==$("$SASA_VENV/bin/python" -c 'from importlib.metadata import version; print(version("torch"))')"
    install_mmcv
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
        local version
        version="$(python_version "$SASA_PYTHON")" || give_up "SASA_PYTHON=$SASA_PYTHON is not a Python that starts."
        [[ "$version" =~ ^3\.[1-9][0-9]$ ]] ||
            give_up "SASA_PYTHON=$SASA_PYTHON is Python $version, and sasa_det needs 3.10 or later."
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
    : 2>/dev/null >>"$SASA_VENV.lock" || give_up "$SASA_VENV.lock cannot be written." \
        'Use a checkout that you may write to, or name a Python that has all packages: SASA_PYTHON=/path/to/python.'
    exec 9>"$SASA_VENV.lock"
    if command -v flock >/dev/null && ! flock -n 9; then
        say 'another set-up is at work here; waiting for it'
        flock 9
    fi
    is_complete || complete_venv
    exec 9>&-
}

set_up "$@"
