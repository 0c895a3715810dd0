// The custom ops of domain qwen.native for ONNX Runtime's CUDA execution provider. Each op exists for fp16 and bf16, DeltaNet for fp32 too.

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "cublas.h"
#include "delta_net.cuh"
#include "rows.cuh"
#include "skinny.cuh"
#include "top_logits.cuh"

namespace {

constexpr const char* kDomain = "qwen.native";
constexpr const char* kProvider = "CUDAExecutionProvider";
// What KernelContext_GetResource calls the cuBLAS handle (onnxruntime/core/providers/cuda/cuda_resource.h, not part of every package).
constexpr int kResourceVersion = 3, kCublasHandle = 10002;

template <typename T>
struct Type;
template <>
struct Type<float> {
  static constexpr ONNXTensorElementDataType onnx = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
};
template <>
struct Type<__half> {
  static constexpr ONNXTensorElementDataType onnx = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  static constexpr qwen::Element element = qwen::Element::kHalf;
};
template <>
struct Type<__nv_bfloat16> {
  static constexpr ONNXTensorElementDataType onnx = ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
  static constexpr qwen::Element element = qwen::Element::kBfloat16;
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
    qwen::check(cudaGetDevice(&device), "cudaGetDevice");
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

void expect(bool condition, const char* sentence) {
  if (!condition) throw std::runtime_error(sentence);
}

int rows_of(const std::vector<int64_t>& shape) {
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < shape.size(); i++) rows *= shape[i];
  return static_cast<int>(rows);
}

// x [...,K], w [N,K], residual [...,N]?, norm [K]?  ->  y [...,N]
template <typename T>
class LinearKernel {
 public:
  explicit LinearKernel(const OrtKernelInfo* info) : eps_(Ort::ConstKernelInfo(info).GetAttribute<float>("epsilon")) {}

  void Compute(OrtKernelContext* context) {
    Call call(context);
    auto shape = call.shape(0);
    const auto weight = call.shape(1);
    expect(!shape.empty() && weight.size() == 2 && shape.back() == weight[1], "Linear: x [...,K] and w [N,K] do not fit");
    expect(weight[0] % 8 == 0 && weight[1] % 8 == 0, "Linear: N and K must be multiples of 8");
    const int M = rows_of(shape), N = static_cast<int>(weight[0]), K = static_cast<int>(weight[1]);
    const T *x = call.input<T>(0), *w = call.input<T>(1), *residual = call.optional<T>(2), *norm = call.optional<T>(3);
    shape.back() = N;
    T* y = call.output<T>(0, shape);
    if (M == 0) return;
    if (M <= qwen::kSkinnyRows) {
      qwen::skinny_linear(x, w, residual, norm, eps_, y, M, N, K, call.stream());
      return;
    }
    if (residual != nullptr && residual != y)
      qwen::check(cudaMemcpyAsync(y, residual, sizeof(T) * M * size_t(N), cudaMemcpyDeviceToDevice, call.stream()), "cudaMemcpyAsync");
    const float beta = residual != nullptr ? 1.0f : 0.0f;
    if (norm == nullptr) {
      qwen::product(call.cublas(), Type<T>::element, x, w, beta, y, M, N, K);
      return;
    }
    const Scratch normed(call, sizeof(T) * M * size_t(K));
    qwen::rms_norm(x, norm, eps_, normed.as<T>(), M, K, call.stream());
    qwen::product(call.cublas(), Type<T>::element, normed.as<T>(), w, beta, y, M, N, K);
  }

 private:
  float eps_;
};

// x [...,K], w [2N,K] (gate rows first), norm [K]?  ->  y [...,N]
template <typename T>
class SwiGluKernel {
 public:
  explicit SwiGluKernel(const OrtKernelInfo* info) : eps_(Ort::ConstKernelInfo(info).GetAttribute<float>("epsilon")) {}

  void Compute(OrtKernelContext* context) {
    Call call(context);
    auto shape = call.shape(0);
    const auto weight = call.shape(1);
    expect(!shape.empty() && weight.size() == 2 && shape.back() == weight[1], "SwiGlu: x [...,K] and w [2N,K] do not fit");
    expect(weight[0] % 16 == 0 && weight[1] % 8 == 0, "SwiGlu: N and K must be multiples of 8");
    const int M = rows_of(shape), N = static_cast<int>(weight[0] / 2), K = static_cast<int>(weight[1]);
    const T *x = call.input<T>(0), *w = call.input<T>(1), *norm = call.optional<T>(2);
    shape.back() = N;
    T* y = call.output<T>(0, shape);
    if (M == 0) return;
    if (M <= qwen::kSkinnyRows) {
      qwen::skinny_swiglu(x, w, norm, eps_, y, M, N, K, call.stream());
      return;
    }
    const size_t hidden = size_t(M) * 2 * N;
    const Scratch scratch(call, sizeof(T) * (hidden + (norm != nullptr ? size_t(M) * K : 0)));
    T* h = scratch.as<T>();
    if (norm != nullptr) {
      qwen::rms_norm(x, norm, eps_, h + hidden, M, K, call.stream());
      x = h + hidden;
    }
    qwen::product(call.cublas(), Type<T>::element, x, w, 0.0f, h, M, 2 * N, K);
    qwen::gate(h, y, M, N, call.stream());
  }

 private:
  float eps_;
};

// packed [B,T,C+Hv*D+2Hv] (qkv | z | a | b), conv [C,4], a_log f32[Hv], dt_bias f32[Hv], norm [D], history [B,3,C],
// state f32[B,Hv,D,D] (V-major), and for a transaction pending [B,P,width], accepted i64[B], commit i64[B]
//   ->  y [B,T,Hv*D], history', state'
template <typename T>
class DeltaNetKernel {
 public:
  explicit DeltaNetKernel(const OrtKernelInfo* info) {
    const Ort::ConstKernelInfo given(info);
    eps_ = given.GetAttribute<float>("epsilon");
    key_heads_ = static_cast<int>(given.GetAttribute<int64_t>("key_heads"));
    qwen::check(cudaMalloc(&arrivals_, sizeof(int) * kArrivals), "cudaMalloc");
    qwen::check(cudaMemset(arrivals_, 0, sizeof(int) * kArrivals), "cudaMemset");
  }
  ~DeltaNetKernel() { cudaFree(arrivals_); }

  void Compute(OrtKernelContext* context) {
    Call call(context);
    const auto packed = call.shape(0), state = call.shape(6), history = call.shape(5);
    expect(packed.size() == 3 && state.size() == 4 && state[2] == state[3] && qwen::takes_head(state[3]), "DeltaNet: heads must have 64 or 128 values");
    qwen::DeltaNetShape shape{int(packed[0]), int(packed[1]), key_heads_, int(state[1]), 0, int(state[3])};
    expect(shape.Hv % shape.Hk == 0 && shape.width() == packed[2] && history[2] == shape.channels(), "DeltaNet: the packed projection does not fit the heads");
    expect(call.shape(1).back() == qwen::kTaps, "DeltaNet: the convolution must have 4 taps");
    const bool transaction = call.has(7);
    expect(transaction == call.has(8) && transaction == call.has(9), "DeltaNet: pending, accepted and commit are given together or not at all");
    if (transaction) {
      const auto pending = call.shape(7), sequences = std::vector<int64_t>{packed[0]};
      expect(pending.size() == 3 && pending[0] == packed[0] && pending[2] == packed[2], "DeltaNet: pending is not shaped like the packed projection");
      expect(call.shape(8) == sequences && call.shape(9) == sequences, "DeltaNet: accepted and commit have one number per sequence");
      shape.P = int(pending[1]);
    }
    qwen::DeltaNetTensors<T> tensors{call.input<T>(0),
                                     call.input<T>(1),
                                     call.input<float>(2),
                                     call.input<float>(3),
                                     call.input<T>(4),
                                     call.input<T>(5),
                                     call.input<float>(6),
                                     call.optional<T>(7),
                                     call.optional<int64_t>(8),
                                     call.optional<int64_t>(9),
                                     call.output<T>(0, {packed[0], packed[1], state[1] * state[3]}),
                                     call.output<T>(1, history),
                                     call.output<float>(2, state)};
    if (shape.B == 0) return;
    const size_t bytes = qwen::delta_net_workspace(shape);
    if (bytes == 0) {
      qwen::delta_net(shape, tensors, eps_, nullptr, arrivals_, kArrivals, call.stream());
      return;
    }
    const Scratch workspace(call, bytes);
    qwen::delta_net(shape, tensors, eps_, workspace.as<void>(), arrivals_, kArrivals, call.stream());
  }

 private:
  static constexpr int kArrivals = 256 * 64;  // sequences times key heads
  float eps_ = 0.0f;
  int key_heads_ = 0;
  int* arrivals_ = nullptr;
};

// logits f32 [...,V]  ->  values f32 [...,K], ids i32 [...,K]; K = min(attribute k, V)
class TopLogitsKernel {
 public:
  explicit TopLogitsKernel(const OrtKernelInfo* info) : k_(Ort::ConstKernelInfo(info).GetAttribute<int64_t>("k")) {
    expect(0 < k_ && k_ <= 64, "TopLogits: k is at most 64");
  }

  void Compute(OrtKernelContext* context) {
    Call call(context);
    auto shape = call.shape(0);
    expect(!shape.empty() && 0 < shape.back() && shape.back() < 1 << 30, "TopLogits: logits must be [...,V]");
    const int rows = rows_of(shape), V = static_cast<int>(shape.back()), K = std::min(static_cast<int>(k_), V);
    shape.back() = K;
    float* values = call.output<float>(0, shape);
    int32_t* ids = call.output<int32_t>(1, shape);
    if (rows == 0) return;
    const Scratch scratch(call, qwen::top_logits_scratch(rows, V));
    qwen::top_logits(call.input<float>(0), values, ids, rows, V, K, scratch.as<void>(), call.stream());
  }

 private:
  int64_t k_;
};

struct Signature {
  const char* name;
  const char* inputs;    // T: the op's type, f: fp32, i: int32, l: int64, ?: the input before may be left out
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
      default: return Type<T>::onnx;
    }
  }

  const char* name_;
  std::vector<ONNXTensorElementDataType> inputs_, outputs_;
  std::vector<bool> optional_;
};

template <typename T>
void add_delta_net(Ort::CustomOpDomain& domain) {
  static const Operator<T, DeltaNetKernel<T>> delta_net({"DeltaNet", "TTffTTfT?l?l?", "TTf"});
  domain.Add(&delta_net);
}

template <typename T>
void add_products(Ort::CustomOpDomain& domain) {
  static const Operator<T, LinearKernel<T>> linear({"Linear", "TTT?T?", "T"});
  static const Operator<T, SwiGluKernel<T>> swiglu({"SwiGlu", "TTT?", "T"});
  domain.Add(&linear);
  domain.Add(&swiglu);
}

void add_top_logits(Ort::CustomOpDomain& domain) {
  static const Operator<float, TopLogitsKernel> op({"TopLogits", "f", "fi"});
  domain.Add(&op);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr) return base->GetApi(1)->CreateStatus(ORT_FAIL, "this ONNX Runtime is older than the headers the plugin was built with");
  Ort::InitApi(api);
  try {
    static Ort::CustomOpDomain domain = [] {
      Ort::CustomOpDomain made(kDomain);
      add_products<__half>(made);
      add_products<__nv_bfloat16>(made);
      add_delta_net<float>(made);
      add_delta_net<__half>(made);
      add_delta_net<__nv_bfloat16>(made);
      add_top_logits(made);
      return made;
    }();
    Ort::UnownedSessionOptions(options).Add(domain);
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_FAIL, error.what());
  }
  return nullptr;
}
