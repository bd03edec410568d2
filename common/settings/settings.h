// A program's settings: flags and one YAML file that know the same names; a flag wins over the file. Every problem of
// both is found in one go, so that a start at three in the morning fails once, not five times.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/settings/setting.h"

namespace nibble {

struct Program {
  std::string name;         // "nibble-router"
  std::string description;  // on top of --help
};

// Sets what `arguments` (without the program's name) and the file named by --config give. `check_together` then adds
// the problems between settings. INVALID_ARGUMENT lists every problem, one a line. A text: --help or --version was
// asked for; print it and exit 0.
absl::StatusOr<std::string> ParseSettings(const Program& program, const std::vector<Setting>& settings,
                                          const std::vector<std::string>& arguments,
                                          const std::function<void(std::vector<std::string>*)>& check_together);

}  // namespace nibble
