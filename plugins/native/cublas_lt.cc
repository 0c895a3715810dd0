#include "cublas_lt.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"

namespace qwen {
namespace {

// As in cublasLt.h and library_types.h, whose values are part of the binary interface.
enum Attribute { kTransA = 3, kTransB = 4, kScaleA = 17, kScaleB = 18, kScaleModeA = 31, kScaleModeB = 32 };  // CUBLASLT_MATMUL_DESC_*
enum Preference { kMostWorkspace = 1, kReductions = 3, kAlignmentA = 5, kAlignmentB, kAlignmentC, kAlignmentD };  // CUBLASLT_MATMUL_PREF_*
constexpr int kScaleVec128 = 4, kScaleBlock128 = 5;  // CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F, _BLK128x128_32F
constexpr uint32_t kInFp32 = 3;                      // CUBLASLT_REDUCTION_SCHEME_INPLACE, _COMPUTE_TYPE: no parts of a sum in 16 bits
constexpr int kPlain = 0, kTransposed = 1;           // CUBLAS_OP_N, CUBLAS_OP_T
constexpr int kFloat = 0, kHalf = 2, kBfloat16 = 14, kE4m3 = 28, kCompute32 = 68;
constexpr size_t kWithBlockScales = 120900;
constexpr uint64_t kWorkspace = 32 << 20;
constexpr uint32_t kAlignment = 16;
constexpr size_t kMostPlans = 4096;
constexpr int kCandidates = 8;                    // algorithms that are asked for, best first; the library gives no more
constexpr int64_t kWorthAKernel = 150000000000;  // M * N * K from which a better kernel gains its 3 ms in one prompt of some 30 layers

static_assert(next_class(16) == 24 && next_class(24) == 32 && next_class(128) == 144 && next_class(144) == 192 && next_class(1536) == 2048);

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
  int (*check)(Handle, Handle, Handle, Handle, Handle, Handle, const void* algorithm, Found*);
  int (*get_config)(const void* algorithm, int attribute, void*, size_t, size_t* written);
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
    f.complete = load(f.version, "cublasLtGetVersion") && load(f.create_product, "cublasLtMatmulDescCreate") &&
                 load(f.set_product, "cublasLtMatmulDescSetAttribute") && load(f.destroy_product, "cublasLtMatmulDescDestroy") &&
                 load(f.create_layout, "cublasLtMatrixLayoutCreate") && load(f.destroy_layout, "cublasLtMatrixLayoutDestroy") &&
                 load(f.create_preference, "cublasLtMatmulPreferenceCreate") && load(f.set_preference, "cublasLtMatmulPreferenceSetAttribute") &&
                 load(f.destroy_preference, "cublasLtMatmulPreferenceDestroy") && load(f.heuristic, "cublasLtMatmulAlgoGetHeuristic") &&
                 load(f.check, "cublasLtMatmulAlgoCheck") &&
                 load(f.get_config, "cublasLtMatmulAlgoConfigGetAttribute") && load(f.multiply, "cublasLtMatmul");
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
  Description(const LtShape& shape, const float* x_scales, const float* w_scales) {
    const int type = shape.element == Element::kHalf ? kHalf : kBfloat16, given = shape.fp8 ? kE4m3 : type;
    valid_ = f_.create_product(&product, kCompute32, kFloat) == 0 && set(kTransA, kTransposed) && set(kTransB, kPlain) &&
             (!shape.fp8 || (set(kScaleModeA, kScaleBlock128) && set(kScaleModeB, kScaleVec128) && set(kScaleA, w_scales) && set(kScaleB, x_scales))) &&
             f_.create_layout(&w, given, shape.K, shape.N, shape.K) == 0 && f_.create_layout(&x, given, shape.K, shape.M, shape.K) == 0 &&
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

// What the scales are is not read when a plan is made, but that there are some is.
const float* const kSomewhere = reinterpret_cast<const float*>(uintptr_t(256));

// What the library would take for the shape, best first.
std::vector<Found> candidates(Handle handle, const LtShape& shape, int wanted) {
  const Functions& f = library();
  const Description described(shape, kSomewhere, kSomewhere);
  Handle preference = nullptr;
  if (!described.valid() || f.create_preference(&preference) != 0) return {};
  bool set = f.set_preference(preference, kMostWorkspace, &kWorkspace, sizeof(kWorkspace)) == 0 &&
             f.set_preference(preference, kReductions, &kInFp32, sizeof(kInFp32)) == 0;
  for (int alignment : {kAlignmentA, kAlignmentB, kAlignmentC, kAlignmentD})
    set = set && f.set_preference(preference, alignment, &kAlignment, sizeof(kAlignment)) == 0;
  std::vector<Found> found(wanted);
  int count = 0;
  const int status =
      f.heuristic(handle, described.product, described.w, described.x, described.y, described.y, preference, wanted, found.data(), &count);
  f.destroy_preference(preference);
  found.resize(set && status == 0 ? count : 0);
  found.erase(std::remove_if(found.begin(), found.end(), [](const Found& one) { return one.status != 0; }), found.end());
  return found;
}

// Whether the shape may have an algorithm of another number of rows; its workspace becomes that of the shape.
bool takes(Handle handle, const LtShape& shape, Found& algorithm) {
  const Description described(shape, kSomewhere, kSomewhere);
  Found found{};
  if (!described.valid()) return false;
  const int status = library().check(handle, described.product, described.w, described.x, described.y, described.y, algorithm.algorithm, &found);
  algorithm.workspace = found.workspace;
  return status == 0 && found.status == 0 && found.workspace <= kWorkspace;
}

// What of an algorithm decides on its kernel: all but how often k is divided and the order of the tiles.
using Kernel = std::array<uint32_t, 8>;

Kernel kernel_of(const Found& found) {
  // CUBLASLT_ALGO_CONFIG_ID, TILE_ID, REDUCTION_SCHEME, CUSTOM_OPTION, STAGES_ID, INNER_SHAPE_ID, CLUSTER_SHAPE_ID; SPLITK_NUM
  constexpr int kAttributes[] = {0, 1, 3, 5, 6, 7, 8, 2}, kWide[] = {4, 4, 4, 4, 4, 2, 2, 4};
  Kernel kernel{};
  for (size_t i = 0; i < kernel.size(); i++) {
    size_t written = 0;
    library().get_config(found.algorithm, kAttributes[i], &kernel[i], kWide[i], &written);
  }
  kernel.back() = kernel.back() > 1;
  return kernel;
}

class Plans {
 public:
  LtPlan get(Handle handle, const LtShape& shape) {
    const Functions& f = library();
    if (!f.complete || (shape.fp8 && f.version() < kWithBlockScales)) return {};
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    const std::lock_guard<std::mutex> lock(mutex_);
    if (plans_.size() > kMostPlans) plans_.clear();
    const auto key = std::make_tuple(device, shape.fp8, shape.element, shape.N, shape.K, shape.stride);
    const auto known = plans_.find({key, shape.M});
    if (known != plans_.end()) return known->second;
    return plans_[{key, shape.M}] = make(handle, shape, classes_of(handle, key, shape));
  }

 private:
  using Product = std::tuple<int, bool, Element, int, int, int>;

  struct Classes {
    std::map<int, Found> algorithms;  // by rows
    std::set<Kernel> kernels;
  };

  const Classes& classes_of(Handle handle, const Product& key, LtShape shape) {
    const auto [at, is_new] = classes_.try_emplace(key);
    Classes& classes = at->second;
    if (!is_new) return classes;
    for (shape.M = 16; shape.M <= kMostClassRows; shape.M = next_class(shape.M)) {
      for (const Found& best : candidates(handle, shape, 1)) classes.algorithms[shape.M] = best, classes.kernels.insert(kernel_of(best));
    }
    return classes;
  }

  static LtPlan make(Handle handle, const LtShape& shape, const Classes& classes) {
    const std::vector<Found> found = candidates(handle, shape, kCandidates);
    const auto loaded = std::find_if(found.begin(), found.end(), [&](const Found& one) { return classes.kernels.count(kernel_of(one)) > 0; });
    if (loaded != found.end()) return plan_of(*loaded);
    const auto own = classes.algorithms.lower_bound(shape.M);
    if (own != classes.algorithms.end() && int64_t(shape.M) * shape.N * shape.K < kWorthAKernel) {
      Found algorithm = own->second;
      if (takes(handle, shape, algorithm)) return plan_of(algorithm);
    }
    return found.empty() ? LtPlan{} : plan_of(found.front());
  }

  static LtPlan plan_of(const Found& found) {
    LtPlan plan;
    plan.found = true, plan.workspace = found.workspace;
    std::memcpy(plan.algorithm, found.algorithm, sizeof(plan.algorithm));
    return plan;
  }

  std::mutex mutex_;
  std::map<Product, Classes> classes_;
  std::map<std::pair<Product, int>, LtPlan> plans_;
};

}  // namespace

LtPlan lt_plan(void* handle, const LtShape& shape) {
  static Plans plans;
  return plans.get(handle, shape);
}

void lt_product(void* handle, const LtPlan& plan, const LtShape& shape, const void* x, const float* x_scales, const void* w, const float* w_scales,
                const void* residual, void* y, void* workspace, cudaStream_t stream) {
  const Description described(shape, x_scales, w_scales);
  if (!described.valid()) throw std::runtime_error("cuBLASLt takes no such product");
  const float one = 1.0f, beta = residual != nullptr ? 1.0f : 0.0f;
  const void* added = residual != nullptr ? residual : y;
  const int status = library().multiply(handle, described.product, &one, w, described.w, x, described.x, &beta, added, described.y, y, described.y,
                                        plan.algorithm, workspace, plan.workspace, stream);
  if (status != 0) throw std::runtime_error("cublasLtMatmul failed with status " + std::to_string(status));
}

}  // namespace qwen
