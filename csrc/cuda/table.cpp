// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels as a table; null where csrc/cuda has none.
#include "../kernels.h"

namespace rlkern {
namespace cuda {
namespace {
constexpr Kernels filled() {  // before anything runs: bind.cpp reads it in a constructor
  Kernels t{};
  t.isa = "cuda";
#define RLKERN_ENTRY(name, Args) t.name = name;
  RLKERN_CUDA_KERNELS(RLKERN_ENTRY)
  return t;
}
}  // namespace
extern const Kernels table;
const Kernels table = filled();
}  // namespace cuda
}  // namespace rlkern
