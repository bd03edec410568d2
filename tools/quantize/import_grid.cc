#include "tools/quantize/import_grid.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "tools/quantize/gptq.h"

namespace nibble {
namespace {

constexpr int kLevels = 16;

struct GroupMap {
  int scale = 1, min = 0;
  std::array<uint8_t, kLevels> code = {};  // for each code of the source
  double squared_steps = 0;                // over the group's weights
  double max_steps = 0;
};

// ratio: the source's scale over s_w, positive. counts: how often each code occurs.
GroupMap MapGroup(double ratio, int zero, const std::array<int, kLevels>& counts) {
  GroupMap map;
  map.scale = static_cast<int>(std::clamp(std::nearbyint(ratio), 1.0, 16.0));
  const double centred = std::nearbyint((7.5 - zero) * ratio - 7.5 * map.scale);
  map.min = static_cast<int>(std::clamp(centred, -119.0, std::min(119.0, 127.0 - 15 * map.scale)));
  for (int c = 0; c < kLevels; ++c) {
    if (counts[static_cast<size_t>(c)] == 0) continue;
    const double level = (c - zero) * ratio;
    const double code = std::clamp(std::nearbyint((level - map.min) / map.scale), 0.0, 15.0);
    const double steps = (code * map.scale + map.min - level) / ratio;
    map.code[static_cast<size_t>(c)] = static_cast<uint8_t>(code);
    map.squared_steps += counts[static_cast<size_t>(c)] * steps * steps;
    map.max_steps = std::max(map.max_steps, std::fabs(steps));
  }
  return map;
}

}  // namespace

LinearTensors MapOntoGrid(const ForeignLinear& linear, const LinearShape& shape, ThreadPool* pool, GridFit* fit) {
  const size_t n = static_cast<size_t>(linear.n), k = static_cast<size_t>(linear.k),
               block = static_cast<size_t>(kBlock);
  const size_t groups = k / block;
  LinearTensors out = EmptyTensors(shape, {.block_bits = std::vector<uint8_t>(groups, 8), .perm = {}});
  std::vector<double> squared(n, 0.0), largest(n, 0.0);
  pool->ParallelFor(linear.n, [&](int64_t item, int) {
    const size_t row = static_cast<size_t>(item);
    const uint8_t* codes = linear.codes.data() + row * k;
    const float* scales = linear.scales.data() + row * groups;
    const uint8_t* zeros = linear.zeros.data() + row * groups;
    const double top = static_cast<double>(*std::max_element(scales, scales + groups));
    std::vector<std::array<int, kLevels>> counts(groups);
    for (size_t i = 0; i < k; ++i) ++counts[i / block][codes[i]];

    std::vector<GroupMap> maps(groups), best(groups);
    double best_error = std::numeric_limits<double>::infinity(), best_scale = 0;
    for (int eighths = 8; top > 0 && eighths <= 8 * 16; ++eighths) {
      const double step = top * 8 / eighths;
      double error = 0;
      for (size_t g = 0; g < groups; ++g) {
        const double scale = static_cast<double>(scales[g]);
        maps[g] = scale > 0 ? MapGroup(scale / step, zeros[g], counts[g]) : GroupMap();
        error += maps[g].squared_steps * scale * scale;
      }
      // A coarser s_w with the same error is kept: an exact match is found at its smallest multiples.
      if (error < best_error * (1 - 1e-9)) best_error = error, best_scale = step, best = maps;
    }
    out.channel_scale[row] = static_cast<float>(best_scale);
    for (size_t g = 0; g < groups; ++g) {
      out.group_scale[row * groups + g] = static_cast<uint8_t>(best[g].scale);
      out.group_min[row * groups + g] = static_cast<int8_t>(best[g].min);
      squared[row] += best[g].squared_steps;
      largest[row] = std::max(largest[row], best[g].max_steps);
    }
    for (size_t i = 0; i < k; ++i) {
      out.qweight[(row * k + i) / 2] |= static_cast<uint8_t>(best[i / block].code[codes[i]] << (i % 2 * 4));
    }
  });
  double sum = 0;
  for (const double s : squared) sum += s;
  *fit = {.rms_steps = std::sqrt(sum / static_cast<double>(n * k)),
          .max_steps = *std::max_element(largest.begin(), largest.end())};
  return out;
}

}  // namespace nibble
