#include "moe_many.cuh"
#include "quant_stream.cuh"

namespace qwen {
namespace {

// From so many tokens on the visits of an expert share its weights by the tile. Measured on an H200, 8 of 256 experts of 4 bits, where even 9 tokens
// take two thirds of the time; of 8 bits only more than these were.
constexpr int kFewestOf8Bits = 256;

bool together(const Experts<QuantMatrix>& moe) {
  const bool four = moe.gate_up.bits == 4 && moe.down.bits == 4;
  return moe.tokens > kFewColumns && (four || moe.tokens >= kFewestOf8Bits) && has_tensor_cores_90();
}

// The most visits of a tile: few experts should need two, and few tiles should be all but empty. Measured like the number above.
int tile_visits(const Experts<QuantMatrix>& moe) {
  if (moe.gate_up.bits != 4 || moe.down.bits != 4) return kVisits8;
  const int usual = moe.tokens * moe.K / moe.E;
  return usual <= 9 ? 16 : usual <= 20 ? 32 : 64;
}

}  // namespace

template <typename T>
size_t moe_workspace(const Experts<QuantMatrix>& moe) {
  Work<T, QuantMatrix> work = work_of<T>(moe, together(moe));
  ManyWork<T> many;
  return place(work, nullptr) + (together(moe) ? place_many(many, moe, tile_visits(moe), nullptr) : 0);
}

template <typename T>
void run_moe(const Experts<QuantMatrix>& moe, const T* x, const T* logits, T* y, void* workspace, cudaStream_t stream) {
  if (together(moe)) {
    const int visits = tile_visits(moe);
    if (visits == 16) return run_moe_many<T, 16>(moe, x, logits, y, workspace, stream);
    if (visits == 32) return run_moe_many<T, 32>(moe, x, logits, y, workspace, stream);
    return run_moe_many<T, 64>(moe, x, logits, y, workspace, stream);
  }
  const auto work = routed(moe, x, logits, y, workspace, stream);
  moe.gate_up.bits == 4 ? gate_up<T, Int4Stream>(work, stream) : gate_up<T, Int8Stream>(work, stream);
  moe.down.bits == 4 ? down<T, Int4Stream>(work, stream) : down<T, Int8Stream>(work, stream);
  combine(work, stream);
}

#define INSTANTIATE(T)                                             \
  template size_t moe_workspace<T>(const Experts<QuantMatrix>&);   \
  template void run_moe<T>(const Experts<QuantMatrix>&, const T*, const T*, T*, void*, cudaStream_t);
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)

}  // namespace qwen
