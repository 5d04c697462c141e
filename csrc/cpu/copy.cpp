// SPDX-License-Identifier: Apache-2.0
// A non-temporal copy: the ruler that `rlkern bench` lays beside every kernel.
#include "../kernels.h"
#include "lanes.h"

namespace rlkern {
namespace RLKERN_ISA {

double stream_copy(const CopyArgs& a) {
  constexpr int64_t kPiece = 1 << 18;
  const int64_t pieces = a.bytes / kPiece;
  parallel_rows(pieces, a.bytes / 4, a.place, [&](int64_t begin, int64_t end) {
    const float* from = static_cast<const float*>(a.from) + begin * kPiece / 4;
    float* to = static_cast<float*>(a.to) + begin * kPiece / 4;
    for (int64_t i = 0; i < (end - begin) * kPiece / 4; i += kLanes<float>) stream_store(to + i, loadu(from + i));
    stream_fence();
  });
  return static_cast<double>(pieces * kPiece);
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
