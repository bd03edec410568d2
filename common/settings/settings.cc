#include "common/settings/settings.h"

#include <yaml-cpp/yaml.h>

#include <CLI/CLI.hpp>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/file.h"
#include "common/base/version.h"

namespace nibble {
namespace {

using Values = std::map<std::string, std::vector<std::string>>;  // by name

// A scalar is one value, a list is several; a list in a list joins with commas.
void ReadFile(const std::string& path, Values* values, std::vector<std::string>* problems) {
  const auto problem = [&](const std::string& what) { problems->push_back(absl::StrCat("config ", path, ": ", what)); };
  const absl::StatusOr<std::string> contents = ReadSmallFile(path);
  if (!contents.ok()) return problems->push_back(absl::StrCat("config: ", contents.status().message()));
  try {
    const YAML::Node root = YAML::Load(*contents);
    if (root.IsNull()) return;
    if (!root.IsMap()) return problem("must be a map of settings");
    for (const auto& entry : root) {
      const std::string name = entry.first.as<std::string>();
      const YAML::Node& value = entry.second;
      std::vector<std::string> texts;
      if (value.IsScalar()) {
        texts.push_back(value.Scalar());
      } else if (value.IsSequence()) {
        for (const auto& item : value) {
          texts.push_back(item.IsSequence() ? absl::StrJoin(item.as<std::vector<std::string>>(), ",")
                                            : item.as<std::string>());
        }
      } else {
        problem(absl::StrCat(name, " must be a value or a list"));
        continue;
      }
      if (!values->emplace(name, std::move(texts)).second) problem(absl::StrCat(name, " appears twice"));
    }
  } catch (const YAML::Exception& e) {  // yaml-cpp throws; it ends here
    problem(e.what());
  }
}

}  // namespace

absl::StatusOr<std::string> ParseSettings(const Program& program, const std::vector<Setting>& settings,
                                          const std::vector<std::string>& arguments,
                                          const std::function<void(std::vector<std::string>*)>& check_together) {
  CLI::App app{program.description, program.name};
  app.allow_extras();
  app.set_help_flag();  // handled here, so that parsing never leaves by an exception on the good path
  bool help = false, version = false;
  std::vector<std::string> config_files;
  app.add_flag("--help,-h", help, "print this text");
  app.add_flag("--version", version, "print the version");
  app.add_option("--config", config_files, "YAML file with the settings below, without the dashes; flags win")
      ->type_name("FILE");
  Values flags;
  for (const Setting& s : settings) {
    app.add_option("--" + s.name, flags[s.name], s.help)->type_name(s.value_name)->allow_extra_args(false);
  }

  std::vector<std::string> problems;
  try {
    app.parse(std::vector<std::string>(arguments.rbegin(), arguments.rend()));  // CLI11 wants them reversed
  } catch (const CLI::Error& e) {
    problems.push_back(e.what());
  }
  if (help) return app.help();
  if (version) return absl::StrCat(program.name, " ", kVersion, "\n");
  for (const std::string& extra : app.remaining()) {
    problems.push_back(absl::StrCat("'", extra, "' is no setting of ", program.name));
  }

  Values file;
  if (config_files.size() > 1) problems.push_back("config is given more than once");
  for (const std::string& path : config_files) ReadFile(path, &file, &problems);
  for (const Setting& s : settings) {
    const auto in_file = file.find(s.name);
    std::string problem;
    if (!flags[s.name].empty()) {
      problem = s.set(flags[s.name]);
    } else if (in_file != file.end()) {
      problem = s.set(in_file->second);
    }
    if (!problem.empty()) problems.push_back(absl::StrCat(s.name, " ", problem));
    if (in_file != file.end()) file.erase(in_file);
  }
  for (const auto& [name, values] : file) {
    problems.push_back(absl::StrCat("config ", config_files[0], ": '", name, "' is no setting of ", program.name));
  }
  check_together(&problems);
  if (!problems.empty()) return absl::InvalidArgumentError(absl::StrJoin(problems, "\n"));
  return std::string();
}

}  // namespace nibble
