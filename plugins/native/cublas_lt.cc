#include "cublas_lt.h"

#include <dlfcn.h>

#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "check.h"

namespace qwen {
namespace {

// As in cublasLt.h and library_types.h, whose values are part of the binary interface.
enum Attribute { kTransA = 3, kTransB = 4, kScaleA = 17, kScaleB = 18, kScaleModeA = 31, kScaleModeB = 32 };  // CUBLASLT_MATMUL_DESC_*
enum Preference { kMostWorkspace = 1, kAlignmentA = 5, kAlignmentB, kAlignmentC, kAlignmentD };                // CUBLASLT_MATMUL_PREF_*
constexpr int kScaleVec128 = 4, kScaleBlock128 = 5;  // CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F, _BLK128x128_32F
constexpr int kPlain = 0, kTransposed = 1;           // CUBLAS_OP_N, CUBLAS_OP_T
constexpr int kFloat = 0, kHalf = 2, kBfloat16 = 14, kE4m3 = 28, kCompute32 = 68;
constexpr size_t kWithBlockScales = 120900;
constexpr uint64_t kWorkspace = 32 << 20;
constexpr uint32_t kAlignment = 16;
constexpr size_t kMostPlans = 4096;

using Handle = void*;

struct Found {  // cublasLtMatmulHeuristicResult_t
  uint64_t algorithm[8];
  size_t workspace;
  int status;
  float waves;
  int reserved[4];
};

struct Functions {
  size_t (*version)();
  int (*create_product)(Handle*, int compute, int scale);
  int (*set_product)(Handle, int, const void*, size_t);
  int (*destroy_product)(Handle);
  int (*create_layout)(Handle*, int type, uint64_t rows, uint64_t columns, int64_t stride);
  int (*destroy_layout)(Handle);
  int (*create_preference)(Handle*);
  int (*set_preference)(Handle, int, const void*, size_t);
  int (*destroy_preference)(Handle);
  int (*heuristic)(Handle, Handle, Handle, Handle, Handle, Handle, Handle, int wanted, Found*, int* found);
  int (*multiply)(Handle, Handle, const void* alpha, const void* a, Handle, const void* b, Handle, const void* beta, const void* c, Handle, void* d,
                  Handle, const void* algorithm, void* workspace, size_t, cudaStream_t);
  bool complete = false;
};

Functions find() {
  Functions f{};
  for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"}) {
    void* library = dlopen(name, RTLD_NOW | RTLD_NOLOAD);
    if (library == nullptr) continue;
    const auto load = [&](auto& function, const char* symbol) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, symbol));
      return function != nullptr;
    };
    f.complete = load(f.version, "cublasLtGetVersion") && f.version() >= kWithBlockScales && load(f.create_product, "cublasLtMatmulDescCreate") &&
                 load(f.set_product, "cublasLtMatmulDescSetAttribute") && load(f.destroy_product, "cublasLtMatmulDescDestroy") &&
                 load(f.create_layout, "cublasLtMatrixLayoutCreate") && load(f.destroy_layout, "cublasLtMatrixLayoutDestroy") &&
                 load(f.create_preference, "cublasLtMatmulPreferenceCreate") && load(f.set_preference, "cublasLtMatmulPreferenceSetAttribute") &&
                 load(f.destroy_preference, "cublasLtMatmulPreferenceDestroy") && load(f.heuristic, "cublasLtMatmulAlgoGetHeuristic") &&
                 load(f.multiply, "cublasLtMatmul");
    break;
  }
  return f;
}

const Functions& library() {
  static const Functions functions = find();
  return functions;
}

// The descriptions of a product. cuBLASLt counts columns first: y^T [N,M] = (w^T)^T x^T.
class Description {
 public:
  Description(const Fp8Shape& shape, const float* x_scales, const float* w_scales) {
    const int type = shape.element == Element::kHalf ? kHalf : kBfloat16;
    valid_ = f_.create_product(&product, kCompute32, kFloat) == 0 && set(kTransA, kTransposed) && set(kTransB, kPlain) &&
             set(kScaleModeA, kScaleBlock128) && set(kScaleModeB, kScaleVec128) && set(kScaleA, w_scales) && set(kScaleB, x_scales) &&
             f_.create_layout(&w, kE4m3, shape.K, shape.N, shape.K) == 0 && f_.create_layout(&x, kE4m3, shape.K, shape.M, shape.K) == 0 &&
             f_.create_layout(&y, type, shape.N, shape.M, shape.stride) == 0;
  }
  ~Description() {
    if (product) f_.destroy_product(product);
    for (Handle layout : {w, x, y}) {
      if (layout) f_.destroy_layout(layout);
    }
  }
  Description(const Description&) = delete;
  Description& operator=(const Description&) = delete;

  bool valid() const { return valid_; }
  Handle product = nullptr, w = nullptr, x = nullptr, y = nullptr;

 private:
  template <typename Value>
  bool set(int attribute, Value value) {
    return f_.set_product(product, attribute, &value, sizeof(value)) == 0;
  }

  const Functions& f_ = library();
  bool valid_ = false;
};

Fp8Plan make(Handle handle, const Fp8Shape& shape) {
  const Functions& f = library();
  Fp8Plan plan;
  if (!f.complete) return plan;
  // What the scales are is not read yet, but that there are some is.
  const float* somewhere = reinterpret_cast<const float*>(uintptr_t(256));
  const Description described(shape, somewhere, somewhere);
  Handle preference = nullptr;
  if (!described.valid() || f.create_preference(&preference) != 0) return plan;
  bool set = f.set_preference(preference, kMostWorkspace, &kWorkspace, sizeof(kWorkspace)) == 0;
  for (int alignment : {kAlignmentA, kAlignmentB, kAlignmentC, kAlignmentD})
    set = set && f.set_preference(preference, alignment, &kAlignment, sizeof(kAlignment)) == 0;
  Found found{};
  int count = 0;
  const int status = f.heuristic(handle, described.product, described.w, described.x, described.y, described.y, preference, 1, &found, &count);
  f.destroy_preference(preference);
  if (!set || status != 0 || count < 1 || found.status != 0) return plan;
  plan.found = true;
  std::memcpy(plan.algorithm, found.algorithm, sizeof(plan.algorithm));
  plan.workspace = found.workspace;
  return plan;
}

}  // namespace

Fp8Plan fp8_plan(void* handle, const Fp8Shape& shape) {
  static std::mutex mutex;
  static std::map<std::tuple<int, Element, int, int, int, int>, Fp8Plan> plans;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  if (plans.size() > kMostPlans) plans.clear();
  const auto key = std::make_tuple(device, shape.element, shape.M, shape.N, shape.K, shape.stride);
  const auto known = plans.find(key);
  return known != plans.end() ? known->second : plans[key] = make(handle, shape);
}

void fp8_product(void* handle, const Fp8Plan& plan, const Fp8Shape& shape, const uint8_t* x, const float* x_scales, const uint8_t* w,
                 const float* w_scales, float beta, void* y, void* workspace, cudaStream_t stream) {
  const Description described(shape, x_scales, w_scales);
  if (!described.valid()) throw std::runtime_error("cuBLASLt takes no product of FP8 matrices");
  const float one = 1.0f;
  const int status = library().multiply(handle, described.product, &one, w, described.w, x, described.x, &beta, y, described.y, y, described.y,
                                        plan.algorithm, workspace, plan.workspace, stream);
  if (status != 0) throw std::runtime_error("cublasLtMatmul failed with status " + std::to_string(status));
}

}  // namespace qwen
