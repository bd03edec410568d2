// The build's version, for --version, GetStatus and WorkerInfo.
#pragma once

namespace nibble {

inline constexpr char kVersion[] = "0.1.0";

}  // namespace nibble
