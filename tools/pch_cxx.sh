#!/usr/bin/env bash
# A stand-in for g++ that builds PyTorch extensions of many small files several times as fast. It reads
# torch's headers once, as a precompiled header, instead of once per file, and leaves debugging data out.
# The code that comes out is the same. Calls that it cannot speed up go to g++ as they are.
#   CXX=/path/to/pch_cxx.sh SASA_PCH_DIR=/an/empty/folder pip install --no-build-isolation mmcv==2.1.0
# SASA_PCH_DIR   holds the precompiled header; remove it after the build
# SASA_REAL_CXX  the compiler to call; the default is g++
real="${SASA_REAL_CXX:-g++}"

compiles='' source='' flags=() skip=''
for argument in "$@"; do
    if [[ -n "$skip" ]]; then
        skip=''
        continue
    fi
    case "$argument" in
        -c) compiles=yes ;;
        -o | -MF | -MT | -MQ) skip=yes ;;
        -M*) ;;
        *.cpp) source="$argument" ;;
        *) flags+=("$argument") ;;
    esac
done
[[ -n "$compiles" && -n "$source" ]] || exec "$real" "$@"
# A binding to Python includes pybind11's headers before torch's. The other order would change its code.
if [[ -z "${SASA_PCH_DIR:-}" || "${source##*/}" == pybind.cpp ]] || ! command -v flock >/dev/null; then
    exec "$real" "$@" -g0
fi

# gcc takes a precompiled header only with the flags that it was made with: one for each set of flags.
folder="$SASA_PCH_DIR/$(printf '%s\n' "$real" "${flags[@]}" | cksum | tr ' ' -)"
header="$folder/torch_types.h"
make_header() {
    printf '#include <torch/types.h>\n' >"$header" || return
    # To another name first: what is cut short must not be found.
    "$real" "${flags[@]}" -g0 -w -Wfatal-errors -x c++-header "$header" -o "$folder/half" &&
        mv "$folder/half" "$header.gch" ||
        printf 'pch_cxx.sh: torch/types.h cannot be precompiled; %s reads it for each file\n' "$real" >&2
}
if [[ ! -e "$folder/tried" ]] && mkdir -p "$folder"; then
    # Parallel calls wait for the first.
    {
        flock 9
        [[ -e "$folder/tried" ]] || make_header 9>&-
        : >"$folder/tried"
    } 9>"$folder/lock"
fi
[[ -e "$header.gch" ]] || exec "$real" "$@" -g0
# Beside the .gch lies the same header as text, so nothing depends on gcc taking the .gch.
exec "$real" "$@" -g0 -include "$header"
