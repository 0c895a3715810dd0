// What the host's code and the kernels know of quantized matrices, whatever their codes are.
#pragma once

namespace qwen {

constexpr int kPanelRows = 16;  // weight rows that a warp multiplies together
constexpr int kFewColumns = 8;  // activation rows that read a weight once

}  // namespace qwen
