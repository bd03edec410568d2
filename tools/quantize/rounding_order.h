// In which order the columns of a linear are rounded: plain data, shared by the devices.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "tools/quantize/gptq.h"

namespace nibble {

struct ColumnOrder {
  std::vector<int32_t> code;     // [K] which code is rounded at this place of the order
  std::vector<int32_t> channel;  // [K] the input channel it is made from
  std::vector<int32_t> group;    // [K] its group of 128 codes
  bool groups_in_turn = true;    // the columns of a group stand together
};

// energy [K]: H's diagonal in channel order.
ColumnOrder OrderColumns(std::span<const float> energy, const InputPlan& plan, RoundingOrder order);

}  // namespace nibble
