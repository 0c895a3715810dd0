#!/bin/sh
# Builds libqwen_export_cpu.so in the folder above, where `qwen-export build --device cpu` finds it.
#   ORT_INCLUDE_DIR   folder of onnxruntime_cxx_api.h; ../fetch_headers.py prints one. `make native` does both.
#   CXX, CXXFLAGS     a C++17 compiler, gcc or clang
# Files in kernels/ are compiled once per instruction set (isa.h).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
: "${ORT_INCLUDE_DIR:?folder of onnxruntime_cxx_api.h, see the head of this script}"
: "${CXX:=c++}" "${CXXFLAGS:=-O3}"
command -v "$CXX" >/dev/null || { echo "there is no C++ compiler $CXX" >&2; exit 1; }
jobs=""
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

compile() { # object, source, flags...
  object=$1 source=$2; shift 2
  # shellcheck disable=SC2086
  "$CXX" -std=c++17 $CXXFLAGS -fPIC -fvisibility=hidden -fno-math-errno -Wall -I"$ORT_INCLUDE_DIR" -I"$here" "$@" -c "$source" -o "$work/$object.o"
}

for source in "$here"/*.cc; do compile "$(basename "$source" .cc)" "$source" & jobs="$jobs $!"; done
case $(uname -m) in
  x86_64) sets="base: avx2:-mavx2,-mfma,-mf16c avx512:-mavx512f,-mavx512bw,-mavx512dq,-mavx512vl,-mavx512vnni,-mavx2,-mfma,-mf16c" ;;
  *) sets="base:" ;;
esac
for source in "$here"/kernels/*.cc; do
  [ -e "$source" ] || continue
  for set in $sets; do
    # shellcheck disable=SC2046
    # gcc 12 warns about its own AVX-512 header.
    compile "$(basename "$source" .cc)_${set%%:*}" "$source" -Wno-uninitialized -Wno-maybe-uninitialized "-DQWEN_SET=${set%%:*}" $(echo "${set#*:}" | tr ',' ' ') &
    jobs="$jobs $!"
  done
done
for job in $jobs; do wait "$job"; done
# In one step, so that nobody loads half a library.
"$CXX" -shared "$work"/*.o -o "$work/library"
mv "$work/library" "$here/../libqwen_export_cpu.so"
