// Before the attention of many rows: norm and rotation of the new queries and keys; keys and values into the cache.
#pragma once

#include "attention_cache.cuh"

namespace qwen {

constexpr int kPrepareWarps = 8, kPrepareRows = 2 * kPrepareWarps;  // of a block

// A warp makes two rows of D values, one block of the grid's second axis those of a sequence and kv head: queries, keys, values.
// queries [B,Hkv,padded rows,D], row token * G + head of the group; rows behind the last token are zeros.
template <typename T, typename Cache, int D>
__global__ void __launch_bounds__(kPrepareWarps * 32) attention_prepare(AttentionShape shape, AttentionTensors<T> in, float eps, T* queries, int padded_rows) {
  using Row = LaneRow<T, D>;
  wait_for_previous();
  let_next_start();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, G = shape.group(), Hkv = shape.Hkv;
  const int pair = blockIdx.y, b = pair / Hkv, h = pair - b * Hkv, length = length_of(shape, in, b);
  struct Job {
    const T* source;
    T* made;              // of a query
    unsigned char* kept;  // of a key or a value
    int t;
    bool query, value;
  };
  auto job_of = [&](int row) {
    Job job{};
    job.query = row < padded_rows, job.value = row >= padded_rows + shape.T;
    job.t = job.query ? row / G : row - padded_rows - (job.value ? shape.T : 0);
    const size_t token = size_t(b) * shape.T + job.t;
    if (job.query) {
      job.made = queries + (size_t(pair) * padded_rows + row) * D;
      if (job.t < shape.T) job.source = in.q + token * shape.q_stride + (h * G + row - job.t * G) * D;
    } else if (job.t < shape.T) {
      job.kept = (job.value ? in.v_cache : in.k_cache) + (size_t(pair) * shape.S + length + job.t) * kCacheRow<Cache, D>;
      job.source = (job.value ? in.v : in.k) + token * shape.kv_stride + h * D;
    }
    return job;
  };
  Job jobs[2];
  Row x[2];
  Turn<T, D> turn[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    jobs[i] = job_of(blockIdx.x * kPrepareRows + i * kPrepareWarps + warp);
    x[i] = Row{};
    if (jobs[i].source == nullptr) continue;
    x[i] = Row::of(jobs[i].source, lane);
    const size_t angle = b * shape.table_stride + size_t(length + jobs[i].t) * (shape.R / 2);
    if (!jobs[i].value) turn[i] = Turn<T, D>::of(jobs[i].query ? in.q_norm : in.k_norm, in.cos, in.sin, angle, shape.R, lane);
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (jobs[i].made == nullptr && jobs[i].kept == nullptr) continue;
    if (jobs[i].source != nullptr && !jobs[i].value) x[i] = turn[i](x[i], shape.R, eps, lane);
    if (jobs[i].made != nullptr) x[i].store(jobs[i].made, lane);
    else Cache::template keep<T, D>(x[i], jobs[i].kept, lane);
  }
}

}  // namespace qwen
