// SPDX-License-Identifier: Apache-2.0
// Masked reductions and whitening, backward: d_v = direct * G + weight * (level + slope * (v - mean)), its three numbers
// from the forward's moments and, for whitening, from two sums over G.
#include "whiten.h"

#include "../kernels.h"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

// Any may be absent: G and values (unread where their factor is 0), mask.
struct Gradient {
  Operand grad, values, mask, d_values;
  bool mask_grad;  // the op's output was masked: G counts at valid elements only
};

template <class A>
void piece(const Gradient& a, const Rows& rows, int64_t r, int64_t begin, int64_t end, const WhitenGrad& g, double mean) {
  constexpr int W = kLanes<A>;
  const Column<A> grad(a.grad, rows, r), values(a.values, rows, r), weight(a.mask, rows, r);
  const MaskRow mask(a.mask, rows, r);
  const OutColumn<A> d_values(a.d_values, rows, r, false);
  const bool weights = mask.weighs(begin, end), inner = g.level != 0 || g.slope != 0;
  const Vec<A> high = splat(A(mean)), low = splat(A(mean - double(A(mean)))), zero{};
  const Vec<A> direct = splat(A(g.direct)), level = splat(A(g.level)), slope = splat(A(g.slope));
  const bool plain = grad.direct() && values.direct() && mask.direct() && d_values.direct() && !weights;
  for_lanes<A, false>(end - begin, plain, [&](auto way, int64_t k, int64_t n) RLKERN_INLINE {
    const int64_t i = begin + k;
    const uint32_t m = inner || a.mask_grad ? mask.template lanes<W>(way, i, n) : kAllLanes<A>;
    Vec<A> d = zero;
    if (inner && m) {
      d = g.slope == 0 ? level : fused(slope, (values(way, i, n) - high) - low, level);
      if constexpr (std::is_same_v<decltype(way), Any>) d = weights ? d * weight(i, n) : d;
      d = blend(m, d, zero);
    }
    if (a.mask_grad) d = m ? blend(m, fused(direct, grad(way, i, n), d), zero) : zero;  // `direct` may be NaN
    else if (grad) d = fused(direct, grad(way, i, n), d);
    d_values(way, i, n, d);
  });
}

// ---- reductions: G is one value a row, or one in all, and comes in as `level` or `slope` -----------------------------
template <class A>
void reduce_as(const ReduceGradArgs& a) {
  const Gradient gradient{Operand{}, a.values, a.mask, a.d_values, false};
  auto factors = [&](int64_t r, Moments& m) {
    m = a.moments ? get_moments(a.moments, r) : Moments{};
    if (a.kind != Reduce::moments) return reduced_grad(a.kind, m.count, one_value(a.grad, r), a.unbiased);
    const Moments d = get_moments(a.grad, r);
    WhitenGrad g;
    g.level = m.count == 0 ? 0 : d.mean / m.count, g.slope = 2 * d.m2;
    return g;
  };
  if (a.by_row)
    return parallel_rows(a.rows.count, a.rows.total(), a.place, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        Moments m;
        const WhitenGrad g = factors(r, m);
        piece<A>(gradient, a.rows, r, 0, a.rows.len(r), g, m.mean);
      }
    });
  const Chunks chunks(one_row_if_gapless(a.rows, a.values, a.mask, a.d_values));
  Moments m;
  const WhitenGrad g = factors(0, m);
  chunks.each(a.place,
              [&](int64_t c) { chunks.pieces(c, [&](int64_t r, int64_t begin, int64_t end) { piece<A>(gradient, chunks.rows, r, begin, end, g, m.mean); }); });
}

// ---- whitening -------------------------------------------------------------------------------------------------------
struct GradSums {
  double sum = 0, product = 0;  // sum(G), sum(G (v - mean))
};
template <class A>
GradSums sums_of_piece(const WhitenGradArgs& a, const Rows& rows, int64_t r, int64_t begin, int64_t end, double mean) {
  constexpr int W = kLanes<A>;
  const Column<A> grad(a.grad, rows, r), values(a.values, rows, r);
  const MaskRow mask(a.mask, rows, r);
  const VD center = splat(mean);
  Doubles sum, product;
  const bool direct = grad.direct() && values.direct() && mask.direct();
  for_lanes<A, false>(end - begin, direct, [&](auto way, int64_t k, int64_t n) RLKERN_INLINE {
    const int64_t i = begin + k;
    const uint32_t m = a.options.mask_output ? mask.template lanes<W>(way, i, n) : kAllLanes<A>;
    if (m == 0) return;
    const Vec<A> g = grad.valid(way, i, n, m), v = values(way, i, n);
    const uint32_t used = lanes_of(g != 0);  // a NaN that G does not ask about stays where it is
    const Doubles x = widen(blend(used, v, splat(A(mean)))), y = widen(g);
    sum.a += y.a, product.a = fused(y.a, x.a - center, product.a);
    if constexpr (sizeof(A) == 4) sum.b += y.b, product.b = fused(y.b, x.b - center, product.b);
  });
  return {fold(sum.a + sum.b), fold(product.a + product.b)};
}

WhitenGrad factors_of(const WhitenGradArgs& a, int64_t r, const Moments& m, const GradSums& s) {
  WhitenGrad g = whiten_grad(m, a.options, a.at_least_one, s.sum, s.product);
  put_moments(a.d_moments, r, {0, g.d_mean, g.d_m2});
  if (a.given) g.level = g.slope = 0;
  return g;
}

template <class A>
void whiten_as(const WhitenGradArgs& a) {
  const Gradient gradient{a.grad, a.values, a.mask, a.d_values, a.options.mask_output};
  const bool sums = !a.given || a.d_moments;
  auto center = [&](const Moments& m) { return a.at_least_one ? over_at_least_one(m).mean : m.mean; };
  if (a.by_row)
    return parallel_rows(a.rows.count, a.rows.total(), a.place, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const Moments m = get_moments(a.moments, r);
        const GradSums s = sums ? sums_of_piece<A>(a, a.rows, r, 0, a.rows.len(r), center(m)) : GradSums{};
        piece<A>(gradient, a.rows, r, 0, a.rows.len(r), factors_of(a, r, m, s), center(m));
      }
    });
  const Rows rows = one_row_if_gapless(a.rows, a.grad, a.values, a.mask, a.d_values);
  const Chunks chunks(rows);
  Scratch<GradSums> part(sums ? chunks.count : 0);
  const Moments m = get_moments(a.moments, 0);
  if (sums)
    chunks.each(a.place, [&](int64_t c) {
      chunks.pieces(c, [&](int64_t r, int64_t begin, int64_t end) {
        const GradSums s = sums_of_piece<A>(a, rows, r, begin, end, center(m));
        part.data[c].sum += s.sum, part.data[c].product += s.product;
      });
    });
  GradSums s;
  for (int64_t c = 0; sums && c < chunks.count; ++c) s.sum += part.data[c].sum, s.product += part.data[c].product;
  const WhitenGrad g = factors_of(a, 0, m, s);
  if (!a.d_values) return;
  chunks.each(a.place,
              [&](int64_t c) { chunks.pieces(c, [&](int64_t r, int64_t begin, int64_t end) { piece<A>(gradient, rows, r, begin, end, g, center(m)); }); });
}

}  // namespace

double masked_reduce_bwd(const ReduceGradArgs& a) {
  a.d_values.dtype == Dtype::f64 ? reduce_as<double>(a) : reduce_as<float>(a);
  return 0;
}
double whiten_bwd(const WhitenGradArgs& a) {
  a.grad.dtype == Dtype::f64 || a.values.dtype == Dtype::f64 ? whiten_as<double>(a) : whiten_as<float>(a);
  return 0;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
