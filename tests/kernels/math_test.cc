// The elementary functions: error against double, and equal bits on every instruction set.
#include <cmath>
#include <functional>

#include "tests/kernels/backends.h"

namespace nibble::testing {
namespace {

struct Function {
  const char* name;
  void (*KernelTable::*run)(const float*, int64_t, float*);
  std::function<double(double)> reference;
  float begin, end;
  double max_ulp;  // documented in kernels/cpu/math_inl.h
};

const Function kFunctions[] = {
    {"exp", &KernelTable::exp, [](double x) { return std::exp(x); }, -87.3f, 88.7f, 1.1},
    {"log", &KernelTable::log, [](double x) { return std::log(x); }, 1.2e-38f, 3e38f, 1.0},
    {"neg_log_one_minus", &KernelTable::neg_log_one_minus, [](double x) { return -std::log1p(-x); }, 0x1p-32f,
     1.0f - 0x1p-24f, 2.5},
    {"sigmoid", &KernelTable::sigmoid, [](double x) { return 1 / (1 + std::exp(-x)); }, -87.3f, 88.0f, 2.5},
};

// Positive ranges are walked in equal steps of bits, others linearly and in steps of bits around zero.
std::vector<float> Points(const Function& f) {
  constexpr int64_t kCount = 1 << 20;
  std::vector<float> x;
  if (f.begin > 0) {
    const uint32_t low = std::bit_cast<uint32_t>(f.begin), high = std::bit_cast<uint32_t>(f.end);
    for (int64_t i = 0; i < kCount; ++i) {
      x.push_back(
          std::bit_cast<float>(static_cast<uint32_t>(low + (high - low) * static_cast<double>(i) / (kCount - 1))));
    }
  } else {
    for (int64_t i = 0; i < kCount; ++i) x.push_back(f.begin + (f.end - f.begin) * static_cast<float>(i) / kCount);
    for (uint32_t bits = 0; bits < 0x42a00000; bits += 4099) {
      x.push_back(std::bit_cast<float>(bits));
      x.push_back(-std::bit_cast<float>(bits));
    }
  }
  while (x.size() % 16 != 0) x.push_back(f.end);
  return x;
}

TEST(Math, ErrorsAreAsDocumentedAndBitsEqual) {
  for (const Function& f : kFunctions) {
    const std::vector<float> x = Points(f);
    std::vector<float> specification(x.size());
    (KernelsFor(Isa::kPortable).*f.run)(x.data(), static_cast<int64_t>(x.size()), specification.data());
    double worst = 0;
    float at = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double want = f.reference(x[i]);
      const double ulp = std::ldexp(1.0, std::max(std::ilogb(want), -126) - 23);
      const double error = want == 0 ? std::abs(specification[i]) : std::abs(specification[i] - want) / ulp;
      if (!(error <= worst)) {
        worst = error;
        at = x[i];
      }
    }
    EXPECT_LE(worst, f.max_ulp) << f.name << " at " << at;
    RecordProperty(f.name, std::to_string(worst));
    std::printf("%s: max error %.3f ulp at %g\n", f.name, worst, at);
    for (Isa isa : AvailableIsas()) {
      std::vector<float> got(x.size());
      (KernelsFor(isa).*f.run)(x.data(), static_cast<int64_t>(x.size()), got.data());
      EXPECT_EQ(std::memcmp(got.data(), specification.data(), got.size() * 4), 0)
          << f.name << " on " << KernelsFor(isa).name;
    }
  }
}

TEST(Math, ExpAtTheEdges) {
  for (Isa isa : AvailableIsas()) {
    std::vector<float> x = {0.0f,   -0.0f,  -INFINITY, INFINITY, std::nanf(""), -104.0f, -105.0f, -1e30f,
                            88.72f, 88.73f, 89.0f,     1e30f,    -87.4f,        -100.0f, -103.0f, 1.0f};
    std::vector<float> y(x.size());
    KernelsFor(isa).exp(x.data(), static_cast<int64_t>(x.size()), y.data());
    EXPECT_EQ(y[0], 1.0f);
    EXPECT_EQ(y[1], 1.0f);
    EXPECT_EQ(y[2], 0.0f);
    EXPECT_EQ(y[3], INFINITY);
    EXPECT_TRUE(std::isnan(y[4]));
    EXPECT_EQ(y[5], 0.0f);
    EXPECT_EQ(y[6], 0.0f);
    EXPECT_EQ(y[7], 0.0f);
    EXPECT_TRUE(std::isfinite(y[8]));
    EXPECT_EQ(y[10], INFINITY);
    EXPECT_EQ(y[11], INFINITY);
    for (int i : {12, 13, 14}) EXPECT_NEAR(y[i], std::exp(double{x[i]}), 3e-45) << x[i];
  }
}

}  // namespace
}  // namespace nibble::testing
