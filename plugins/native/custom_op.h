// Custom ops for ONNX Runtime: the tensors of one call, the attributes of a node, and the form in which ONNX Runtime takes an op. Both plugins
// use this; call.h and operator.h of each add what belongs to its device.
#pragma once

#include <climits>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "onnxruntime_abi.h"

namespace qwen {

// The functions of the ONNX Runtime that loaded the library; set once, by `register_ops`.
inline const OrtApi* runtime = nullptr;

// Throws std::runtime_error for a status that is an error.
inline void ensure(OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = runtime->GetErrorMessage(status);
  runtime->ReleaseStatus(status);
  throw std::runtime_error(message);
}

// The ops report failure by an exception, which becomes the status of the run.
inline void expect(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(message);
}

// Runs `body` and returns its exception as a status, null where there is none. No exception may leave the library.
template <typename Body>
OrtStatus* status_of(const Body& body) {
  try {
    body();
  } catch (const std::exception& error) {
    return runtime->CreateStatus(OrtError::kFail, error.what());
  } catch (...) {
    return runtime->CreateStatus(OrtError::kFail, "unknown error in a native kernel");
  }
  return nullptr;
}

using Shape = std::vector<int64_t>;

// The product of all sizes but the last.
inline int64_t rows_of(const Shape& shape) {
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < shape.size(); i++) rows *= shape[i];
  return rows;
}

// The attributes of a node, or of a part of one: those that begin with `prefix`.
class Attributes {
 public:
  explicit Attributes(const OrtKernelInfo* info) : info_(info) {}

  Attributes of_part(const std::string& prefix) const {
    Attributes part(info_);
    part.prefix_ = prefix_ + prefix;
    return part;
  }

  float real(const std::string& name) const {
    float value = 0.0f;
    ensure(runtime->KernelInfoGetAttribute_float(info_, (prefix_ + name).c_str(), &value));
    return value;
  }

  int64_t integer(const std::string& name) const {
    int64_t value = 0;
    ensure(runtime->KernelInfoGetAttribute_int64(info_, (prefix_ + name).c_str(), &value));
    return value;
  }

  std::string text(const std::string& name) const {
    size_t size = 0;  // with the zero at the end
    ensure(runtime->KernelInfoGetAttribute_string(info_, (prefix_ + name).c_str(), nullptr, &size));
    std::string value(size, '\0');
    ensure(runtime->KernelInfoGetAttribute_string(info_, (prefix_ + name).c_str(), value.data(), &size));
    value.resize(size > 0 ? size - 1 : 0);
    return value;
  }

 private:
  const OrtKernelInfo* info_;
  std::string prefix_;
};

// A tensor that is at hand: what a node that stands for several gives to one of them. One that is left out is not `given`.
struct TensorAt {
  bool given = false;
  Shape shape;
  void* data = nullptr;
};

// Inputs and outputs of one call of a node, or of a part of one: then they are at hand.
class Tensors {
 public:
  explicit Tensors(OrtKernelContext* context) : context_(context) {}
  // Both lists must outlive it.
  Tensors(OrtKernelContext* context, const std::vector<TensorAt>& inputs, const std::vector<TensorAt>& outputs)
      : context_(context), inputs_(&inputs), outputs_(&outputs) {}

  Shape shape(size_t input) const {
    if (inputs_ != nullptr) return at(*inputs_, input).shape;
    OrtTensorTypeAndShapeInfo* info = nullptr;
    ensure(runtime->GetTensorTypeAndShape(value(input), &info));
    size_t rank = 0;
    OrtStatus* status = runtime->GetDimensionsCount(info, &rank);
    Shape sizes(status == nullptr ? rank : 0);
    if (status == nullptr) status = runtime->GetDimensions(info, sizes.data(), rank);
    runtime->ReleaseTensorTypeAndShapeInfo(info);
    ensure(status);
    return sizes;
  }

  template <typename E>
  const E* input(size_t index) const {
    if (inputs_ != nullptr) return static_cast<const E*>(at(*inputs_, index).data);
    // The function takes a mutable value; it changes nothing.
    return static_cast<const E*>(data(const_cast<OrtValue*>(value(index))));
  }

  bool has(size_t index) const {
    if (inputs_ != nullptr) return index < inputs_->size() && (*inputs_)[index].given;
    size_t count = 0;
    ensure(runtime->KernelContext_GetInputCount(context_, &count));
    return index < count && value(index) != nullptr;
  }

  // A left-out input is null.
  template <typename E>
  const E* optional(size_t index) const {
    return has(index) ? input<E>(index) : nullptr;
  }

  template <typename E>
  E* output(size_t index, const Shape& shape) {
    if (outputs_ != nullptr) {
      expect(at(*outputs_, index).shape == shape, "a part of a node makes a result of another shape");
      return static_cast<E*>((*outputs_)[index].data);
    }
    OrtValue* value = nullptr;
    ensure(runtime->KernelContext_GetOutput(context_, index, shape.data(), shape.size(), &value));
    return static_cast<E*>(data(value));
  }

 protected:
  OrtKernelContext* context_;

 private:
  static const TensorAt& at(const std::vector<TensorAt>& tensors, size_t index) {
    expect(index < tensors.size() && tensors[index].given, "a part of a node lacks a tensor");
    return tensors[index];
  }

  const OrtValue* value(size_t index) const {
    const OrtValue* value = nullptr;
    ensure(runtime->KernelContext_GetInput(context_, index, &value));
    return value;
  }

  static void* data(OrtValue* value) {
    void* data = nullptr;
    ensure(runtime->GetTensorMutableData(value, &data));
    return data;
  }

  const std::vector<TensorAt> *inputs_ = nullptr, *outputs_ = nullptr;
};

// One character an input or output: f fp32, h bf16, e fp16, 8 fp8 e4m3, b uint8, c int8, i int32, l int64, T the op's own type; ? after an
// input or output: it may be left out.
struct Signature {
  const char* name;
  const char* inputs;
  const char* outputs;
};

// Declares a kernel class to ONNX Runtime as a custom op of the execution provider `provider`. `Kernel` has a constructor from const
// Attributes& and `void compute(Call&)`; `Call` is made from the context of a call. Op objects live as long as the library.
template <typename Kernel, typename Call>
class CustomOp : public OrtCustomOp {
 public:
  CustomOp(const char* provider, OrtElement own, Signature signature) : OrtCustomOp{}, name_(signature.name), provider_(provider) {
    inputs_ = tensors_of(signature.inputs, own);
    outputs_ = tensors_of(signature.outputs, own);
    version = kOrtApiVersion;
    GetName = [](const OrtCustomOp* op) { return self(op).name_; };
    GetExecutionProviderType = [](const OrtCustomOp* op) { return self(op).provider_; };
    GetInputTypeCount = [](const OrtCustomOp* op) { return self(op).inputs_.size(); };
    GetInputType = [](const OrtCustomOp* op, size_t index) { return self(op).inputs_[index].element; };
    GetOutputTypeCount = [](const OrtCustomOp* op) { return self(op).outputs_.size(); };
    GetOutputType = [](const OrtCustomOp* op, size_t index) { return self(op).outputs_[index].element; };
    GetInputCharacteristic = [](const OrtCustomOp* op, size_t index) {
      return self(op).inputs_[index].characteristic;
    };
    GetOutputCharacteristic = [](const OrtCustomOp* op, size_t index) { return self(op).outputs_[index].characteristic; };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemoryKind::kDefault; };
    GetVariadicInputMinArity = GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicInputHomogeneity = GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return INT_MAX; };
    CreateKernelV2 = [](const OrtCustomOp*, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
      return status_of([&] { *kernel = new Kernel(Attributes(info)); });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return status_of([&] {
        Call call(context);
        static_cast<Kernel*>(kernel)->compute(call);
      });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  }

 private:
  struct Formal {
    OrtElement element;
    OrtCharacteristic characteristic = OrtCharacteristic::kRequired;
  };

  static std::vector<Formal> tensors_of(const char* signature, OrtElement own) {
    std::vector<Formal> tensors;
    for (const char* c = signature; *c; c++) {
      if (*c == '?') {
        tensors.back().characteristic = OrtCharacteristic::kOptional;
      } else {
        tensors.push_back({element_of(*c, own)});
      }
    }
    return tensors;
  }

  static const CustomOp& self(const OrtCustomOp* op) { return *static_cast<const CustomOp*>(op); }

  static OrtElement element_of(char c, OrtElement own) {
    switch (c) {
      case 'f': return OrtElement::kFloat;
      case 'h': return OrtElement::kBfloat16;
      case 'e': return OrtElement::kFloat16;
      case '8': return OrtElement::kFloat8E4m3;
      case 'b': return OrtElement::kUint8;
      case 'c': return OrtElement::kInt8;
      case 'i': return OrtElement::kInt32;
      case 'l': return OrtElement::kInt64;
      case 'T': return own;
    }
    throw std::logic_error("unknown element type in a signature");
  }

  const char *name_, *provider_;
  std::vector<Formal> inputs_, outputs_;
};

// The domain of the ops of a library.
class Domain {
 public:
  explicit Domain(const char* name) { ensure(runtime->CreateCustomOpDomain(name, &domain_)); }
  void add(const OrtCustomOp& op) { ensure(runtime->CustomOpDomain_Add(domain_, &op)); }
  void register_in(OrtSessionOptions* options) const { ensure(runtime->AddCustomOpDomain(options, domain_)); }

 private:
  OrtCustomOpDomain* domain_ = nullptr;  // not released: sessions keep it as long as the process lives
};

// What a library's RegisterCustomOps does. `fill` adds the ops to the domain; it runs once per process.
template <typename Fill>
OrtStatus* register_ops(OrtSessionOptions* options, const OrtApiBase* base, const Fill& fill) {
  const OrtApi* api = base->GetApi(kOrtApiVersion);
  if (api == nullptr) return base->GetApi(1)->CreateStatus(OrtError::kFail, "the plugin needs ONNX Runtime 1.18 or newer");
  runtime = api;
  return status_of([&] {
    static const Domain domain = [&] {
      Domain made("qwen.native");
      fill(made);
      return made;
    }();
    domain.register_in(options);
  });
}

}  // namespace qwen
