// Declares a kernel class to ONNX Runtime as a custom op of the CPU execution provider.
#pragma once

#include "call.h"

namespace qwen {

// One character an input or output: f fp32, h bf16, e fp16, b uint8, c int8, i int32, l int64; ? after an input: it may be left out.
struct Signature {
  const char* name;
  const char* inputs;
  const char* outputs;
};

inline ONNXTensorElementDataType element_of(char c) {
  switch (c) {
    case 'f': return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    case 'h': return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    case 'e': return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case 'b': return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    case 'c': return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
    case 'i': return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    case 'l': return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
  }
  throw std::logic_error("unknown element type in a signature");
}

// Adapts a kernel class, which has a constructor from Ort::ConstKernelInfo (for attributes) and `void compute(Call&)`, reporting failure by an
// exception.
template <typename Kernel>
struct Instance {
  explicit Instance(const OrtKernelInfo* info) : kernel(Ort::ConstKernelInfo(info)) {}
  void Compute(OrtKernelContext* context) {
    Call call(context);
    kernel.compute(call);
  }
  Kernel kernel;
};

template <typename Kernel>
struct Operator : Ort::CustomOpBase<Operator<Kernel>, Instance<Kernel>> {
  explicit Operator(Signature signature) : name_(signature.name) {
    for (const char* c = signature.inputs; *c; c++) {
      if (*c == '?') {
        optional_.back() = true;
      } else {
        inputs_.push_back(element_of(*c));
        optional_.push_back(false);
      }
    }
    for (const char* c = signature.outputs; *c; c++) outputs_.push_back(element_of(*c));
  }

  void* CreateKernel(const OrtApi&, const OrtKernelInfo* info) const { return new Instance<Kernel>(info); }
  const char* GetName() const { return name_; }
  const char* GetExecutionProviderType() const { return "CPUExecutionProvider"; }
  size_t GetInputTypeCount() const { return inputs_.size(); }
  ONNXTensorElementDataType GetInputType(size_t index) const { return inputs_[index]; }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
    return optional_[index] ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  }
  size_t GetOutputTypeCount() const { return outputs_.size(); }
  ONNXTensorElementDataType GetOutputType(size_t index) const { return outputs_[index]; }

 private:
  const char* name_;
  std::vector<ONNXTensorElementDataType> inputs_, outputs_;
  std::vector<bool> optional_;
};

}  // namespace qwen
