// SPDX-License-Identifier: Apache-2.0
// The one thing that csrc/cuda takes from it.
#pragma once
#include "fibers.h"

namespace cooperative_groups {
struct Grid {
  void sync() const { emulator::grid_barrier(); }
};
inline Grid this_grid() { return {}; }
}  // namespace cooperative_groups
