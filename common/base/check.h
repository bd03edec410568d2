// Bugs abort with the values that broke the rule. Bad input never comes here: it is an absl::Status at the boundary.
#pragma once

#include <sstream>
#include <string>
#include <string_view>

namespace nibble::internal {

[[noreturn]] void CheckFailed(const char* file, int line, const char* expression, const std::string& values);

template <typename A, typename B>
std::string FormatPair(const A& a, const B& b) {
  std::ostringstream out;
  out << a << " vs " << b;
  return out.str();
}

}  // namespace nibble::internal

#define NIBBLE_CHECK(condition, ...)                                                              \
  do {                                                                                            \
    if (!(condition)) [[unlikely]]                                                                \
      ::nibble::internal::CheckFailed(__FILE__, __LINE__, #condition, ::std::string(__VA_ARGS__)); \
  } while (false)

#define NIBBLE_CHECK_OP(a, op, b)                                                                                   \
  do {                                                                                                              \
    const auto& nibble_check_a = (a);                                                                               \
    const auto& nibble_check_b = (b);                                                                               \
    if (!(nibble_check_a op nibble_check_b)) [[unlikely]]                                                           \
      ::nibble::internal::CheckFailed(__FILE__, __LINE__, #a " " #op " " #b,                                        \
                                      ::nibble::internal::FormatPair(nibble_check_a, nibble_check_b));              \
  } while (false)

#define NIBBLE_CHECK_EQ(a, b) NIBBLE_CHECK_OP(a, ==, b)
#define NIBBLE_CHECK_NE(a, b) NIBBLE_CHECK_OP(a, !=, b)
#define NIBBLE_CHECK_LT(a, b) NIBBLE_CHECK_OP(a, <, b)
#define NIBBLE_CHECK_LE(a, b) NIBBLE_CHECK_OP(a, <=, b)
#define NIBBLE_CHECK_GT(a, b) NIBBLE_CHECK_OP(a, >, b)
#define NIBBLE_CHECK_GE(a, b) NIBBLE_CHECK_OP(a, >=, b)
