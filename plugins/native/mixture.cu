#include "mixture.cuh"

#include <algorithm>
#include <type_traits>

#include "mixture_few.cuh"
#include "product_few.cuh"

namespace qwen {
namespace {

template <typename T>
MixtureWork<T> work_of(const Mixture<T>& mixture) {
  MixtureWork<T> work{mixture};
  work.log_rows = log_rows_of(mixture.routed.tokens);
  return work;
}

// The parts of the workspace; `base` null: only the size.
template <typename T>
size_t place(MixtureWork<T>& work, char* base) {
  const Experts<QuantMatrix>& routed = work.of.routed;
  size_t at = 0;
  const auto take = [&](size_t bytes) {
    char* here = base + at;
    at += (bytes + 255) / 256 * 256;
    return here;
  };
  work.logits = reinterpret_cast<T*>(take(sizeof(T) * routed.tokens * routed.E));
  work.gates = reinterpret_cast<float*>(take(sizeof(float) * routed.tokens));
  work.inner = reinterpret_cast<T*>(take(sizeof(T) * routed.tokens * (size_t(routed.K) * routed.I + work.of.S)));
  return at;
}

// Bytes of shared memory of each kernel.
struct Shared {
  int enter, inner, leave;

  bool fits() const { return enter <= most_shared() && inner <= most_shared() && leave <= most_shared(); }
};

template <typename Tile, typename T>
int tile_bytes(const MixtureWork<T>& work, int unit_bytes, int least) {
  return work.template rows_bytes<typename Tile::Rows>() + Tile::sums_bytes(work.log_rows) + std::max(Tile::ring_bytes(unit_bytes), least);
}

template <typename Panels, typename T = typename Panels::Element>
Shared shared_of(const MixtureWork<T>& work) {
  const Mixture<T>& of = work.of;
  const int pieces = of.routed.K * of.routed.down.units() + of.shared_down.units(), gate_up = Panels::unit_bytes(of.routed.gate_up);
  const int bytes = std::max(Panels::unit_bytes(of.routed.down), Panels::unit_bytes(of.shared_down));
  const int rows = int(Panels::OfOneRow::Rows::staged_bytes(pieces * kUnitChunks, 0));
  return {tile_bytes<EnterTile<Panels>>(work, Panels::unit_bytes(of.shared_gate_up), RouterTile<T>::memory_bytes(of.routed.H)),
          of.routed.tokens == 1 ? tile_bytes<InnerTile<Panels, true>>(work, gate_up, 0) : tile_bytes<InnerTile<Panels, false>>(work, gate_up, 0),
          kLeaveWarps * kLeaveStages * bytes + rows + kLeaveWarps * kPanelRows * int(sizeof(float))};
}

template <typename Panels, bool ONE, int EXPERTS, typename T>
void launch_all(const MixtureWork<T>& work, cudaStream_t stream) {
  constexpr auto enter = mixture_enter_kernel<Panels>;
  constexpr auto inner = mixture_inner_kernel<Panels, ONE, EXPERTS>;
  constexpr auto leave = mixture_leave_kernel<typename Panels::OfOneRow, EXPERTS>;
  static DeviceFlags allowed;
  allowed.once([&] {
    for (const auto kernel : {enter, inner, leave}) allow_shared(kernel, size_t(most_shared()));
  });
  const Experts<QuantMatrix>& routed = work.of.routed;
  const Shared shared = shared_of<Panels>(work);
  const int tiles = work.of.S / kPanelRows, routers = (routed.E + RouterTile<T>::kRows - 1) / RouterTile<T>::kRows;
  launch(enter, dim3(tiles + routers + 1), dim3(kEnterWarps * 32), shared.enter, stream, work);
  const int columns = (routed.I + kInnerColumns<ONE> - 1) / kInnerColumns<ONE>;
  launch(inner, dim3(columns, routed.tokens * routed.K), dim3(kInnerWarps * 32), shared.inner, stream, work);
  launch(leave, dim3(routed.down.panels(), routed.tokens), dim3(kLeaveWarps * 32), shared.leave, stream, work);
}

// of(panels, one) by the kind of all matrices of the mixture, and whether it has one token. `panels` is null, only its type counts.
template <typename T, typename Of>
auto with_panels(const Mixture<T>& mixture, const Of& of) {
  const int tokens = mixture.routed.tokens;
  const auto usual = [](const QuantMatrix& w) { return Int4Panels<T, 0>::takes(w); };
  const auto of_kind = [&](auto* panels) { return tokens == 1 ? of(panels, std::true_type{}) : of(panels, std::false_type{}); };
  if constexpr (std::is_same<T, __half>::value) {  // which quantized builds have
    if (usual(mixture.routed.gate_up) && usual(mixture.routed.down) && usual(mixture.shared_gate_up) && usual(mixture.shared_down))
      return with_int4_panels<T>(tokens, [&](auto* panels) { return of(panels, std::bool_constant<std::remove_pointer_t<decltype(panels)>::Rows::log_rows == 0>{}); });
  }
  return mixture.routed.down.bits == 4 ? of_kind(static_cast<QuantPanels<T, 4, true>*>(nullptr)) : of_kind(static_cast<QuantPanels<T, 8, true>*>(nullptr));
}

}  // namespace

template <typename T>
bool has_mixture(const Mixture<T>& mixture) {
  const Experts<QuantMatrix>& routed = mixture.routed;
  const QuantMatrix &a = routed.down, &b = mixture.shared_down;
  const bool alike = a.bits == b.bits && a.block == b.block && a.zeros == b.zeros && a.wide_scales == b.wide_scales;
  if (routed.tokens > kFewColumns || routed.E > kMostChosenFrom || !alike || routed.gate_up.bits != a.bits || mixture.shared_gate_up.bits != a.bits) return false;
  return with_panels(mixture, [&](auto* panels, auto) { return shared_of<std::remove_pointer_t<decltype(panels)>>(work_of(mixture)).fits(); });
}

template <typename T>
size_t mixture_workspace(const Mixture<T>& mixture) {
  MixtureWork<T> work = work_of(mixture);
  return place(work, nullptr);
}

template <typename T>
void run_mixture(const Mixture<T>& mixture, void* workspace, cudaStream_t stream) {
  MixtureWork<T> work = work_of(mixture);
  place(work, static_cast<char*>(workspace));
  with_panels(mixture, [&](auto* panels, auto one) {
    using Panels = std::remove_pointer_t<decltype(panels)>;
    mixture.routed.E <= kUsualExperts ? launch_all<Panels, one.value, kUsualExperts>(work, stream) : launch_all<Panels, one.value, kMostChosenFrom>(work, stream);
  });
}

#define INSTANTIATE(T)                                          \
  template bool has_mixture<T>(const Mixture<T>&);              \
  template size_t mixture_workspace<T>(const Mixture<T>&);      \
  template void run_mixture<T>(const Mixture<T>&, void*, cudaStream_t);
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)

}  // namespace qwen
