#!/bin/sh
# Runs NVIDIA's compute-sanitizer over every kernel of libqwen_export_cuda.so, through onnxruntime-gpu, and over those of delta_net_step.cu:
# out-of-bounds and misaligned accesses, races in shared memory, barriers that not all threads reach, and memory that is read before it was
# written. One line per tool; exit code 1 on an error of any. The tools run side by side: about five minutes.
#   COMPUTE_SANITIZER   the program, from the CUDA toolkit or `pip install nvidia-cuda-sanitizer-api` (nvidia/cu13/bin)
#   PYTHON, OUT         interpreter with onnxruntime-gpu and pytest; folder for the logs
set -u
root=$(cd "$(dirname "$0")/../.." && pwd)
: "${COMPUTE_SANITIZER:=compute-sanitizer}" "${PYTHON:=python3}" "${OUT:=${TMPDIR:-/tmp}}"

# Small shapes that launch each kernel at least once: steps and prompts of the recurrence, few and many rows of the products.
recurrence="(test_delta_net and (2-4-64 or 1-3-128)) or (test_a_transaction_is_the_op and 1-3-64 and float16)"
plugin="(test_a_step or test_a_verify) and (2-4-64 or 1-3-128)"
top="(test_on_cuda and (300 or 5000) and lost)"
products="(test_linear and (24-40 or 1024-2048)) or (test_swiglu and 40-24)"
quantized="(test_quant_linear and (24-40 or 296-416)) or test_quant_gather or test_quant_moe"
fp8="(test_linear and 296-416) or (test_swiglu and float16) or test_gather or (test_experts and 16)"
mixture="(test_the_sum and (True-3-264 or False-1-9000)) or (test_the_norm and 8-264) or test_equal_logits or test_a_row_has_the_same_bits_in_any_company"
attention="(test_ragged_calls and (1-4-2-256 or 1-9-2-256)) or test_many_chunks_of_a_long_past"
many="(test_products_of_many_rows and (4-32 or 8-32)) or (test_few_rows and (128 or 2048))"
every="($recurrence or ($plugin) or $top or $products or $quantized or $fp8 or $mixture or $attention or $many) and not bfloat16"

# check TOOL SECONDS SELECTION [OPTION...]
check() {
  tool=$1 seconds=$2 selection=$3 log=$OUT/sanitize-$1.log
  shift 3
  begun=$(date +%s)
  (cd "$root" && timeout "$seconds" "$COMPUTE_SANITIZER" --tool "$tool" --error-exitcode 9 --target-processes all --print-limit 20 "$@" \
    "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu -o addopts=--import-mode=importlib -k "$selection" \
    tests/test_native_plugin.py tests/test_native_quantized.py tests/test_fp8_gpu.py tests/test_top_logits.py tests/test_delta_net_plugin_gpu.py \
    tests/test_shared_expert_sum_gpu.py tests/test_mixture_gpu.py tests/test_gated_attention_gpu.py \
    tests/test_chain_gpu.py) > "$log" 2>&1
  code=$?
  [ $code -eq 124 ] && summary="not finished after $seconds s" || summary=$(grep -o '[A-Z ]*SUMMARY: .*' "$log" | tail -1)
  tests=$(grep -oE '[0-9]+ (passed|failed).*' "$log" | tail -1)
  echo "$tool: exit code $code; ${summary:-no summary}; ${tests:-no tests}; $(($(date +%s) - begun)) s; $log"
  return $code
}

# All of our kernels have qwen in their names; those of ONNX Runtime and cuBLAS run unchecked.
ours="--kernel-name kernel_substring=qwen"
# shellcheck disable=SC2086
{
  check memcheck "${MEMCHECK_S:-480}" "$every" $ours & memcheck=$!
  # Without the products: racecheck 2025.3.1 stops in them with an exception of its own ("failed to handle a hardware exception").
  check racecheck "${RACECHECK_S:-90}" "($recurrence or ($plugin) or $top or test_quant_gather) and not bfloat16" $ours & racecheck=$!
  # Barriers of asynchronous copies: the tool tracks too few of them by default.
  check synccheck "${SYNCCHECK_S:-480}" "$every" $ours --num-cuda-barriers 65536 & synccheck=$!
  # Unfiltered: what an unchecked kernel has written would count as not written.
  check initcheck "${INITCHECK_S:-90}" "($recurrence or ($plugin) or $top) and not bfloat16" & initcheck=$!
}
failed=0
for tool in $memcheck $racecheck $synccheck $initcheck; do wait "$tool" || failed=1; done
exit $failed
