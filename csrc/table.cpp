// SPDX-License-Identifier: Apache-2.0
// Compiled once per ISA, and for CUDA: their kernels as a table.
#include "kernels.h"

#define RLKERN_TEXT_OF(x) #x
#define RLKERN_TEXT(x) RLKERN_TEXT_OF(x)

namespace rlkern {
namespace RLKERN_ISA {
#define RLKERN_ENTRY(name, Args) name,
extern const Kernels table;
const Kernels table = {RLKERN_TEXT(RLKERN_ISA), RLKERN_KERNELS(RLKERN_ENTRY)};
}  // namespace RLKERN_ISA
}  // namespace rlkern
