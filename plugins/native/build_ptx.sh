#!/bin/sh
# Builds delta_net_step.ELEMENT.ptx next to this script, where `qwen-export build --target tensorrt --plugin gated_delta_net` finds them.
#   NVCC   nvcc of CUDA 13. The PTX is for SM 80 and newer; the driver that runs it must be of that CUDA or newer.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
: "${NVCC:=nvcc}"
for pair in float:float float16:__half bfloat16:__nv_bfloat16; do
  "$NVCC" -O3 -std=c++17 -ptx -arch=compute_80 "-DELEMENT=${pair#*:}" "$here/delta_net_step.cu" -o "$here/delta_net_step.${pair%%:*}.ptx"
done
