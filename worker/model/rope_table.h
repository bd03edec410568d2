// Rotary position embedding: the angles of every position, computed once.
#pragma once

#include <vector>

#include "common/model/config.h"

namespace nibble {

// Inverse frequencies [D/2] of the rotated pairs (d, d + D/2), with Llama-3.1's scaling when the config has it: long
// wavelengths are stretched by `factor`, short ones kept, those between interpolated (Llama 3 herd of models, section
// 3.4.2; the formula is that of HF transformers, modeling_rope_utils.py).
std::vector<double> RopeInverseFrequencies(const ModelConfig& config);

// [max_position_embeddings, D]: D/2 cosines, then D/2 sines. Angles in double, stored as f32.
std::vector<float> RopeTable(const ModelConfig& config);

}  // namespace nibble
