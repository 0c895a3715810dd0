// What every custom op of the CUDA plugin is made of: one call's stream and tensors, memory for the time of a call, and the form in which ONNX
// Runtime wants an op.
#pragma once

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "cublas.h"

namespace qwen {

inline constexpr const char* kProvider = "CUDAExecutionProvider";
// What KernelContext_GetResource calls the cuBLAS handle (onnxruntime/core/providers/cuda/cuda_resource.h, not part of every package).
inline constexpr int kResourceVersion = 3, kCublasHandle = 10002;

template <typename T>
struct Type;
template <>
struct Type<float> {
  static constexpr ONNXTensorElementDataType onnx = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
};
template <>
struct Type<__half> {
  static constexpr ONNXTensorElementDataType onnx = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  static constexpr Element element = Element::kHalf;
};
template <>
struct Type<__nv_bfloat16> {
  static constexpr ONNXTensorElementDataType onnx = ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
  static constexpr Element element = Element::kBfloat16;
};

// One call: its stream, its tensors, and memory that lasts as long as the call.
class Call {
 public:
  explicit Call(OrtKernelContext* context) : raw_(context), context_(context) {}

  cudaStream_t stream() const { return static_cast<cudaStream_t>(context_.GetGPUComputeStream()); }

  std::vector<int64_t> shape(size_t input) const { return context_.GetInput(input).GetTensorTypeAndShapeInfo().GetShape(); }

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
  E* output(size_t index, const std::vector<int64_t>& shape) {
    return static_cast<E*>(context_.GetOutput(index, shape).GetTensorMutableRawData());
  }

  void* cublas() const {
    void* handle = nullptr;
    Ort::ThrowOnError(Ort::GetApi().KernelContext_GetResource(raw_, kResourceVersion, kCublasHandle, &handle));
    if (handle == nullptr) throw std::runtime_error("the execution provider has no cuBLAS handle");
    return handle;
  }

  OrtAllocator* allocator() const {
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    const Ort::MemoryInfo info("Cuda", OrtDeviceAllocator, device, OrtMemTypeDefault);
    OrtAllocator* allocator = nullptr;
    Ort::ThrowOnError(Ort::GetApi().KernelContext_GetAllocator(raw_, info, &allocator));
    return allocator;
  }

 private:
  OrtKernelContext* raw_;
  Ort::KernelContext context_;
};

// Memory from the provider's arena. Freeing it after the launches is safe: whoever gets it next runs behind them in the same stream.
class Scratch {
 public:
  Scratch(const Call& call, size_t bytes) : allocator_(call.allocator()), memory_(allocator_->Alloc(allocator_, bytes)) {
    if (memory_ == nullptr) throw std::runtime_error("out of device memory for " + std::to_string(bytes) + " bytes of workspace");
  }
  ~Scratch() {
    allocator_->Free(allocator_, memory_);
    Ort::GetApi().ReleaseAllocator(allocator_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <typename E>
  E* as() const {
    return static_cast<E*>(memory_);
  }

 private:
  OrtAllocator* allocator_;
  void* memory_;
};

inline void expect(bool condition, const char* sentence) {
  if (!condition) throw std::runtime_error(sentence);
}

inline int rows_of(const std::vector<int64_t>& shape) {
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < shape.size(); i++) rows *= shape[i];
  return static_cast<int>(rows);
}

struct Signature {
  const char* name;
  const char* inputs;    // T: the op's type, f: fp32, l: int64, b: u8, i: int32, ?: the input before may be left out
  const char* outputs;
};

// KernelCompute has no other way to fail than an exception, which ONNX Runtime turns into the status of the run.
template <typename T, typename Kernel>
struct Operator : Ort::CustomOpBase<Operator<T, Kernel>, Kernel> {
  explicit Operator(Signature signature) : name_(signature.name) {
    for (const char* c = signature.inputs; *c; c++) {
      if (*c == '?') {
        optional_.back() = true;
      } else {
        inputs_.push_back(element(*c));
        optional_.push_back(false);
      }
    }
    for (const char* c = signature.outputs; *c; c++) outputs_.push_back(element(*c));
  }

  void* CreateKernel(const OrtApi&, const OrtKernelInfo* info) const { return new Kernel(info); }
  const char* GetName() const { return name_; }
  const char* GetExecutionProviderType() const { return kProvider; }
  size_t GetInputTypeCount() const { return inputs_.size(); }
  ONNXTensorElementDataType GetInputType(size_t index) const { return inputs_[index]; }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
    return optional_[index] ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  }
  size_t GetOutputTypeCount() const { return outputs_.size(); }
  ONNXTensorElementDataType GetOutputType(size_t index) const { return outputs_[index]; }

 private:
  static ONNXTensorElementDataType element(char c) {
    switch (c) {
      case 'f': return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
      case 'i': return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
      case 'l': return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
      case 'b': return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
      default: return Type<T>::onnx;
    }
  }

  const char* name_;
  std::vector<ONNXTensorElementDataType> inputs_, outputs_;
  std::vector<bool> optional_;
};

}  // namespace qwen
