// How the parts of a Chain are connected, as its attribute `wiring` says: one part behind the other, with ; between them.
//
//   QuantLinear T0 b0 - T1 > -; DeltaNet v0 T2 f0 f1 T3 T4 f2 > - T0 f0; QuantLinear v1 b1 T5 > T1
//
// A part is the name of an op, its inputs in the op's order, > and its results. An input is T3, b0, f1 or l0: the node's fourth input of its own
// type, its first of uint8, second of fp32, first of int64; v4: the fifth result of all parts before it, counted through; -: left out. A
// result is T0 or f0: the node's first output of that type; -: it stays in the chain. Inputs at the end that are left out may be missing.
#pragma once

#include <sstream>
#include <string>
#include <vector>

#include "custom_op.h"

namespace qwen {

struct ChainSlot {
  char kind = '-';
  size_t number = 0;
};

struct ChainWires {
  std::string op;
  std::vector<ChainSlot> inputs, results;
};

inline ChainSlot chain_slot(const std::string& word) {
  ChainSlot slot;
  expect(!word.empty(), "Chain: an empty word in the wiring");
  slot.kind = word[0];
  if (word == "-") return slot;
  const bool number = word.size() > 1 && word.size() < 6 && word.find_first_not_of("0123456789", 1) == std::string::npos;
  expect(number && std::string("Tbflv").find(slot.kind) != std::string::npos, "Chain: a word in the wiring is no input and no result");
  slot.number = std::stoul(word.substr(1));
  return slot;
}

inline std::vector<ChainWires> chain_wires(const std::string& wiring) {
  std::vector<ChainWires> parts;
  std::istringstream all(wiring);
  for (std::string text; std::getline(all, text, ';');) {
    ChainWires part;
    std::istringstream words(text);
    expect(static_cast<bool>(words >> part.op), "Chain: a part in the wiring has no op");
    auto* to = &part.inputs;
    for (std::string word; words >> word;) {
      if (word == ">") {
        to = &part.results;
      } else {
        to->push_back(chain_slot(word));
      }
    }
    expect(!part.results.empty(), "Chain: a part in the wiring has no result");
    parts.push_back(std::move(part));
  }
  expect(!parts.empty(), "Chain: there is no part in the wiring");
  return parts;
}

}  // namespace qwen
