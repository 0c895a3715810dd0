// The plan of a chain: which steps its products are, which block has which part of them, and where everything is in shared memory. DeltaNet mixers
// stay launches of their own: they have no weights to stream, and their many small reads would wait behind those of the products.

#include "chain.h"

#include <algorithm>
#include <memory>
#include <type_traits>

#include "chain_kernel.cuh"
#include "product_few.cuh"
#include "skinny.cuh"

namespace qwen {

ChainMemory::~ChainMemory() {
  for (void* memory : memory_) cudaFree(memory);
  if (joined_) ChainStreams::of_process().leave(device_);
}

ChainStart ChainMemory::start(cudaStream_t stream) {
  if (!joined_) check(cudaGetDevice(&device_), "cudaGetDevice");
  return ChainStreams::of_process().start(device_, stream, joined_);
}

uint8_t* ChainMemory::get(int M, size_t bytes, cudaStream_t stream) {
  void*& memory = memory_[M - 1];
  if (bytes <= bytes_[M - 1]) return static_cast<uint8_t*>(memory);
  cudaStreamCaptureStatus status;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  if (status != cudaStreamCaptureStatusNone) return nullptr;
  check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  check(cudaFree(memory), "cudaFree");
  memory = nullptr, bytes_[M - 1] = 0;
  check(cudaMalloc(&memory, bytes), "cudaMalloc");
  check(cudaMemsetAsync(memory, 0xFF, bytes, stream), "cudaMemsetAsync");  // in front of the chain, which may not be on the default stream
  bytes_[M - 1] = bytes;
  return static_cast<uint8_t*>(memory);
}

namespace {

struct Device {
  int blocks = 0;  // multiprocessors; 0: not for chains, which were measured on compute capability 9.0
  int shared = 0;
};

const Device& this_device() {
  static const Device device = [] {
    Device d;
    int index = 0, major = 0, cooperative = 0;
    check(cudaGetDevice(&index), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, index), "cudaDeviceGetAttribute");
    if (major != 9 || !cooperative) return d;
    check(cudaDeviceGetAttribute(&d.blocks, cudaDevAttrMultiProcessorCount, index), "cudaDeviceGetAttribute");
    d.shared = most_shared();
    return d;
  }();
  return device;
}

constexpr int up(int bytes) { return (bytes + 127) / 128 * 128; }

// With more rows, and in narrow models, separate launches are faster. Measured on an H200 by benchmarks/chains.
int most_rows(bool int4, int H) {
  if (H < 1024) return 0;
  if (H < 2048) return int4 ? 0 : 1;
  return int4 ? kMostChainRows : 2;
}

template <typename T>
bool takes(const QuantMatrix& w) {
  return w.bits == 4 && w.block == ChainInt4<T>::kBlock && !w.zeros && !w.wide_scales && w.N % kPanelRows == 0 && w.K % ChainInt4<T>::kUnitK == 0;
}

template <typename Panels>
class Planner {
 public:
  using T = typename Panels::Element;
  using Step = ChainStep<Panels>;
  static constexpr bool kInt4 = std::is_same<Panels, ChainInt4<T>>::value;

  Planner(std::vector<ChainPart<T>> parts, int M, const Device& device) : parts_(std::move(parts)), M_(M), device_(device) {
    p_.M = M, log_rows_ = M == 1 ? 0 : M == 2 ? 1 : 2;
  }

  // False where a chain is not for these parts.
  bool plan() {
    results_.resize(parts_.size());
    for (size_t i = 0; i < parts_.size(); i++) {
      if (!add_product(parts_[i], i)) return false;
    }
    return collect() && p_.count >= 2 && M_ <= most_rows(kInt4, H_) && H_ <= kMostNormColumns && lay_out();
  }

  // `memory`: counters of blocks, then words.
  void launch(uint8_t* memory, ChainStart how, cudaStream_t stream) {
    uint32_t* const words = reinterpret_cast<uint32_t*>(memory + counters());
    p_.calls = reinterpret_cast<uint32_t*>(memory), p_.words = words, p_.buffer = int(words_);
    for (int i = 0; i < p_.count; i++) {
      Step& step = p_.steps[i];
      if (out_at_[i] >= 0) step.out = words + out_at_[i];
      if (x_at_[i] >= 0) step.x = words + x_at_[i];
    }
    log_rows_ == 0 ? start<0>(how, stream) : log_rows_ == 1 ? start<1>(how, stream) : start<2>(how, stream);
  }

  size_t memory_bytes() const { return counters() + 2 * words_ * sizeof(uint32_t); }

 private:
  struct Result {
    int64_t at = -1;  // of its words
    bool divided = false;
    Spread spread{};
    int columns = 0;
  };

  int counters() const { return up(int(sizeof(uint32_t)) * device_.blocks); }  // bytes
  // Beside the kernel's own variables.
  int most_dynamic() const { return device_.shared - int(sizeof(Step) + sizeof(OwnShare)) * kMostChainSteps - 256; }
  bool full() const { return p_.count == kMostChainSteps; }

  Step& next(int64_t x_at, int64_t out_at) {
    x_at_[p_.count] = x_at, out_at_[p_.count] = out_at;
    Step& step = p_.steps[p_.count++];
    return step = Step{};
  }

  int64_t take(int64_t words) {
    const int64_t at = words_;
    words_ += (words + 31) / 32 * 32;
    return at;
  }

  // The sum of the newest divided result and the residual, which is the input of `step`, or nothing but written where step has no columns.
  bool take_residual(Step& step, int64_t& x_at) {
    const ChainPart<T>& own = parts_[residual_];
    const Result& result = results_[residual_];
    if (own.residual == nullptr || (own.residual_from >= 0 && own.residual_from != kept_)) return false;
    step.arrival = Arrival::kParts, step.producer = result.spread, step.K = own.N;
    step.residual = own.residual_from >= 0 ? nullptr : own.residual;
    step.residual_out = own.leaves ? own.y : nullptr;
    x_at = result.at, kept_ = residual_, residual_ = -1;
    return true;
  }

  bool add_product(const ChainPart<T>& part, size_t index) {
    const bool swiglu = part.kind == ChainKind::kSwiGlu;
    if (part.format != (kInt4 ? ChainFormat::kQuant : ChainFormat::kPlain)) return false;
    if (part.N % kPanelRows || part.K % kUnit || part.tail_rows % kPanelRows) return false;
    if (swiglu && (part.residual != nullptr || part.tail != nullptr)) return false;
    if constexpr (kInt4) {
      if (!takes<T>(part.quant)) return false;
    } else {
      if (part.tail != nullptr) return false;
    }
    if (full()) return false;
    Step& step = next(-1, -1);
    const int at = p_.count - 1;
    int64_t x_at = -1;
    if (part.norm != nullptr) {
      if (H_ != 0 && H_ != part.K) return false;
      H_ = part.K;
      if (part.x_from < 0) {  // the residual stream enters here
        if (residual_ >= 0) return false;
        step.arrival = Arrival::kParts, step.residual = part.x, step.producer = Spread{};
        kept_ = kEntered, entered_ = part.x;
      } else if (part.x_from == residual_) {
        if (!take_residual(step, x_at)) return false;
      } else if (part.x_from == kept_) {
        step.arrival = Arrival::kParts, step.residual = nullptr, step.producer = Spread{};
      } else {
        return false;
      }
      step.norm = part.norm, step.eps = part.eps;
    } else if (part.x_from < 0) {
      step.arrival = Arrival::kMemory, step.x = part.x, step.x_stride = part.K;
    } else {
      const Result& from = results_[part.x_from];
      if (from.divided) return false;
      step.arrival = Arrival::kWords, x_at = from.at, step.x_stride = from.columns;
      if (from.columns != part.K) return false;
    }
    step.K = part.K, x_at_[at] = x_at;
    if constexpr (kInt4)
      step.w = part.quant;
    else
      step.w = {part.plain, swiglu ? 2 * part.N : part.N, part.K};
    const int rows = swiglu ? 2 * part.N : part.N, panels = rows / kPanelRows, units = step.w.units(), blocks = device_.blocks;
    const int tails = part.tail_rows / kPanelRows;
    Result& result = results_[index];
    result.columns = step.columns = part.N + part.tail_rows;
    step.up_rows = swiglu ? part.N : 0;
    if (part.residual != nullptr) {
      if (residual_ >= 0 || tails || blocks / std::max(1, panels) > kMostParts) return false;
      if (part.residual_from < 0 && kept_ == kEntered && part.residual != entered_) return false;
      residual_ = int(index), result.divided = true;
      step.spread = {0, panels >= blocks ? blocks : panels * (blocks / panels), panels, units, 0};
      result.at = take(int64_t(std::max(2, blocks / panels)) * M_ * part.N / 2);
    } else {
      if (tails >= blocks / 2) return false;
      step.spread = {0, blocks - tails, panels, units, swiglu ? 2 : 1};
      result.at = take(int64_t(M_) * step.columns / 2);
      step.y = part.leaves ? part.y : nullptr;
    }
    if (int64_t(panels) * units * (blocks + 1) > INT32_MAX) return false;
    out_at_[at] = result.at, result.spread = step.spread;
    if (tails) {
      if (full()) return false;
      const Step main = step;
      Step& tail = next(-1, result.at);
      tail.tail = part.tail, tail.K = part.K, tail.columns = main.columns, tail.first_column = part.N, tail.y = main.y;
      tail.spread = {blocks - tails, tails, tails, part.K / 32, 1};
    }
    return true;
  }

  // A residual stream that nobody of the chain reads: a step without columns writes it.
  bool collect() {
    if (residual_ < 0) return true;
    if (full()) return false;
    Step& step = next(-1, -1);
    const int at = p_.count - 1;
    return take_residual(step, x_at_[at]);
  }

  bool lay_out() {
    int K = 0;
    for (int i = 0; i < p_.count; i++) {
      Step& step = p_.steps[i];
      if (std::find(x_at_, x_at_ + p_.count, out_at_[i]) == x_at_ + p_.count) out_at_[i] = -1;  // nobody waits for it
      K = std::max(K, step.K);
      if (step.norm != nullptr) step.norm_at = p_.norms, p_.norms += step.K;
      if (step.arrival == Arrival::kParts && step.tail == nullptr) {
        if (H_ == 0) H_ = step.K;
        if (step.K != H_) return false;
      }
    }
    const int per_warp = ((1 << log_together(log_rows_)) * kPanelRows << log_rows_) + 4;
    const int most = most_dynamic();
    int at = 0;
    const auto place = [&](int& where, int bytes) { where = at, at += up(bytes); };
    place(p_.bars_at, (2 * kMostChainStages + 1) * 8);
    place(p_.sums_at, kChainWarps * per_warp * int(sizeof(float)));
    place(p_.rows_at, K * int(sizeof(T)) << log_rows_);
    place(p_.zeros_at, Panels::zero_bytes(K, log_rows_));
    place(p_.residual_at, M_ * H_ * int(sizeof(T)));
    place(p_.squares_at, M_ * ((H_ + kGroupColumns - 1) / kGroupColumns) * int(sizeof(float)));
    place(p_.norms_at, p_.norms * int(sizeof(T)));
    p_.stages = std::min(kMostChainStages, (most - at) / Panels::kStage);
    if (most < at || p_.stages < kInFlight) return false;
    const int ring = p_.stages * Panels::kStage;
    for (int* where : {&p_.bars_at, &p_.sums_at, &p_.rows_at, &p_.zeros_at, &p_.residual_at, &p_.squares_at, &p_.norms_at})
      *where += ring;
    shared_ = ring + at;
    return true;
  }

  template <int LOG_ROWS>
  void start(ChainStart how, cudaStream_t stream) {
    constexpr auto kernel = chain_kernel<Panels, LOG_ROWS>;
    static DeviceFlags allowed;
    allowed.once([&] {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_dynamic()), "cudaFuncSetAttribute");
    });
    cudaLaunchAttribute attributes[2]{};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization, attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeCooperative, attributes[1].val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(device_.blocks), config.blockDim = dim3(kChainThreads + 32);
    config.dynamicSmemBytes = size_t(shared_), config.stream = stream;
    config.attrs = attributes, config.numAttrs = how == ChainStart::kEach ? 1 : 2;
    check(cudaLaunchKernelEx(&config, kernel, p_), "cudaLaunchKernelEx");
  }

  static constexpr int kEntered = -2;  // in the place of a part: the residual stream as it came in

  const std::vector<ChainPart<T>> parts_;
  const int M_;
  const Device& device_;
  ChainProgram<Panels> p_{};
  std::vector<Result> results_;
  int64_t x_at_[kMostChainSteps], out_at_[kMostChainSteps], words_ = 0;
  int log_rows_ = 0, H_ = 0, shared_ = 0;
  int residual_ = -1, kept_ = -1;  // parts: whose sum nobody has made yet, whose sum the blocks keep
  const T* entered_ = nullptr;
};

// Parts first to end - 1, products, in one launch. Other parts of the chain are memory for them.
template <typename Panels, typename T>
std::unique_ptr<Planner<Panels>> plan_products(const std::vector<ChainPart<T>>& parts, size_t first, size_t end, int M, const Device& device) {
  std::vector<ChainPart<T>> own(parts.begin() + first, parts.begin() + end);
  for (auto& part : own) {
    const auto inside = [&](int from) { return from >= int(first) ? from - int(first) : -1; };
    part.x_from = inside(part.x_from), part.residual_from = inside(part.residual_from);
  }
  const auto leave = [&](int from) {
    if (from >= int(first) && from < int(end)) own[from - first].leaves = true;
  };
  for (size_t i = end; i < parts.size(); i++) leave(parts[i].x_from), leave(parts[i].residual_from);
  auto planner = std::make_unique<Planner<Panels>>(std::move(own), M, device);
  return planner->plan() ? std::move(planner) : nullptr;
}

template <typename T>
void run_alone(const ChainPart<T>& part, int M, cudaStream_t stream) {
  const bool swiglu = part.kind == ChainKind::kSwiGlu;
  if (part.kind == ChainKind::kDeltaNet)
    delta_net(part.shape, part.in, part.eps, nullptr, part.arrivals, part.arrivals_size, stream);
  else if (part.format == ChainFormat::kQuant)
    swiglu ? quant_swiglu(part.quant, part.x, part.norm, part.eps, part.y, M, stream)
           : quant_linear(part.quant, part.x, part.tail, part.tail_rows, part.residual, part.norm, part.eps, part.y, M, stream);
  else
    swiglu ? skinny_swiglu(part.x, part.plain, part.norm, part.eps, part.y, M, part.N, part.K, stream)
           : skinny_linear(part.x, part.plain, part.residual, part.norm, part.eps, part.y, M, part.N, part.K, stream);
}

// Whether `run_alone` takes it.
template <typename T>
bool is_simple(const ChainPart<T>& part) {
  if (part.kind == ChainKind::kDeltaNet) return delta_net_workspace(part.shape) == 0;
  return part.format == ChainFormat::kQuant || (part.format == ChainFormat::kPlain && part.tail == nullptr);
}

template <typename Panels, typename T>
bool run(const std::vector<ChainPart<T>>& parts, int M, const Device& device, ChainMemory& memory, cudaStream_t stream) {
  struct Launch {
    size_t first, end;
    std::unique_ptr<Planner<Panels>> planner;  // null: one by one
  };
  std::vector<Launch> launches;
  size_t bytes = 0;
  for (size_t i = 0; i < parts.size();) {
    size_t end = i + 1;
    if (parts[i].kind != ChainKind::kDeltaNet) {
      while (end < parts.size() && parts[end].kind != ChainKind::kDeltaNet) end++;
    }
    launches.push_back({i, end, nullptr});
    if (end - i > 1) launches.back().planner = plan_products<Panels>(parts, i, end, M, device);
    if (launches.back().planner) bytes += launches.back().planner->memory_bytes();
    i = end;
  }
  if (bytes == 0) return false;
  const ChainStart how = memory.start(stream);
  uint8_t* words = how == ChainStart::kNever ? nullptr : memory.get(M, bytes, stream);
  if (words == nullptr) return false;
  for (auto& launch : launches) {
    if (launch.planner) {
      launch.planner->launch(words, how, stream);
      words += launch.planner->memory_bytes();
    } else {
      for (size_t i = launch.first; i < launch.end; i++) run_alone(parts[i], M, stream);
    }
  }
  return true;
}

}  // namespace

template <typename T>
bool run_chain(const std::vector<ChainPart<T>>& parts, int M, ChainMemory& memory, cudaStream_t stream) {
  const Device& device = this_device();
  if (device.blocks == 0 || M < 1 || M > kMostChainRows || parts.empty()) return false;
  if (!std::all_of(parts.begin(), parts.end(), is_simple<T>)) return false;
  const auto product = std::find_if(parts.begin(), parts.end(), [](const auto& part) { return part.kind != ChainKind::kDeltaNet; });
  if (product == parts.end()) return false;
  if (product->format == ChainFormat::kPlain) return run<ChainPlain<T>>(parts, M, device, memory, stream);
  return run<ChainInt4<T>>(parts, M, device, memory, stream);
}

template bool run_chain<__half>(const std::vector<ChainPart<__half>>&, int, ChainMemory&, cudaStream_t);
template bool run_chain<__nv_bfloat16>(const std::vector<ChainPart<__nv_bfloat16>>&, int, ChainMemory&, cudaStream_t);

}  // namespace qwen
