// The rows of a step as kernels see them; see StepRows in kernels/ops.h.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention/segments.h"
#include "kernels/ops.h"

namespace nibble::cuda {

struct StepView {
  const int32_t* positions;
  const int32_t* row_sequence;
  const int32_t* row_begin;
  const int32_t* page_tables;
  int rows, sequences, max_pages, num_pages;
};

inline StepView ViewOf(const StepRows& step, const KvPages& pages) {
  return {step.positions,
          step.row_sequence,
          step.row_begin,
          step.page_tables,
          static_cast<int>(step.rows),
          static_cast<int>(step.sequences),
          static_cast<int>(step.max_pages),
          static_cast<int>(pages.num_pages)};
}

// The specification's checks of device data; a violation is a bug and ends the process.
__device__ __forceinline__ int CheckedPosition(const StepView& step, int row) {
  const int position = __ldg(step.positions + row);
  if (position < 0 || position >= step.max_pages * kTokensPerPage) __trap();
  return position;
}
__device__ __forceinline__ int CheckedSequence(const StepView& step, int row) {
  const int sequence = __ldg(step.row_sequence + row);
  if (sequence < 0 || sequence >= step.sequences) __trap();
  return sequence;
}
__device__ __forceinline__ int CheckedPage(const StepView& step, int page) {
  if (static_cast<unsigned>(page) >= static_cast<unsigned>(step.num_pages)) __trap();
  return page;
}

}  // namespace nibble::cuda
