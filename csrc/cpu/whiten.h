// SPDX-License-Identifier: Apache-2.0
// Statistics under a mask: over each row, or over all rows in fixed chunks merged in order, so that bits do not depend on
// the thread count. A mask of zeros and ones is read as bits; one that holds other values as weights, in float64.
#pragma once
#include "chunks.h"
#include "mask.h"
#include "moments.h"

namespace rlkern {
namespace RLKERN_ISA {

// ---- masks that may be weights ---------------------------------------------------------------------------------------
// The lanes of a run of mask, which notices a value other than 0 and 1: an int64 mask on the way, others beforehand.
template <class A>
struct NotedLanes {
  const MaskRow& mask;
  const bool on_the_way;
  bool other = false;
  VL seen{};
  NotedLanes(const MaskRow& m, int64_t begin, int64_t end) : mask(m), on_the_way(m.dtype == Dtype::i64 && m.data && !m.per_row) {
    if (!on_the_way) other = m.weighs(begin, end);
  }
  RLKERN_INLINE uint32_t operator()(Direct way, int64_t i, int64_t n) {
    constexpr int W = kLanes<A>;
    if (!on_the_way) return mask.template lanes<W>(way, i, n);
    const int64_t* p = reinterpret_cast<const int64_t*>(mask.data) + i;
    for (int k = 0; k < W; k += kLanes<int64_t>) seen |= loadu(p + k);
    return nonzero_lanes<W>(p);
  }
  RLKERN_INLINE uint32_t operator()(Any way, int64_t i, int64_t n) {
    if (on_the_way)
      for (int64_t k = 0; k < n; ++k) seen[0] |= reinterpret_cast<const int64_t*>(mask.data)[i + k];
    return mask.template lanes<kLanes<A>>(way, i, n);
  }
  bool weights() const { return other || lanes_of((seen & splat(~int64_t{1})) != 0) != 0; }
};

// ---- sums of one run of vectors --------------------------------------------------------------------------------------
// Like MomentLanes, for a sum alone: `mean` holds the sum. Summed in blocks: one large value costs its block digits, not all.
template <class A>
class SumLanes {
 public:
  RLKERN_INLINE void add(Vec<A> x, uint32_t m) {
    if (m == 0) return;
    if (++pending_ == kBlock) {
      done_ += block_.acc.a + block_.acc.b;
      block_ = Sum<A>{}, pending_ = 0;
    }
    block_.add(m == kAllLanes<A> ? x : blend(m, x, Vec<A>{}));
    count_ += __builtin_popcount(m);
  }
  Moments total() const { return {static_cast<double>(count_), fold(done_ + (block_.acc.a + block_.acc.b)), 0}; }

 private:
  static constexpr int kBlock = 64;
  Sum<A> block_;
  VD done_{};
  int64_t count_ = 0;
  int pending_ = 0;
};

template <class A, class Lanes>
RLKERN_INLINE inline bool add_piece(const Operand& values, const Operand& mask, const Rows& rows, int64_t r, int64_t begin, int64_t end, uint16_t* kept,
                                    Lanes& lanes) {
  const Column<A> value(values, rows, r);
  const MaskRow bits(mask, rows, r);
  NotedLanes<A> noted(bits, begin, end);
  for_lanes<A, false>(end - begin, value.direct() && bits.direct(), [&](auto way, int64_t i, int64_t n) RLKERN_INLINE {
    const uint32_t m = noted(way, begin + i, n);
    if (kept) kept[(begin + i) / kLanes<A>] = static_cast<uint16_t>(m);
    if (m) lanes.add(value(way, begin + i, n), m);
  });
  return noted.weights();
}

// Weights, in two passes of plain sums: sum(w), sum(w v), or, given a mean, sum(w (v - mean)^2) as m2.
inline Moments weigh_piece(const Operand& values, const Operand& mask, const Rows& rows, int64_t r, int64_t begin, int64_t end, const double* mean) {
  const Column<double> value(values, rows, r), weight(mask, rows, r);
  const VD zero{}, center = splat(mean ? *mean : 0.0);
  VD count{}, sum{};
  for_vectors<double, false>(end - begin, [&](int64_t i, int64_t n) RLKERN_INLINE {
    const VD w = weight(begin + i, n), v = value(begin + i, n) - center;
    count += w;
    sum += (w != 0) ? (mean ? w * v * v : w * v) : zero;
  });
  return mean ? Moments{0, 0, fold(sum)} : Moments{fold(count), fold(sum), 0};
}

template <class F>
inline Moments weighed(bool want_m2, F&& pass) {  // pass(mean or null): the sums over everything
  Moments all = pass(nullptr);
  if (!want_m2) return all;
  all.mean = all.count != 0 ? all.mean / all.count : 0;
  all.m2 = pass(&all.mean).m2;
  return all;
}

// ---- statistics ------------------------------------------------------------------------------------------------------
// MomentLanes gives moments; SumLanes gives {count, sum}.
template <class Lanes>
constexpr bool kIsSum = false;
template <class A>
constexpr bool kIsSum<SumLanes<A>> = true;

template <class A, class Lanes>
inline Moments row_statistics(const Operand& values, const Operand& mask, const Rows& rows, int64_t r, uint16_t* kept = nullptr) {
  Lanes lanes;
  if (!add_piece<A>(values, mask, rows, r, 0, rows.len(r), kept, lanes)) return lanes.total();
  return weighed(!kIsSum<Lanes>, [&](const double* mean) { return weigh_piece(values, mask, rows, r, 0, rows.len(r), mean); });
}

template <class A, class Lanes>
inline Moments all_statistics(const Operand& values, const Operand& mask, const Chunks& chunks, int threads, const KeptLanes* kept = nullptr) {
  Scratch<Moments> part(chunks.count);
  Scratch<uint8_t> weighs(chunks.count);
  chunks.each(threads, [&](int64_t c) {
    Lanes lanes;
    bool weights = false;
    chunks.pieces(c, [&](int64_t r, int64_t begin, int64_t end)
                         RLKERN_INLINE { weights |= add_piece<A>(values, mask, chunks.rows, r, begin, end, kept ? kept->row(r) : nullptr, lanes); });
    part.data[c] = lanes.total(), weighs.data[c] = weights;
  });
  bool weighted = false;
  for (int64_t c = 0; c < chunks.count; ++c) weighted |= weighs.data[c] != 0;
  auto sums = [&] {
    Moments all;
    for (int64_t c = 0; c < chunks.count; ++c) all.count += part.data[c].count, all.mean += part.data[c].mean, all.m2 += part.data[c].m2;
    return all;
  };
  if (weighted) {
    return weighed(!kIsSum<Lanes>, [&](const double* mean) {
      chunks.each(threads, [&](int64_t c) {
        Moments m;
        chunks.pieces(c, [&](int64_t r, int64_t begin, int64_t end) {
          const Moments p = weigh_piece(values, mask, chunks.rows, r, begin, end, mean);
          m.count += p.count, m.mean += p.mean, m.m2 += p.m2;
        });
        part.data[c] = m;
      });
      return sums();
    });
  }
  if (kIsSum<Lanes>) return sums();
  Moments all;
  for (int64_t c = 0; c < chunks.count; ++c) all.merge(part.data[c]);
  return all;
}

// ---- small operands --------------------------------------------------------------------------------------------------
inline double one_value(const Operand& x, int64_t i) { return load_any<double>(x.data, x.dtype, i * x.inner_stride, 1)[0]; }
inline void put_value(const Operand& x, int64_t i, double v) {
  if (x) OutColumn<double>(x, Rows{1, x.cols, nullptr}, 0, false)(i, 1, splat(v));
}
// (rows or 1, 3) float64
inline Moments get_moments(const Operand& x, int64_t r) {
  const double* p = static_cast<const double*>(x.data) + r * x.row_stride;
  return {p[0], p[1], p[2]};
}
inline void put_moments(const Operand& x, int64_t r, const Moments& m) {
  if (!x) return;
  double* p = static_cast<double*>(x.data) + r * x.row_stride;
  p[0] = m.count, p[1] = m.mean, p[2] = m.m2;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
