// SPDX-License-Identifier: Apache-2.0
// Work that does not care where rows end, in pieces of a fixed size.
#pragma once
#include "lanes.h"

namespace rlkern {
namespace RLKERN_ISA {

// Operands without gaps are one long row: rows of any length then cost the same.
inline bool gapless(const Operand& x, const Rows& rows) { return !x || x.row_stride == (x.inner_stride ? rows.length : 0); }
template <class... Operands>
inline Rows one_row_if_gapless(const Rows& rows, const Operands&... x) {
  return rows.count > 1 && (gapless(x, rows) && ...) ? Rows{1, rows.total(), nullptr} : rows;
}

// All elements as pieces of rows, in chunks of about kChunk. Pieces begin at multiples of every vector width.
struct Chunks {
  static constexpr int64_t kChunk = 1 << 14;
  Rows rows;
  int64_t per_row, rows_each, count;
  explicit Chunks(const Rows& r) : rows(r) {
    per_row = (r.length + kChunk - 1) / kChunk, rows_each = 1;
    if (per_row <= 1) per_row = 1, rows_each = r.length > 0 ? kChunk / r.length : 1;
    count = r.length > 0 ? per_row > 1 ? r.count * per_row : (r.count + rows_each - 1) / rows_each : 0;
  }
  template <class F>
  RLKERN_INLINE void pieces(int64_t c, F&& f) const {  // f(row, begin, end)
    if (per_row > 1) {
      const int64_t begin = c % per_row * kChunk, end = begin + kChunk;
      return f(c / per_row, begin, end < rows.length ? end : rows.length);
    }
    const int64_t first = c * rows_each, last = first + rows_each < rows.count ? first + rows_each : rows.count;
    for (int64_t r = first; r < last; ++r) f(r, int64_t{0}, rows.length);
  }
  template <class F>
  void each(int threads, F&& f) const {  // f(chunk)
    parallel_rows(count, rows.total(), threads, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) f(c);
    });
  }
};

}  // namespace RLKERN_ISA
}  // namespace rlkern
