// What an op sees of one call: its tensors and the session's threads.
#pragma once

#include "../custom_op.h"

namespace qwen {

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
    ensure(runtime->KernelContext_ParallelFor(context_, run, count, count, const_cast<Task*>(&task)));
  }

 private:
  OrtKernelContext* context_;
};

class Call : public Tensors {
 public:
  explicit Call(OrtKernelContext* context) : Tensors(context), parallel(context) {}

  const Parallel parallel;
};

}  // namespace qwen
