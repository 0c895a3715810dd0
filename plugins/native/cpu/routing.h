// Which experts each token goes to.
//
//   p = softmax(logits), over all experts       the K largest p of a token, divided by their sum, weigh its experts
//
// Equal probabilities are decided as torch.topk decides them on the CPU, by the same algorithms of the standard library.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

namespace qwen {

// One token at one expert.
struct Visit {
  int32_t token;
  float weight;
};

// The visits of one expert, tokens ascending.
struct Group {
  int32_t expert;
  int32_t begin, end;  // in Routing::visits

  size_t rows() const { return size_t(end - begin); }
};

struct Routing {
  std::vector<Visit> visits;
  std::vector<Group> groups;  // of the experts that have visits, ascending
};

using Candidate = std::pair<float, int32_t>;

// The K best experts of a token, in `best` [K], with their weights.
inline void choose_experts(const float* logits, size_t E, size_t K, std::vector<Candidate>& scratch, Candidate* best) {
  const float largest = *std::max_element(logits, logits + E);
  float sum = 0;
  scratch.resize(E);
  for (size_t e = 0; e < E; e++) {
    const float p = std::exp(logits[e] - largest);
    scratch[e] = {p, int32_t(e)};
    sum += p;
  }
  for (Candidate& candidate : scratch) candidate.first /= sum;
  const auto better = [](const Candidate& a, const Candidate& b) {
    return (std::isnan(a.first) && !std::isnan(b.first)) || a.first > b.first;
  };
  const auto begin = scratch.begin(), cut = begin + long(K);
  if (K * 64 <= E) {
    std::partial_sort(begin, cut, scratch.end(), better);
  } else {
    std::nth_element(begin, cut - 1, scratch.end(), better);
    std::sort(begin, cut - 1, better);
  }
  float total = 0;
  for (size_t i = 0; i < K; i++) total += scratch[i].first;
  for (size_t i = 0; i < K; i++) best[i] = {scratch[i].first / total, scratch[i].second};
}

// chosen [tokens, K]
inline Routing group_by_expert(const std::vector<Candidate>& chosen, size_t tokens, size_t E, size_t K) {
  Routing routing;
  std::vector<int32_t> at(E + 1, 0);
  for (const Candidate& c : chosen) at[size_t(c.second) + 1]++;
  for (size_t e = 0; e < E; e++) {
    at[e + 1] += at[e];
    if (at[e] < at[e + 1]) routing.groups.push_back({int32_t(e), at[e], at[e + 1]});
  }
  routing.visits.resize(chosen.size());
  for (size_t i = 0; i < chosen.size(); i++) routing.visits[size_t(at[size_t(chosen[i].second)]++)] = {int32_t(i / K), chosen[i].first};
  return routing;
}

}  // namespace qwen
