// SPDX-License-Identifier: Apache-2.0
// An elementwise op does not care where rows end: operands without gaps become rows of one size, the last one shorter.
#pragma once
#include "lanes.h"

namespace rlkern {
namespace RLKERN_ISA {

inline bool gapless(const Operand& x) { return !x || (x.inner_stride == 1 && (x.rows <= 1 || x.row_stride == x.cols)); }

struct Flat {
  static constexpr int64_t kLength = 1 << 14;
  Rows rows;
  int64_t total;
  template <class... O>
  explicit Flat(const Rows& of, O&... x) : rows(of), total(of.total()) {
    if (!(gapless(x) && ...)) return;
    rows = Rows{(total + kLength - 1) / kLength, kLength, nullptr};
    ((x.row_stride = kLength), ...);
  }
  int64_t length(int64_t r) const { return (r + 1) * rows.length <= total ? rows.length : total - r * rows.length; }
};

}  // namespace RLKERN_ISA
}  // namespace rlkern
