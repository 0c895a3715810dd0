#!/bin/sh
# Builds libqwen_export_cuda.so next to this script, where `qwen-export build --device cuda` finds it.
#   ORT_INCLUDE_DIR   folder of onnxruntime_cxx_api.h, from any ONNX Runtime release from 1.18 on; fetch_headers.py prints one.
#   NVCC, ARCHS       nvcc of CUDA 13 and the compute capabilities to build machine code for; newer devices compile the embedded PTX.
# cuBLAS is not linked: the library asks the process for the one that ONNX Runtime has loaded.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
: "${ORT_INCLUDE_DIR:?folder of onnxruntime_cxx_api.h, see the head of this script}"
: "${NVCC:=nvcc}" "${ARCHS:=80 89 90 120}"
code=""
for arch in $ARCHS; do code="$code -gencode=arch=compute_$arch,code=sm_$arch"; newest=$arch; done
# shellcheck disable=SC2086
exec "$NVCC" -O3 -std=c++17 -shared -cudart=static $code "-gencode=arch=compute_$newest,code=compute_$newest" \
  -Xcompiler=-fPIC,-fvisibility=hidden,-Wall -I"$ORT_INCLUDE_DIR" ${NVCC_FLAGS:-} \
  "$here/skinny.cu" "$here/rows.cu" "$here/delta_net.cu" "$here/top_logits.cu" "$here/cublas.cc" "$here/library.cc" -ldl -o "$here/libqwen_export_cuda.so"
