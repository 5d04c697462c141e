// SPDX-License-Identifier: Apache-2.0
// Outcome advantages: row sums, their groups, one value broadcast over each row's mask. Two sweeps touch memory, each input and
// output once; what lies between them has one number a row.
#include "../kernels.h"
#include "../math/whiten.h"
#include "group.h"
#include "mask.h"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

// ---- row sums and broadcast ----------------------------------------------------------------------------------------
uint32_t inside(int64_t n) { return static_cast<uint32_t>((uint64_t{1} << n) - 1); }
inline VD doubles_at(const double* p) { return loadu(p); }
inline VD doubles_at(const float* p) {  // gcc takes __builtin_convertvector apart into quarters
#if defined(__AVX512F__)
  return _mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(p));
#elif defined(__AVX2__)
  return _mm256_cvtps_pd(_mm_loadu_ps(p));
#else
  return VD{p[0], p[1]};
#endif
}
template <class A>
double row_sum(const Operand& x, const Rows& rows, int64_t r) {
  constexpr int W = kLanes<A>, D = kLanes<double>;
  const Column<A> column(x, rows, r);
  const int64_t length = rows.len(r);
  VD s0{}, s1{}, s2{}, s3{};  // four chains of additions: one alone is slower than memory
  int64_t i = 0;
  if (column.native && !column.per_row) {
    const A* p = reinterpret_cast<const A*>(column.data);
    for (; i + 4 * D <= length; i += 4 * D) {
      s0 += doubles_at(p + i), s1 += doubles_at(p + i + D);
      s2 += doubles_at(p + i + 2 * D), s3 += doubles_at(p + i + 3 * D);
    }
  }
  Sum<A> rest;
  for (; i < length; i += W) {
    const int64_t n = length - i < W ? length - i : W;
    rest.add(column.valid(i, n, inside(n)));  // a value that stands for a whole row fills every lane
  }
  return fold((s0 + s1) + (s2 + s3)) + rest.total();
}
// f(lanes), lanes(i) = the mask of the whole vector at i: the usual dtypes leave no branch in the loop.
template <class A, class F>
void with_lanes(const MaskRow& mask, F&& f) {
  constexpr int W = kLanes<A>;
  const int64_t* words = reinterpret_cast<const int64_t*>(mask.data);
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(mask.data);
  const bool plain = mask.data && !mask.per_row;
  if (plain && mask.dtype == Dtype::i64) f([=](int64_t i) RLKERN_INLINE { return nonzero_lanes<W>(words + i); });
  else if (plain && bytes_of(mask.dtype) == 1) f([=](int64_t i) RLKERN_INLINE { return nonzero_lanes<W>(bytes + i); });
  else f([&](int64_t i) { return mask.lanes<W>(i, W); });
}
// Sum of the rewards and number of the valid tokens, in step through both rows; the mask's lanes stay in `kept`.
template <class A>
double row_sum_and_count(const GroupAdvantageArgs& a, int64_t r, uint16_t* kept, double& count) {
  constexpr int W = kLanes<A>, D = kLanes<double>;
  const Column<A> column(a.rewards, a.rows, r);
  const MaskRow mask(a.mask, a.rows, r);
  const int64_t length = a.rows.len(r), whole = column.native && !column.per_row ? length / W * W : 0;
  const A* p = reinterpret_cast<const A*>(column.data);
  VD s0{}, s1{};
  int64_t valid = 0;
  with_lanes<A>(mask, [&](auto lanes) {
    for (int64_t i = 0; i < whole; i += W) {
      s0 += doubles_at(p + i);
      if (W > D) s1 += doubles_at(p + i + (W > D ? D : 0));
      const uint32_t m = lanes(i);
      kept[i / W] = static_cast<uint16_t>(m), valid += __builtin_popcount(m);
    }
  });
  Sum<A> rest;
  for (int64_t i = whole; i < length; i += W) {
    const int64_t n = length - i < W ? length - i : W;
    const uint32_t m = mask.lanes<W>(i, n);
    kept[i / W] = static_cast<uint16_t>(m), valid += __builtin_popcount(m);
    rest.add(column.valid(i, n, inside(n)));
  }
  count = static_cast<double>(valid);
  return fold(s0 + s1) + rest.total();
}
template <class A>
double row_count(const GroupAdvantageArgs& a, int64_t r, uint16_t* kept) {
  constexpr int W = kLanes<A>;
  const MaskRow mask(a.mask, a.rows, r);
  const int64_t length = a.rows.len(r), whole = length / W * W;
  int64_t valid = 0;
  with_lanes<A>(mask, [&](auto lanes) {
    for (int64_t i = 0; i < whole; i += W) {
      const uint32_t m = lanes(i);
      kept[i / W] = static_cast<uint16_t>(m), valid += __builtin_popcount(m);
    }
  });
  if (whole < length) {
    const uint32_t m = mask.lanes<W>(whole, length - whole);
    kept[whole / W] = static_cast<uint16_t>(m), valid += __builtin_popcount(m);
  }
  return static_cast<double>(valid);
}
template <class A, bool Stream, class F>
void fill(A* out, int64_t whole, Vec<A> v, F lanes) {
  for (int64_t i = 0; i < whole; i += kLanes<A>) {
    const Vec<A> x = blend(lanes(i), v, Vec<A>{});
    if (Stream) stream_store(out + i, x);
    else storeu(out + i, x);
  }
}
template <class A>
void broadcast_row(const GroupAdvantageArgs& a, int64_t r, double value, bool stream, const uint16_t* kept) {
  constexpr int W = kLanes<A>;
  const MaskRow mask(a.mask, a.rows, r);
  const OutColumn<A> advantages(a.advantages, a.rows, r, stream);
  const Vec<A> v = splat(static_cast<A>(value)), zero{};
  const int64_t length = a.rows.len(r), whole = advantages.native ? length / W * W : 0;
  auto filled = [&](auto lanes) {
    A* out = reinterpret_cast<A*>(advantages.data);
    advantages.stream ? fill<A, true>(out, whole, v, lanes) : fill<A, false>(out, whole, v, lanes);
  };
  if (kept) filled([=](int64_t i) RLKERN_INLINE { return static_cast<uint32_t>(kept[i / W]); });
  else with_lanes<A>(mask, filled);
  for (int64_t i = whole; i < length; i += W) {
    const int64_t n = length - i < W ? length - i : W;
    advantages(i, n, blend(kept ? kept[i / W] : mask.lanes<W>(i, n), v, zero));
  }
}

// Every valid token of row r holds values[r]: the moments of all tokens from one number a row.
Moments token_moments(int64_t rows, const double* values, const double* counts) {
  Moments m;
  double sum = 0;
  for (int64_t r = 0; r < rows; ++r)
    if (counts[r] > 0) m.count += counts[r], sum += counts[r] * values[r];
  m.mean = sum / m.count;
  for (int64_t r = 0; r < rows; ++r)
    if (counts[r] > 0) m.m2 += counts[r] * (values[r] - m.mean) * (values[r] - m.mean);
  return m;
}

// ---- between the sweeps --------------------------------------------------------------------------------------------
// The best row of each group gets its lead over the second best. A NaN is the best, and makes the lead NaN. How many groups
// have one row.
double leads(const GroupAdvantageArgs& a, const double* scores, double* values) {
  double lone = 0;
  for (int64_t g = 0; g < a.groups.count; ++g) {
    const GroupMoments m = moments_of(a.groups, g, scores, nullptr);
    BestTwo two;
    for_group(a.groups, g, [&](int64_t r) { two.add(scores[r], r), values[r] = 0; });
    if (two.row >= 0) values[two.row] = two.lead() * inverse_scale(m, a.options);
    lone += m.count == 1;
  }
  return lone;
}
void weigh_components(const GroupAdvantageArgs& a, double* scores, double* values) {
  const Operand& x = a.components;
  for (int64_t k = 0; k < x.cols; ++k) {
    const double weight = row_value<double>(a.component_weights, k);
    for (int64_t r = 0; r < x.rows; ++r) scores[r] = load_any<double>(x.data, x.dtype, r * x.row_stride + k * x.inner_stride, 1)[0];
    for (int64_t g = 0; g < a.groups.count; ++g) {
      const GroupScale scale(moments_of(a.groups, g, scores, nullptr), a.options);
      for_group(a.groups, g, [&](int64_t r) { values[r] += weight * scale(scores[r]); });
    }
  }
}
// values from scores, one number a row; counts are there where lengths weigh.
double group_values(const GroupAdvantageArgs& a, double* scores, const double* counts, double* values) {
  double lone = 0;
  if (a.components) weigh_components(a, scores, values);
  else if (a.options.baseline == Baseline::second_best) lone = leads(a, scores, values);
  else
    for (int64_t g = 0; g < a.groups.count; ++g) {
      const GroupScale scale(moments_of(a.groups, g, scores, a.options.baseline == Baseline::length_weighted ? counts : nullptr), a.options);
      for_group(a.groups, g, [&](int64_t r) { values[r] = scale(scores[r]); });
    }
  if (a.f_norm == 0) return lone;
  int64_t nonzero = 0;
  for (int64_t r = 0; r < a.rows.count; ++r) nonzero += scores[r] != 0;
  const double factor = static_cast<double>(a.rows.count) / static_cast<double>(nonzero > 1 ? nonzero : 1) / a.f_norm;
  for (int64_t r = 0; r < a.rows.count; ++r) values[r] *= factor;
  return lone;
}

template <class A>
double advantage_all(const GroupAdvantageArgs& a) {
  const int64_t rows = a.rows.count, total = a.rows.total();
  const bool keep = a.whiten || a.components || a.options.baseline == Baseline::length_weighted;
  const bool stream = worth_streaming(total, 2 * 16);  // early: nothing reads the result back soon
  Scratch<double> scores(rows), counts(keep ? rows : 0), values(rows);
  Scratch<uint16_t> lanes(keep ? KeptLanes::count(a.rows, kLanes<A>) : 0);
  const KeptLanes kept(a.rows, kLanes<A>, lanes.data);
  parallel_rows(rows, total, a.place, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (a.components) counts.data[r] = row_count<A>(a, r, kept.row(r));
      else scores.data[r] = keep ? row_sum_and_count<A>(a, r, kept.row(r), counts.data[r]) : row_sum<A>(a.rewards, a.rows, r);
    }
  });
  double count = group_values(a, scores.data, counts.data, values.data);
  if (a.whiten) {
    const Moments m = token_moments(rows, values.data, counts.data);
    if (m.count <= (a.whiten_options.unbiased ? 1 : 0)) return m.count;  // the caller refuses
    const double rstd = reciprocal_std(m, a.whiten_options);
    for (int64_t r = 0; r < rows; ++r) values.data[r] = (values.data[r] - m.mean) * rstd + (a.whiten_options.shift_mean ? 0.0 : m.mean);
    count = m.count;
  }
  parallel_rows(rows, total, a.place, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) broadcast_row<A>(a, r, values.data[r], stream, keep ? kept.row(r) : nullptr);
    if (stream) stream_fence();
  });
  return count;
}

}  // namespace

double group_advantage(const GroupAdvantageArgs& a) { return a.advantages.dtype == Dtype::f64 ? advantage_all<double>(a) : advantage_all<float>(a); }

}  // namespace RLKERN_ISA
}  // namespace rlkern
