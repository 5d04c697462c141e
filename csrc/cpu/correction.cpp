// SPDX-License-Identifier: Apache-2.0
// Rollout correction: one column of sums a row, the weights, the mask less what is rejected. A row is read once, in blocks
// that stay in the first cache: what the options ask of a block is asked one after the other, each with few sums in registers.
#include "../kernels.h"
#include "../math/correction.h"
#include "loss.h"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // tokens; a multiple of every vector

// Sums of x - shift and of its square, in float64, where the subtraction of floats near the shift is exact.
template <class A>
struct Moments2 {
  Doubles sum, square;
  void add(Vec<A> x, VD shift) {
    Doubles d = widen(x);
    d.a -= shift, sum.a += d.a, square.a = fused(d.a, d.a, square.a);
    if constexpr (sizeof(A) == 4) d.b -= shift, sum.b += d.b, square.b = fused(d.b, d.b, square.b);
  }
  double total() const { return fold(sum.a + sum.b); }
  double squares() const { return fold(square.a + square.b); }
};

// The largest and the smallest; a NaN is left out.
template <class A>
struct Extremes {
  Vec<A> most = splat(-A(__builtin_inff())), least = splat(A(__builtin_inff()));
  void add(Vec<A> x) { most = Ops<Vec<A>>::at_least(most, x), least = Ops<Vec<A>>::at_most(least, x); }
  double high() const {
    double h = most[0];
    for (int k = 1; k < kLanes<A>; ++k) h = most[k] > h ? most[k] : h;
    return h;
  }
  double low() const {
    double l = least[0];
    for (int k = 1; k < kLanes<A>; ++k) l = least[k] < l ? least[k] : l;
    return l;
  }
};

template <class A>
struct Block {
  A q[kBlock], e[kBlock], k3[kBlock];  // 0, 1, 0 at masked tokens
  int64_t first, count;
};

// What one row is made of: its operands, the lanes of its mask, the lanes it keeps, its column of the table.
template <class A>
struct Row {
  Column<A> old_log_prob, rollout_log_prob;
  MaskRow mask;
  OutColumn<A> weights;
  int64_t length;
  uint16_t *valid, *keep;
  double* column;
  bool direct;
  Row(const CorrectionArgs& a, int64_t r, bool stream, uint16_t* lanes, int64_t most, double* column)
      : old_log_prob(a.old_log_prob, a.rows, r), rollout_log_prob(a.rollout_log_prob, a.rows, r), mask(a.mask, a.rows, r),
        weights(a.weights, a.rows, r, stream), length(a.rows.len(r)), valid(lanes), keep(lanes + most), column(column),
        direct(old_log_prob.direct() && rollout_log_prob.direct() && mask.direct() && weights.direct()) {}
};

// ---- what is asked of a block ----------------------------------------------------------------------------------------
template <class A>
struct OffPolicy {
  Sum<A> old_log_prob, rollout_log_prob, k3;
  Moments2<A> excess;  // of the ratio over 1
  int64_t tokens = 0;
  void read(const Row<A>& row, Block<A>& b) {
    using V = Vec<A>;
    constexpr int W = kLanes<A>;
    const V safe = splat(A(kSafety));
    const VD one = splat(1.0);
    OffPolicy s = *this;  // in registers: through `this` each sum would be stored at each step
    for_lanes<A, false>(b.count, row.direct, [&](auto way, int64_t k, int64_t n) RLKERN_INLINE {
      const int64_t i = b.first + k;
      const uint32_t m = row.mask.template lanes<W>(way, i, n);
      row.valid[i / W] = row.keep[i / W] = static_cast<uint16_t>(m);
      if (m == 0) return;
      const V old = row.old_log_prob.valid(way, i, n, m), rollout = row.rollout_log_prob.valid(way, i, n, m), raw = old - rollout;
      RatioTerms<V> t;
      V open;
      if (__builtin_expect(any_beyond(Ops<V>::magnitude(raw), safe), 0)) t = ratio_terms(clamped(raw, -safe, safe)), open = exp_minus_1_minus(raw);
      else t = ratio_terms(raw), open = t.k3;
      storeu(b.q + k, t.q), storeu(b.e + k, t.e), storeu(b.k3 + k, t.k3);
      s.old_log_prob.add(old), s.rollout_log_prob.add(rollout), s.k3.add(open), s.excess.add(t.e, one);
      s.tokens += __builtin_popcount(m);
    });
    *this = s;
  }
  void leave(double* column) const {
    column[kRTokens] = static_cast<double>(tokens), column[kROld] = old_log_prob.total(), column[kRRollout] = rollout_log_prob.total();
    column[kRK3] = k3.total(), column[kRExcess] = excess.total(), column[kRExcess2] = excess.squares();
  }
};

template <class A>
struct TokenWeights {
  Moments2<A> weight, plain;  // of the weight over 1, exact near 1; of itself, for weights near 0
  Extremes<A> range;
  Count<A> high, low;
  void read(const CorrectionArgs& a, const Row<A>& row, const Block<A>& b) {
    using V = Vec<A>;
    constexpr int W = kLanes<A>;
    const V least = splat(A(a.low)), most = splat(A(a.high)), nothing = splat(A(__builtin_nanf(""))), unit = splat(A(1));
    const VD one = splat(1.0);
    TokenWeights t = *this;
    for_lanes<A, false>(b.count, row.direct, [&](auto way, int64_t k, int64_t n) RLKERN_INLINE {
      const uint32_t m = row.valid[(b.first + k) / W];
      if (m == 0) return row.weights(way, b.first + k, n, V{});
      const V ratio = loadu(b.e + k), w = correction_weight(ratio, least, most, a.icepop), tested = blend(m, ratio, nothing);
      t.high.add(tested > most), t.low.add(tested < least);
      t.range.add(blend(m, w, nothing));
      t.weight.add(blend(m, w, unit), one), t.plain.add(blend(m, w, V{}), VD{});
      row.weights(way, b.first + k, n, blend(m, w, V{}));
    });
    *this = t;
  }
  void leave(double* column) const {
    column[kRW] = weight.total(), column[kRW2] = weight.squares(), column[kRWMax] = range.high(), column[kRWMin] = range.low(),
    column[kRWSquare] = plain.squares();
    column[kRWHigh] = static_cast<double>(high.total()), column[kRWLow] = static_cast<double>(low.total());
  }
};

// The probabilities themselves, side by side.
template <class A>
struct Probabilities {
  Moments2<A> old, rollout, gap;
  Doubles product;
  Extremes<A> range;
  void read(const Row<A>& row, const Block<A>& b) {
    using V = Vec<A>;
    constexpr int W = kLanes<A>;
    for_lanes<A, false>(b.count, row.direct, [&](auto way, int64_t k, int64_t n) RLKERN_INLINE {
      const int64_t i = b.first + k;
      const uint32_t m = row.valid[i / W];
      if (m == 0) return;
      const V p = blend(m, exp_of(row.old_log_prob.valid(way, i, n, m)), V{}), r = blend(m, exp_of(row.rollout_log_prob.valid(way, i, n, m)), V{});
      const V d = Ops<V>::magnitude(p - r);
      const Doubles wide = widen(p), other = widen(r);
      product.a = fused(wide.a, other.a, product.a), product.b = fused(wide.b, other.b, product.b);
      old.add(p, VD{}), rollout.add(r, VD{}), gap.add(d, VD{}), range.add(d);
    });
  }
  void leave(double* column) const {
    column[kPOld] = old.total(), column[kPRollout] = rollout.total(), column[kPGap] = gap.total(), column[kPGapMax] = range.high();
    column[kPOld2] = old.squares(), column[kPRollout2] = rollout.squares(), column[kPGap2] = gap.squares();
    column[kPProduct] = fold(product.a + product.b);
  }
};

// One divergence: its sum and extremes, and what the option token_k* asks if there is one.
template <class A>
struct ByK {
  Sum<A> sum;
  Extremes<A> range;
  Moments2<A> clamped_to;
  Count<A> high, low;
  int64_t kept = 0;
  template <int K>
  void read(const Rejection* token, const Row<A>& row, const Block<A>& b) {
    using V = Vec<A>;
    constexpr int W = kLanes<A>;
    const V least = splat(A(token ? token->low : 0)), most = splat(A(token ? token->high : 0)), nothing = splat(A(__builtin_nanf("")));
    ByK t = *this;
    for (int64_t k = 0; k < b.count; k += W) {
      const uint32_t m = row.valid[(b.first + k) / W];
      if (m == 0) continue;
      const V v = divergence<K>(loadu(b.q + k), loadu(b.k3 + k)), tested = blend(m, v, nothing);
      t.sum.add(v), t.range.add(tested);
      if (!token) continue;
      const uint32_t within = lanes_of((tested >= least) & (tested <= most));
      row.keep[(b.first + k) / W] &= static_cast<uint16_t>(within);
      t.kept += __builtin_popcount(within);
      t.high.add(tested > most), t.low.add(tested < least);
      t.clamped_to.add(blend(m, clamped(v, least, most), V{}), VD{});
    }
    *this = t;
  }
  void read(int k, const Rejection* token, const Row<A>& row, const Block<A>& b) {
    k == 1 ? read<1>(token, row, b) : k == 2 ? read<2>(token, row, b) : read<3>(token, row, b);
  }
  void leave(double* of_k) const {
    of_k[kKSum] = sum.total(), of_k[kKMax] = range.high(), of_k[kKMin] = range.low(), of_k[kKKept] = static_cast<double>(kept);
    of_k[kKClamped] = clamped_to.total(), of_k[kKClamped2] = clamped_to.squares();
    of_k[kKHigh] = static_cast<double>(high.total()), of_k[kKLow] = static_cast<double>(low.total());
  }
};

// ---- what is written behind the sums ----------------------------------------------------------------------------------
// Eight bytes, 0 where the bit is.
inline uint64_t bytes_kept(uint64_t bytes, uint32_t bits) {
  const uint64_t ones = 0x0101010101010101u, picked = ((bits & 0xff) * ones) & 0x8040201008040201u;
  return bytes & (((picked + 0x7f * ones) >> 7 & ones) * 0xff);
}
template <class T>
void keep_some(const T* from, int64_t step, T* to, int64_t i, int64_t n, uint32_t bits) {
  for (int64_t k = 0; k < n; ++k) to[i + k] = bits >> k & 1 ? from[(i + k) * step] : T(0);
}
// The mask's own values, as bits, where they are kept.
template <class A>
void write_mask(const CorrectionArgs& a, int64_t r, const Row<A>& row, bool stream) {
  constexpr int W = kLanes<A>, L = kLanes<double>;
  const int64_t size = bytes_of(a.modified.dtype), step = a.mask.inner_stride;
  char* out = static_cast<char*>(a.modified.data) + a.rows.base(a.modified, r) * size;
  const char* in = row.mask.data;
  const bool aligned = stream && reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0;
  for (int64_t i = 0; i < row.length; i += W) {
    const uint32_t m = row.keep[i / W];
    const int64_t n = row.length - i < W ? row.length - i : W;
    if (size == 8) {
      const double* from = reinterpret_cast<const double*>(in) + i;
      double* to = reinterpret_cast<double*>(out) + i;
      if (n < W || step == 0) {
        keep_some(reinterpret_cast<const uint64_t*>(in), step, reinterpret_cast<uint64_t*>(out), i, n, m);
        continue;
      }
      for (int k = 0; k < W; k += L) {
        const VD v = blend(m >> k & kAllLanes<double>, loadu(from + k), VD{});
        aligned ? stream_store(to + k, v) : storeu(to + k, v);
      }
    } else if (size == 1 && n == W && W % 8 == 0 && step == 1) {
      for (int k = 0; k < W; k += 8) {
        uint64_t bytes;
        std::memcpy(&bytes, in + i + k, 8);
        bytes = bytes_kept(bytes, m >> k);
        std::memcpy(out + i + k, &bytes, 8);
      }
    } else if (size == 1) {
      keep_some(reinterpret_cast<const uint8_t*>(in), step, reinterpret_cast<uint8_t*>(out), i, n, m);
    } else if (size == 2) {
      keep_some(reinterpret_cast<const uint16_t*>(in), step, reinterpret_cast<uint16_t*>(out), i, n, m);
    } else {
      keep_some(reinterpret_cast<const uint32_t*>(in), step, reinterpret_cast<uint32_t*>(out), i, n, m);
    }
  }
}

template <class A>
void write_row_weights(const CorrectionArgs& a, const Row<A>& row) {
  constexpr int W = kLanes<A>;
  const A q = A(row.column[kROld] - row.column[kRRollout]), ratio = exp_of(splat(clamped<A>(q, A(-kSafety), A(kSafety))))[0];
  row.column[kRRatio] = ratio;
  const Vec<A> w = correction_weight(splat(ratio), splat(A(a.low)), splat(A(a.high)), a.icepop);
  for_lanes<A, false>(row.length, row.weights.direct(),
                      [&](auto way, int64_t i, int64_t n) RLKERN_INLINE { row.weights(way, i, n, blend(row.valid[i / W], w, Vec<A>{})); });
}

template <class A>
void correction_row(const CorrectionArgs& a, int64_t r, bool stream, Block<A>& b, uint16_t* lanes, int64_t most, double* column) {
  constexpr int W = kLanes<A>;
  const Row<A> row(a, r, stream, lanes, most, column);
  OffPolicy<A> off_policy;
  TokenWeights<A> weights;
  Probabilities<A> probabilities;
  ByK<A> by[3];
  const Rejection* token[3] = {};
  bool asked[3] = {};
  for (int o = 0; o < a.options; ++o) {
    asked[a.option[o].k - 1] = true;
    if (a.option[o].by == RejectBy::token) token[a.option[o].k - 1] = a.option + o;
  }
  for (b.first = 0; b.first < row.length; b.first += kBlock) {
    b.count = row.length - b.first < kBlock ? row.length - b.first : kBlock;
    off_policy.read(row, b);
    if (a.level == WeightLevel::token) weights.read(a, row, b);
    if (a.probabilities) probabilities.read(row, b);
    for (int k = 1; k <= 3; ++k)
      if (asked[k - 1]) by[k - 1].read(k, token[k - 1], row, b);
  }
  for (int f = 0; f < kCorrectionFields; ++f) column[f] = 0;
  off_policy.leave(column);
  if (a.level == WeightLevel::token) weights.leave(column);
  if (a.probabilities) probabilities.leave(column + kRProbability);
  if (a.level == WeightLevel::sequence) write_row_weights(a, row);
  for (int k = 0; k < 3; ++k)
    if (asked[k]) by[k].leave(column + kRByK + k * kByK);
  bool stays = true;
  for (int o = 0; o < a.options; ++o) {
    const double* of_k = column + kRByK + (a.option[o].k - 1) * kByK;
    if (a.option[o].by != RejectBy::token) stays = stays && row_stays<A>(a.option[o], column[kRTokens], of_k[kKSum], of_k[kKMax]);
  }
  int64_t kept = 0;
  for (int64_t v = 0; v < (row.length + W - 1) / W; ++v) {
    if (!stays) row.keep[v] = 0;
    kept += __builtin_popcount(row.keep[v]);
  }
  column[kRKept] = static_cast<double>(kept);
  if (a.modified) write_mask(a, r, row, stream);
}

template <class A>
double correction_all(const CorrectionArgs& a) {
  const int64_t rows = a.rows.count;
  const bool stream = worth_streaming(a.rows.total(), 28);
  double* table = static_cast<double*>(a.table.data);
  parallel_rows(rows, a.rows.total(), a.place, [&](int64_t begin, int64_t end) {
    int64_t longest = 0;
    for (int64_t r = begin; r < end; ++r) longest = a.rows.len(r) > longest ? a.rows.len(r) : longest;
    const int64_t most = longest / kLanes<A> + 1;
    Scratch<uint16_t> lanes(2 * most);
    Scratch<Block<A>> block(1);
    double column[kCorrectionFields];
    for (int64_t r = begin; r < end; ++r) {  // upwards: rows and time are one stream to the prefetcher
      correction_row<A>(a, r, stream, *block.data, lanes.data, most, column);
      for (int f = 0; f < kCorrectionFields; ++f) table[f * rows + r] = column[f];
    }
    if (stream) stream_fence();
  });
  double tokens = 0;
  for (int64_t r = 0; r < rows; ++r) tokens += table[kRTokens * rows + r];
  return tokens;
}

}  // namespace

double rollout_correction(const CorrectionArgs& a) {
  return any_double(a.old_log_prob, a.rollout_log_prob) ? correction_all<double>(a) : correction_all<float>(a);
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
