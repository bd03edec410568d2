// Rounding that looks at the output: the weights of a linear are coded column after column, and what rounding one
// column did to the output is compensated in those not yet rounded (GPTQ, Frantar et al. 2022, section 3).
//
// With H = Σ x·xᵀ over the calibration tokens, the squared error of the outputs is Σ_n d·H·dᵀ for the rows d = w − ŵ.
// H + damping factors into m·mᵀ with m upper triangular, so the error is Σ_j m_jj² (t_j − ŵ_j)² with the target
// t_j = w_j + Σ_{i<j} (w_i − ŵ_i)·m_ij / m_jj. Rounding t_j in the order of j is GPTQ without an inverse of H (LDLQ of
// QuIP, Chee et al. 2023, section 3, proves them equal), which is also the better conditioned way.
//
// Calls, for each input of a layer: CreateMoments, Accumulate for every chunk of tokens, Factorize once for the plan of
// the input, Round for each linear that reads it. "Device" is where this runs; both give codes of the same format, the
// CPU the same bits for any number of threads.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/model/checkpoint.h"
#include "tools/quantize/dense_layer.h"
#include "tools/quantize/input_plan.h"

namespace nibble {

// In which order columns are rounded. Codes stay where the plan's permutation puts them. Rounding first the channels
// that carry most energy leaves all others to compensate for them ("act-order" of the GPTQ repository).
enum class RoundingOrder : uint8_t {
  kStored,       // code order
  kWithinGroup,  // groups in code order, inside each by falling H_jj
  kByGroup,      // groups by falling energy, inside each by falling H_jj
  kAll,          // all columns by falling H_jj; group scales are searched beforehand, on uncompensated weights
};

struct GptqOptions {
  bool compensate = true;  // false: rounding to nearest on the same searched grid; H's diagonal weighs the search
  // Added to the diagonal, relative to its mean. Multiplied by ten, up to three times, while H is not positive
  // definite.
  double damping = 0.01;
  RoundingOrder order = RoundingOrder::kByGroup;
  // Candidates for s_w / (max|w| / 119). All are tried per row, the whole row is rounded with each, and the one with
  // the smallest output error stays.
  std::vector<float> row_clips = {1.0f, 0.93f, 0.86f, 0.8f};
  bool search_groups = true;  // false: s2 = round(range/15), m = min, as docs/numerics.md defines them
  // Rounds over the columns after the sweep: each code moves to where the full error d·H·dᵀ is least given all others
  // (coordinate descent), and s_w to its least squares value.
  int refinements = 0;
};

struct RoundingReport {
  double output_error = 0;   // Σ_n d·H·dᵀ, d against the weights aimed at (W, or W + W·C·H⁻¹)
  double output_energy = 0;  // Σ_n w·H·wᵀ
  double relative_error() const { return output_energy > 0 ? output_error / output_energy : 0; }
  double damping = 0;        // used at last, relative
  int64_t dead_columns = 0;  // inputs that were never active: rounded, not compensated
  std::string fallback;      // why rounding to nearest was used after all; empty when it was not
};

struct RoundedLinear {
  LinearTensors tensors;
  RoundingReport report;
};

// Second moments of one linear input, in channel order, on the device that made them.
class InputMoments {
 public:
  virtual ~InputMoments() = default;
  virtual int64_t k() const = 0;
  virtual int64_t rows() const = 0;                                   // accumulated so far
  virtual absl::StatusOr<std::vector<float>> Hessian() const = 0;     // [K, K], full
  virtual absl::StatusOr<std::vector<float>> MeanSquare() const = 0;  // [K] E[x²], of the coded input where given
};

// H in rounding order, factored for one plan.
class RoundingFactor {
 public:
  virtual ~RoundingFactor() = default;
};

// Outlives the moments and factors it makes. One thread at a time.
class RoundingDevice {
 public:
  virtual ~RoundingDevice() = default;
  virtual std::string Describe() const = 0;

  // Zeros. with_coding_error: also keeps what Accumulate's second form needs (twice the memory: 4·K² bytes each).
  virtual absl::StatusOr<std::unique_ptr<InputMoments>> CreateMoments(int64_t k, bool with_coding_error) = 0;

  // H += xᵀ·x for the rows x [rows, K] that the linear will read.
  virtual absl::Status Accumulate(std::span<const float> x, InputMoments* moments) = 0;
  // The rows x the original model's linear reads and `coded`, what the quantized model's reads for the same tokens
  // (CodeRows of input_plan.h gives them for one input; upstream errors may be in them too). H += codedᵀ·coded, and
  // Round aims at x·Wᵀ instead of coded·Wᵀ: W + W·C·H⁻¹ with C = Σ (x − coded)·codedᵀ replaces W (the least squares
  // solution; GPTAQ, Li et al. 2025). moments was created with_coding_error.
  virtual absl::Status Accumulate(std::span<const float> x, std::span<const float> coded, InputMoments* moments) = 0;

  // Never fails for a singular H: Round then falls back to rounding to nearest and says so. RESOURCE_EXHAUSTED when the
  // device has not enough memory.
  virtual absl::StatusOr<std::unique_ptr<RoundingFactor>> Factorize(const InputMoments& moments, const InputPlan& plan,
                                                                    const GptqOptions& options) = 0;

  // Codes linear [N, K] for inputs coded by `plan`; moments, plan and options are those of Factorize.
  virtual absl::StatusOr<RoundedLinear> Round(const DenseLinear& linear, const InputPlan& plan,
                                              const InputMoments& moments, const RoundingFactor& factor,
                                              const GptqOptions& options) = 0;
};

struct RoundingDeviceOptions {
  std::string device = "cpu";  // or "cuda": needs a build with CUDA and a device
  int threads = 1;             // of the host
};

std::unique_ptr<RoundingDevice> CreateCpuRoundingDevice(int threads);

// INVALID_ARGUMENT for an unknown device, UNAVAILABLE when this build or machine has no CUDA.
absl::StatusOr<std::unique_ptr<RoundingDevice>> CreateRoundingDevice(const RoundingDeviceOptions& options);

// Tensors of the sizes that a linear and its plan imply: codes zero, no bias.
LinearTensors EmptyTensors(const LinearShape& shape, const InputPlan& plan);

// The weights [N, K] that quantized tensors stand for, in channel order.
std::vector<float> DequantizeLinear(const LinearTensors& tensors);

// Σ_n (w − ŵ)·H·(w − ŵ)ᵀ for weight [N, K] in channel order, tensors as Round returns them, hessian [K, K]: what
// the search minimises, written down plainly.
double OutputError(std::span<const float> weight, const LinearTensors& tensors, std::span<const float> hessian);

}  // namespace nibble
