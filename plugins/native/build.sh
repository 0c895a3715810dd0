#!/bin/sh
# Builds libqwen_export_cuda.so next to this script, where `qwen-export build --device cuda` finds it. Needs nvcc of CUDA 13 and nothing else.
#   NVCC    the compiler
#   ARCHS   the compute capabilities to build machine code for; newer devices compile the embedded PTX
#   JOBS    sources compiled at a time; default one per core
# cuBLAS is not linked: the library finds the one that ONNX Runtime has loaded into the process.
# The CPU's library is built, too, where it is missing: it searches scales for builds of int4.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
: "${NVCC:=nvcc}" "${ARCHS:=80 89 90 120}" "${JOBS:=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)}"
command -v "$NVCC" >/dev/null || { echo "error: there is no CUDA compiler $NVCC. Install CUDA 13, or set NVCC." >&2; exit 1; }
code="" flags=""
for arch in $ARCHS; do
  newest=$arch
  # Compute capability 9.0 has instructions that only its own code may use: prompts do.
  if [ "$arch" = 90 ]; then arch=90a flags=-DQWEN_SM90A; fi
  code="$code -gencode=arch=compute_$arch,code=sm_$arch"
done
echo "compiling the CUDA plugin for compute capabilities $ARCHS; several minutes on 2 cores"
begun=$(date +%s)
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT
# delta_net_step.cu is for engines of TensorRT (build_ptx.sh).
# shellcheck disable=SC2086
printf '%s\n' "$here"/*.cu "$here"/*.cc | grep -v /delta_net_step | xargs -P "$JOBS" -I SOURCE sh -c 'out=$1; shift; "$@" -o "$out/$(basename SOURCE).o" -c SOURCE' - "$objects" \
  "$NVCC" -O3 -std=c++17 -cudart=static $code "-gencode=arch=compute_$newest,code=compute_$newest" \
  -Xcompiler=-fPIC,-fvisibility=hidden,-Wall $flags ${NVCC_FLAGS:-}
"$NVCC" -shared -cudart=static "$objects"/*.o -ldl -o "$here/libqwen_export_cuda.so"
echo "compiled libqwen_export_cuda.so in $(($(date +%s) - begun)) s"
[ -e "$here/libqwen_export_cpu.so" ] || sh "$here/cpu/build.sh" || echo "note: builds of int4 will take longer: without the CPU's library numpy searches scales" >&2
