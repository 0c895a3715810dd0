// What every custom op of the CUDA plugin is made of: one call's stream and tensors, memory for the time of a call, and the element types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "check.h"
#include "cublas.h"
#include "custom_op.h"

namespace qwen {

// How KernelContext_GetResource identifies the cuBLAS handle (onnxruntime/core/providers/cuda/cuda_resource.h, not part of every package).
inline constexpr int kResourceVersion = 3, kCublasHandle = 10002;

template <typename T>
struct Type;
template <>
struct Type<float> {
  static constexpr OrtElement onnx = OrtElement::kFloat;
};
template <>
struct Type<__half> {
  static constexpr OrtElement onnx = OrtElement::kFloat16;
  static constexpr Element element = Element::kHalf;
};
template <>
struct Type<__nv_bfloat16> {
  static constexpr OrtElement onnx = OrtElement::kBfloat16;
  static constexpr Element element = Element::kBfloat16;
};

// One call: its stream, its tensors, and memory that lasts as long as the call.
class Call : public Tensors {
 public:
  using Tensors::Tensors;

  // The call of a part of a node, whose tensors are at hand.
  Call(const Call& node, const std::vector<TensorAt>& inputs, const std::vector<TensorAt>& outputs) : Tensors(node.context_, inputs, outputs) {}

  cudaStream_t stream() const {
    void* stream = nullptr;
    ensure(runtime->KernelContext_GetGPUComputeStream(context_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

  void* cublas() const {
    void* handle = nullptr;
    ensure(runtime->KernelContext_GetResource(context_, kResourceVersion, kCublasHandle, &handle));
    expect(handle != nullptr, "the execution provider has no cuBLAS handle");
    return handle;
  }

  const OrtKernelContext* context() const { return context_; }
};

// Memory from the provider's arena. Freeing it after the launches is safe: its next user runs behind them in the same stream.
// It is asked for in the stream's name. Memory that belongs to no stream goes to the next tensor of the stream when it is freed, and the
// arena has to grow for the next workspace: a large picture took the workspaces of all its layers.
class Scratch {
 public:
  Scratch(const Call& call, size_t bytes) {
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    OrtMemoryInfo* info = nullptr;
    ensure(runtime->CreateMemoryInfo("Cuda", OrtAllocatorKind::kDevice, device, OrtMemoryKind::kDefault, &info));
    OrtStatus* status = runtime->KernelContext_GetAllocator(call.context(), info, &allocator_);
    if (status == nullptr) status = runtime->KernelContext_GetScratchBuffer(call.context(), info, bytes, &memory_);
    runtime->ReleaseMemoryInfo(info);
    if (memory_ != nullptr) return;
    if (allocator_ != nullptr) runtime->ReleaseAllocator(allocator_);
    ensure(status);
    throw std::runtime_error("out of device memory for " + std::to_string(bytes) + " bytes of workspace");
  }
  ~Scratch() {
    allocator_->Free(allocator_, memory_);
    runtime->ReleaseAllocator(allocator_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <typename E>
  E* as() const {
    return static_cast<E*>(memory_);
  }

 private:
  OrtAllocator* allocator_ = nullptr;
  void* memory_ = nullptr;
};

template <typename T, typename Kernel>
struct Operator : CustomOp<Kernel, Call> {
  explicit Operator(Signature signature) : CustomOp<Kernel, Call>("CUDAExecutionProvider", Type<T>::onnx, signature) {}
};

}  // namespace qwen
