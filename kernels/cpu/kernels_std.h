// The headers that kernels_inl.h needs. Included before a target pragma opens: what they define inline is shared with
// the rest of the program and must stay compiled for the baseline machine.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "common/base/check.h"
#include "common/base/float16.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/packing.h"
#include "kernels/ops.h"
