#!/bin/sh
# Compiles the benchmark next to this script, for compute capability 9.0.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
native=$here/../../plugins/native
exec "${NVCC:-nvcc}" -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -DQWEN_SM90A -I "$native" -o "$here/bench" "$here/bench.cu" \
  "$native/chain.cu" "$native/delta_net.cu" "$native/quant.cu" "$native/skinny.cu"
