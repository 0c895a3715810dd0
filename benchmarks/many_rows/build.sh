#!/bin/sh
# libbench.so and libmoe.so for micro.py (`python micro.py experts shared` on an H200).
native=$(cd "$(dirname "$0")/../../plugins/native" && pwd)
flags="-O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -DQWEN_SM90A -Xcompiler=-fPIC -cudart=static -I$native"
nvcc $flags -shared bench.cu "$native/quant.cu" -o libbench.so && nvcc $flags -shared bench_moe.cu -o libmoe.so
