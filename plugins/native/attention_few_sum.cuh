// How the sums of the chunks of a sequence and head become its rows. One block would read for long what all have written: each of those whose chunks
// were complete last adds up a slice of the values, when it has read one more item, or has no more and waits for the others.
//
// No block depends on others to run at the same time: who waits gives up after a while, and then the block of the last chunk adds up all of it.
// A value is added up in the same order whoever does it.
#pragma once

#include <climits>

#include "attention_few_plan.cuh"

namespace qwen {

// Where the rows of an item come from and go to: y = o * sigmoid(gate).
template <typename T, int D>
struct FewOutput {
  const T* gate;
  T* y;
  int G, gate_stride, y_stride;
  float per_head;  // 1 / G

  static __device__ FewOutput of(const AttentionShape& shape, const AttentionTensors<T>& in, const FewPlan& plan, int sequence, int h) {
    const size_t token = size_t(sequence) * shape.T;
    const int G = shape.group(), y_stride = shape.Hq * D;
    return {in.gate + token * shape.gate_stride + h * G * D, in.y + token * y_stride + h * G * D, G, shape.gate_stride, y_stride, plan.per_head};
  }

  // Of four values of a row of the sequence.
  __device__ uint2 gate_of(int row, int d) const {
    const int t = divided(row, per_head);
    return __ldcg(reinterpret_cast<const uint2*>(gate + size_t(t) * gate_stride + (row - t * G) * D + d));
  }

  __device__ void write(int row, int d, float4 o, uint2 gate_bits) const {
    const int t = divided(row, per_head);
    union {
      uint2 bits;
      T item[4];
    } open, out;
    open.bits = gate_bits;
    out.item[0] = from_float<T>(o.x * opened(to_float(open.item[0]))), out.item[1] = from_float<T>(o.y * opened(to_float(open.item[1])));
    out.item[2] = from_float<T>(o.z * opened(to_float(open.item[2]))), out.item[3] = from_float<T>(o.w * opened(to_float(open.item[3])));
    *reinterpret_cast<uint2*>(y + size_t(t) * y_stride + (row - t * G) * D + d) = out.bits;
  }
};

__device__ inline void add_scaled(float4& o, float factor, float4 x) {
  o.x = fmaf(factor, x.x, o.x), o.y = fmaf(factor, x.y, o.y), o.z = fmaf(factor, x.z, o.z), o.w = fmaf(factor, x.w, o.w);
}

// Four values of a row over some slots.
struct FewSum {
  float4 o;
  float largest, sum;

  __device__ void join(float4 x, float2 w) {
    const float top = fmaxf(largest, w.x), keep = largest == -INFINITY ? 0.0f : power_of_two(largest - top);
    const float factor = w.x == -INFINITY ? 0.0f : power_of_two(w.x - top);
    o.x *= keep, o.y *= keep, o.z *= keep, o.w *= keep;
    add_scaled(o, factor, x);
    largest = top, sum = fmaf(factor, w.y, keep * sum);
  }
};

// How a sequence and head of some chunks is added up: `parts` of the chunks, whose sums are loaded at the same time, by `columns` threads each.
struct FewSlices {
  static constexpr int kTogether = 12;  // chunks of a part
  int parts, columns, count;            // count: of slices of `columns` float4s

  static __device__ FewSlices of(int chunks, int values, int threads) {
    const int parts = (chunks + kTogether - 1) / kTogether, columns = parts == 1 ? threads : threads >> (32 - __clz(parts - 1));
    return {parts, columns, (values + columns - 1) / columns};
  }
};

// What a counter of a sequence and head has: chunks that are complete, blocks that did not wait for all, and blocks that are done with it.
constexpr unsigned kOneArrived = 1, kOneRefused = 1u << 10, kOneLeft = 1u << 20, kCountMask = (1u << 10) - 1;
constexpr int kPolls = 2000;  // some 0.7 ms: much more than chunks of a call are apart, unless other work has the processors

__device__ inline unsigned add_to_counter(unsigned* counter, unsigned amount) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0,[%1],%2;" : "=r"(before) : "l"(counter), "r"(amount) : "memory");
  return before;
}

// A block that is done. The last one makes the counter zero.
__device__ inline void leave_counter(unsigned* counter, int helpers) {
  if (int(add_to_counter(counter, kOneLeft) / kOneLeft) == helpers - 1) *counter = 0;
}

// By one thread: the slices that its block adds up, when all chunks are complete. `before`: what the counter had when the block's own was.
__device__ inline FewShare wait_for_share(unsigned* counter, unsigned before, int chunks, int slices) {
  constexpr FewShare kNone{INT_MAX, 1};
  const int helpers = min(chunks, slices), later = chunks - 1 - int(before & kCountMask);  // later: chunks
  if (later == 0) return before / kOneRefused & kCountMask ? FewShare{0, 1} : FewShare{0, helpers};
  if (later >= helpers) return kNone;
  bool complete = false;
#pragma unroll 1
  for (int i = 0; i < kPolls && !complete; i++) {
    unsigned now;
    asm volatile("ld.acquire.gpu.global.u32 %0,[%1];" : "=r"(now) : "l"(counter) : "memory");
    complete = int(now & kCountMask) == chunks;
  }
  if (!complete) complete = int(add_to_counter(counter, kOneRefused) & kCountMask) == chunks;
  if (complete) return {later, helpers};
  leave_counter(counter, helpers);
  return kNone;
}

// Adds up slices of a sequence and head. `partial` and `weights` are those of its first chunk; chunks are `stride` rows apart;
// `room` is shared memory of few_sum_bytes.
template <int D, int THREADS, typename Output>
__device__ inline void add_up(const FewSlices& slices, FewShare share, const float* partial, const float2* weights, int stride, int chunks, int first_row, int rows,
                              const Output& output, unsigned char* room, int thread) {
  float4* const sums = reinterpret_cast<float4*>(room);
  float2* const tops = reinterpret_cast<float2*>(sums + THREADS);
  const int part = thread / slices.columns, column = thread % slices.columns, each = (chunks + slices.parts - 1) / slices.parts;
  const int first = part * each, end = min(chunks, first + each);
#pragma unroll 1
  for (int slice = share.first; slice < slices.count; slice += share.step) {
    const int at = slice * slices.columns + column, row = at / (D / 4), d = at % (D / 4) * 4;
    const bool there = row < rows, mine = there && part == 0;
    uint2 gate{};
    if (mine) gate = output.gate_of(first_row + row, d);
    FewSum sum{make_float4(0.0f, 0.0f, 0.0f, 0.0f), -INFINITY, 0.0f};
    if (there && first < end) {
      float4 x[FewSlices::kTogether];
      float2 w[FewSlices::kTogether];
#pragma unroll
      for (int i = 0; i < FewSlices::kTogether; i++) {
        const int c = first + i;
        w[i] = make_float2(-INFINITY, 0.0f), x[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (c >= end) continue;
        w[i] = __ldcg(weights + size_t(c) * stride + row);
        x[i] = __ldcg(reinterpret_cast<const float4*>(partial + (size_t(c) * stride + row) * D + d));
      }
#pragma unroll
      for (int i = 0; i < FewSlices::kTogether; i++) sum.largest = fmaxf(sum.largest, w[i].x);
#pragma unroll
      for (int i = 0; i < FewSlices::kTogether; i++) {
        const float factor = w[i].x == -INFINITY ? 0.0f : power_of_two(w[i].x - sum.largest);
        sum.sum = fmaf(factor, w[i].y, sum.sum);
        add_scaled(sum.o, factor, x[i]);
      }
    }
    if (slices.parts > 1) {
      sums[thread] = sum.o, tops[thread] = make_float2(sum.largest, sum.sum);
      __syncthreads();
      if (mine) {
#pragma unroll 1
        for (int p = 1; p < slices.parts; p++) sum.join(sums[p * slices.columns + column], tops[p * slices.columns + column]);
      }
      __syncthreads();
    }
    if (mine) {
      const float scale = inverse_of(sum.sum);
      output.write(first_row + row, d, make_float4(sum.o.x * scale, sum.o.y * scale, sum.o.z * scale, sum.o.w * scale), gate);
    }
  }
}

}  // namespace qwen
