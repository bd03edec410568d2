#include "tools/quantize/rounding_order.h"

#include <algorithm>
#include <numeric>

#include "common/base/check.h"

namespace nibble {

ColumnOrder OrderColumns(std::span<const float> energy, const InputPlan& plan, RoundingOrder order) {
  const size_t k = energy.size(), group_size = static_cast<size_t>(kBlock);
  NIBBLE_CHECK(k % group_size == 0 && (plan.perm.empty() || plan.perm.size() == k));
  const auto channel = [&](int32_t code) { return plan.perm.empty() ? code : plan.perm[static_cast<size_t>(code)]; };
  const auto more = [&](int32_t a, int32_t b) {
    return energy[static_cast<size_t>(channel(a))] > energy[static_cast<size_t>(channel(b))];
  };

  ColumnOrder out;
  out.code.resize(k);
  std::iota(out.code.begin(), out.code.end(), 0);
  if (order == RoundingOrder::kAll) {
    std::stable_sort(out.code.begin(), out.code.end(), more);
    out.groups_in_turn = false;
  } else if (order != RoundingOrder::kStored) {
    for (size_t g = 0; g < k; g += group_size) {
      const auto begin = out.code.begin() + static_cast<ptrdiff_t>(g);
      std::stable_sort(begin, begin + static_cast<ptrdiff_t>(group_size), more);
    }
  }
  if (order == RoundingOrder::kByGroup) {
    std::vector<double> group_energy(k / group_size, 0.0);
    for (size_t i = 0; i < k; ++i) {
      group_energy[i / group_size] += static_cast<double>(energy[static_cast<size_t>(channel(out.code[i]))]);
    }
    std::vector<size_t> groups(group_energy.size());
    std::iota(groups.begin(), groups.end(), size_t{0});
    std::stable_sort(groups.begin(), groups.end(),
                     [&](size_t a, size_t b) { return group_energy[a] > group_energy[b]; });
    std::vector<int32_t> code;
    for (const size_t g : groups) {
      const auto begin = out.code.begin() + static_cast<ptrdiff_t>(g * group_size);
      code.insert(code.end(), begin, begin + static_cast<ptrdiff_t>(group_size));
    }
    out.code = std::move(code);
  }
  for (const int32_t code : out.code) {
    out.channel.push_back(channel(code));
    out.group.push_back(code / static_cast<int32_t>(kBlock));
  }
  return out;
}

}  // namespace nibble
