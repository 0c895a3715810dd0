#!/bin/sh
# Builds libqwen_export_cpu.so in the folder above, where `qwen-export build --device cpu` finds it. Needs a C++17 compiler and nothing else.
#   CXX, CXXFLAGS   the compiler, gcc or clang, and its optimization
#   JOBS            files compiled at a time; default one per core
# Files in kernels/ are compiled once per instruction set, those in kernels/tiles/ for sets with tiles (isa.h).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
: "${CXX:=c++}" "${CXXFLAGS:=-O3}" "${JOBS:=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)}"
cd "$here" # a path with spaces is no part of the lines below
command -v "$CXX" >/dev/null || { echo "error: there is no C++ compiler $CXX. Install one (Debian, Ubuntu: apt install g++), or set CXX." >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

avx512=-mavx512f,-mavx512bw,-mavx512dq,-mavx512vl,-mavx512vnni,-mavx2,-mfma,-mf16c
sets=base: tile_sets=base: defines=
case $(uname -sm) in
  *x86_64) sets="base: avx2:-mavx2,-mfma,-mf16c avx512:$avx512" ;;
esac
# Tiles need a compiler and an assembler of 2020 or later, and Linux, which the library asks for them.
amx=$avx512,-mavx512bf16,-mamx-tile,-mamx-int8,-mamx-bf16
if [ "$(uname -sm)" = "Linux x86_64" ] && echo 'void f() { __asm__ volatile("tdpbf16ps %tmm2, %tmm1, %tmm0"); }' > "$work/probe.cc" &&
   "$CXX" $(echo "$amx" | tr ',' ' ') -c "$work/probe.cc" -o "$work/probe.o" 2> "$work/probe.log"; then
  tile_sets="base: amx:$amx" defines=-DQWEN_AMX
else
  echo "note: without kernels for AMX, which this compiler or system does not have"
fi
rm -f "$work/probe.o"

# Lines of the objects of $1 for the sets $2: name, source and flags.
objects() {
  for source in "$1"/*.cc; do
    for set in $2; do
      # gcc 12 warns about its own AVX-512 header.
      echo "$(basename "$source" .cc)_${set%%:*} $source -Wno-uninitialized -Wno-maybe-uninitialized $defines -DQWEN_SET=${set%%:*} $(echo "${set#*:}" | tr ',' ' ')"
    done
  done
}
{
  for source in *.cc; do echo "$(basename "$source" .cc) $source $defines"; done
  objects kernels "$sets"
  objects kernels/tiles "$tile_sets"
} > "$work/objects"

count=$(wc -l < "$work/objects" | tr -d ' ')
echo "compiling the CPU plugin: $count files, $JOBS at a time; about 20 s on 2 idle cores"
begun=$(date +%s)
export CXX CXXFLAGS work
# The line of one object is split into words on purpose.
# shellcheck disable=SC2016
xargs -P "$JOBS" -I LINE sh -c '
  set -f; set -- LINE; object=$1 source=$2; shift 2
  "$CXX" -std=c++17 $CXXFLAGS -fPIC -fvisibility=hidden -fno-math-errno -Wall -I. "$@" -c "$source" -o "$work/$object.o" || exit 255
' < "$work/objects"
# In one step, so that no build finds half a library.
"$CXX" -shared "$work"/*.o -o "$work/library"
mv "$work/library" ../libqwen_export_cpu.so
echo "compiled libqwen_export_cpu.so in $(($(date +%s) - begun)) s"
