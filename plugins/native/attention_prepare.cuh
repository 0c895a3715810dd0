// Before the attention of many rows: norm and rotation of the new queries and keys; keys and values into the cache.
#pragma once

#include "attention_rows.cuh"

namespace qwen {

// One warp makes one row of D values. queries [B,Hkv,padded rows,D], row token * G + head of the group; rows behind the last token are zeros.
template <typename T, int D>
__global__ void __launch_bounds__(128) attention_prepare(AttentionShape shape, AttentionTensors<T> in, float eps, T* queries, int padded_rows) {
  using Row = LaneRow<T, D>;
  __shared__ float memory[4][D];
  wait_for_previous();
  let_next_start();
  const int lane = threadIdx.x % 32, G = shape.group(), Hkv = shape.Hkv;
  int64_t job = int64_t(blockIdx.x) * 4 + threadIdx.x / 32;
  const int64_t query_jobs = int64_t(shape.B) * Hkv * padded_rows;
  const bool query = job < query_jobs;
  int b, h, t, row = 0;
  bool value = false;
  if (query) {
    row = int(job % padded_rows), h = int(job / padded_rows % Hkv), b = int(job / padded_rows / Hkv);
    t = row / G;
  } else {
    job -= query_jobs;
    if (job >= int64_t(shape.B) * shape.T * 2 * Hkv) return;
    value = job % 2 != 0, h = int(job / 2 % Hkv), t = int(job / 2 / Hkv % shape.T), b = int(job / 2 / Hkv / shape.T);
  }
  T* made = queries + ((size_t(b) * Hkv + h) * padded_rows + row) * D;
  if (query && t >= shape.T) {
    Row{}.store(made, lane);
    return;
  }
  const size_t token = size_t(b) * shape.T + t;
  const int slot = length_of(shape, in, b) + t;
  const T* source = query ? in.q + token * shape.q_stride + (h * G + row % G) * D : (value ? in.v : in.k) + token * shape.kv_stride + h * D;
  if (!query) made = (value ? in.v_cache : in.k_cache) + ((size_t(b) * Hkv + h) * shape.S + slot) * D;
  Row x = Row::of(source, lane);
  if (!value) {
    const size_t angle = b * shape.table_stride + size_t(slot) * (shape.R / 2);
    const auto turn = Turn<T, D>::of(query ? in.q_norm : in.k_norm, in.cos, in.sin, angle, shape.R, lane);
    x = turn(x, shape.R, eps, memory[threadIdx.x / 32], lane);
  }
  x.store(made, lane);
}

}  // namespace qwen
