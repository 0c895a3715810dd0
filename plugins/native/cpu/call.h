// What an op sees of one call: its tensors and the session's threads.
#pragma once

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <cstdint>
#include <stdexcept>
#include <vector>

namespace qwen {

using Shape = std::vector<int64_t>;

// Throws std::runtime_error, which the ops hand to ONNX Runtime as the status of the run.
inline void expect(bool condition, const char* sentence) {
  if (!condition) throw std::runtime_error(sentence);
}

// The product of all sizes but the last.
inline int64_t rows_of(const Shape& shape) {
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < shape.size(); i++) rows *= shape[i];
  return rows;
}

// Runs task(0) .. task(count - 1) on the session's threads, each thread taking the next one, and returns when all are done. `task` must not
// throw. Starting costs some microseconds.
class Parallel {
 public:
  explicit Parallel(OrtKernelContext* context) : context_(context) {}

  template <typename Task>
  void operator()(size_t count, const Task& task) const {
    if (count == 0) return;
    if (count == 1) return task(size_t(0));
    const auto run = [](void* data, size_t index) { (*static_cast<const Task*>(data))(index); };
    Ort::ThrowOnError(Ort::GetApi().KernelContext_ParallelFor(context_, run, count, count, const_cast<Task*>(&task)));
  }

 private:
  OrtKernelContext* context_;
};

class Call {
 public:
  explicit Call(OrtKernelContext* context) : parallel(context), context_(context) {}

  Shape shape(size_t input) const { return context_.GetInput(input).GetTensorTypeAndShapeInfo().GetShape(); }

  template <typename E>
  const E* input(size_t index) const {
    return static_cast<const E*>(context_.GetInput(index).GetTensorRawData());
  }

  bool has(size_t index) const { return index < context_.GetInputCount() && context_.GetInput(index); }

  // A left-out input is null.
  template <typename E>
  const E* optional(size_t index) const {
    return has(index) ? input<E>(index) : nullptr;
  }

  template <typename E>
  E* output(size_t index, const Shape& shape) {
    return static_cast<E*>(context_.GetOutput(index, shape).GetTensorMutableRawData());
  }

  const Parallel parallel;

 private:
  Ort::KernelContext context_;
};

}  // namespace qwen
