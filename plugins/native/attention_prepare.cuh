// Before attention: norm and rotation of the new queries and keys; keys and values into the cache.
#pragma once

#include "attention.cuh"
#include "attention_tile.cuh"

namespace qwen {

// One warp makes one row of D values. queries [B,Hkv,padded rows,D] in row tiles; rows behind the last token are zeros.
template <typename T, int D>
__global__ void __launch_bounds__(128) attention_prepare(AttentionShape shape, AttentionTensors<T> in, float eps, T* queries, int padded_rows) {
  constexpr int kItems = D / 32;
  __shared__ float rows[4][D];
  wait_for_previous();
  let_next_start();
  const int lane = threadIdx.x % 32, G = shape.group(), Hkv = shape.Hkv;
  float* x = rows[threadIdx.x / 32];
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
  const size_t token = size_t(b) * shape.T + t;
  T* tile = queries + ((size_t(b) * Hkv + h) * padded_rows + row / kRowTile * kRowTile) * D;
  if (query && t >= shape.T) {
#pragma unroll
    for (int i = 0; i < kItems; i++) tile[fragment_index<D>(row % kRowTile, lane * kItems + i)] = from_float<T>(0.0f);
    return;
  }
  const int64_t slot = length_of(shape, in, b) + t;
  const T* source = query ? in.q + token * shape.q_stride + (h * G + row % G) * D : (value ? in.v : in.k) + token * shape.kv_stride + h * D;
  struct alignas(kItems * sizeof(T)) Part {
    T item[kItems];
  };
  Part part = *reinterpret_cast<const Part*>(source + lane * kItems);
  const size_t place = ((size_t(b) * Hkv + h) * shape.S + slot) * D + lane * kItems;
  if (value) {
    *reinterpret_cast<Part*>(in.v_cache + place) = part;
    return;
  }
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kItems; i++) squares += to_float(part.item[i]) * to_float(part.item[i]);
  const float scale = rsqrtf(warp_sum(squares) / D + eps);
  const T* norm = query ? in.q_norm : in.k_norm;
#pragma unroll
  for (int i = 0; i < kItems; i++) x[lane * kItems + i] = to_float(part.item[i]) * scale * to_float(norm[lane * kItems + i]);
  __syncwarp();
  const int half = shape.R / 2;
  const size_t angle = b * shape.table_stride + slot * half;
#pragma unroll
  for (int i = 0; i < kItems; i++) {
    const int d = lane * kItems + i;
    float y = x[d];
    if (d < shape.R) {
      const int j = d < half ? d : d - half;
      const float other = d < half ? -x[d + half] : x[j];
      y = y * to_float(in.cos[angle + j]) + other * to_float(in.sin[angle + j]);
    }
    part.item[i] = from_float<T>(y);
  }
  if (!query) {
    *reinterpret_cast<Part*>(in.k_cache + place) = part;
    return;
  }
#pragma unroll
  for (int i = 0; i < kItems; i++) tile[fragment_index<D>(row % kRowTile, lane * kItems + i)] = part.item[i];
}

}  // namespace qwen
