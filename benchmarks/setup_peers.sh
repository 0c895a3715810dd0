#!/bin/sh
# Make .venv-peers, the environment of the peers that the benchmarks compare with. Run from anywhere; does nothing when it is complete.
# Usage: benchmarks/setup_peers.sh [cpu|cuda]
set -eu
cd "$(dirname "$0")/.."
device=${1:-cpu}
python=${PYTHON:-python3}

if [ -x .venv-peers/bin/python ] && .venv-peers/bin/python -c "import onnxruntime_genai, transformers, torch" 2>/dev/null; then
    exit 0
fi
"$python" -m venv .venv-peers
if [ "$device" = cuda ]; then
    packages="onnxruntime-gpu==1.31.1 onnxruntime-genai-cuda==0.18.0"
else
    packages="onnxruntime==1.31.1 onnxruntime-genai==0.18.0"
fi
# One resolution with torch pinned: left to itself the resolver takes the newest CUDA build, several gigabytes.
# The builder only reads weights through torch, so the CPU build serves both devices; TORCH_INDEX names an index that has it.
# shellcheck disable=SC2086
.venv-peers/bin/pip install --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
    torch==2.13.0 transformers==5.17.0 $packages onnx_ir onnx safetensors tqdm
