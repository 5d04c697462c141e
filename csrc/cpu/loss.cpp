// SPDX-License-Identifier: Apache-2.0
// Policy loss: the value, the gradient already scaled by the aggregation, and the metrics from one sweep.
// Where the aggregation needs counts that only the mask has, a first sweep reads the mask alone and keeps its lanes. Rows
// and time run downwards, as in scan.cpp.
#include "loss.h"

#include "../kernels.h"
#include "../math/kl.h"
#include "chunks.h"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

// ---- policy --------------------------------------------------------------------------------------------------------
// How many of a row's terms are NaN or infinite: asked only where their sum is.
template <class A>
RLKERN_RARE int64_t policy_nonfinite(const PolicyLossArgs& a, int64_t r) {
  const Column<A> old_log_prob(a.old_log_prob, a.rows, r), log_prob(a.log_prob, a.rows, r), advantages(a.advantages, a.rows, r), weights(a.weights, a.rows, r);
  const MaskRow mask(a.mask, a.rows, r);
  const PolicyClip<A> clip(a.clip);
  int64_t found = 0;
  for (int64_t i = 0; i < a.rows.len(r); ++i) {
    if (!mask.lanes<kLanes<A>>(i, 1)) continue;
    const A w = weights ? weights(i, 1)[0] : A(1), term = w * policy_token<A>(log_prob(i, 1)[0] - old_log_prob(i, 1)[0], advantages(i, 1)[0], clip).loss;
    found += term - term == 0 ? 0 : 1;
  }
  return found;
}

// Extra: importance weights, the entropy term, and, if E is an estimator, the KL term.
template <class A, bool Extra, Kl E>
void policy_row(const PolicyLossArgs& a, int64_t r, A weight, const uint16_t* kept, bool stream, RowSums& sums) {
  using V = Vec<A>;
  constexpr int W = kLanes<A>;
  const Column<A> old_log_prob(a.old_log_prob, a.rows, r), log_prob(a.log_prob, a.rows, r), advantages(a.advantages, a.rows, r);
  const Column<A> weights(a.weights, a.rows, r), ref_log_prob(a.ref_log_prob, a.rows, r), entropy(a.entropy, a.rows, r);
  const MaskRow mask(a.mask, a.rows, r);
  const OutColumn<A> d_log_prob(a.d_log_prob, a.rows, r, stream), d_entropy(a.d_entropy, a.rows, r, stream);
  const PolicyClip<V> clip(a.clip);
  const KlRange<V> range(a.kl);
  const bool with_kl = a.kl_coef != 0;
  const V zero{}, g = splat(weight), unit = Extra ? splat(A(1)) : g, kl_coef = splat(A(a.kl_coef)), d_bonus = splat(A(-a.entropy_coeff * weight));
  V high = splat(-A(__builtin_inff())), far{};  // of the log-ratio, and of its size
  Sum<A> loss, ratio, kl, bonus;
  Count<A> clipped, lower;
  int64_t tokens = 0;
  const bool direct = old_log_prob.direct() && log_prob.direct() && advantages.direct() && weights.direct() && ref_log_prob.direct() && entropy.direct() &&
                      d_log_prob.direct() && d_entropy.direct() && (kept || mask.direct());
  for_lanes<A, true>(a.rows.len(r), direct, [&](auto way, int64_t i, int64_t n) RLKERN_INLINE {
    const uint32_t m = kept ? kept[i / W] : mask.template lanes<W>(way, i, n);
    if (m == 0) {
      d_log_prob(way, i, n, zero);
      if (Extra) d_entropy(way, i, n, zero);
      return;
    }
    const V lp = log_prob.valid(way, i, n, m), raw = lp - old_log_prob.valid(way, i, n, m);
    const V advantage = advantages.valid(way, i, n, m), size = Ops<V>::magnitude(raw);
    V x, value, d;
    if (__builtin_expect(any_beyond(size, clip.usual), 0)) {
      const auto t = policy_token(raw, advantage, clip);
      x = t.x, value = t.loss, d = t.blocked ? zero : t.slope * unit;
      clipped.add(t.above), clipped.add(t.below), lower.add(t.lower);
    } else {
      const auto t = policy_token_usual(raw, advantage, clip);
      x = raw, value = t.loss, d = t.clipped ? zero : t.loss * unit;
      clipped.add(t.clipped);
    }
    if (Extra) {
      if (weights) {
        const V w = weights.valid(way, i, n, m);
        value *= w, d *= w;
      }
      if constexpr (E != Kl::none) {
        const V ref = ref_log_prob.valid(way, i, n, m), slope = kl_grad<E>(lp, ref, range, a.kl.straight_through);
        kl.add(blend(m, kl_value<E>(lp, ref, range), zero));
        d = with_kl ? d + kl_coef * slope : d;
      }
      if (entropy) bonus.add(entropy.valid(way, i, n, m));
      d_entropy(way, i, n, blend(m, d_bonus, zero));
      d *= g;
    }
    d_log_prob(way, i, n, m == kAllLanes<A> ? d : blend(m, d, zero));
    loss.add(value), ratio.add(x);
    const V edge = m == kAllLanes<A> ? raw : blend(m, raw, high);
    high = Ops<V>::at_least(high, edge), far = Ops<V>::at_least(far, size);  // a NaN is left out
    tokens += __builtin_popcount(m);
  });
  sums.tokens = static_cast<double>(tokens), sums.loss = loss.total(), sums.neg_log_ratio = -ratio.total();
  sums.kl = kl.total(), sums.entropy = bonus.total();
  sums.clipped = clipped.total(), sums.lower = lower.total(), sums.nonfinite = 0;
  sums.high = high[0], sums.far = far[0];
  for (int k = 1; k < W; ++k) sums.high = high[k] > sums.high ? high[k] : sums.high, sums.far = far[k] > sums.far ? far[k] : sums.far;
  sums.nonfinite = sums.loss - sums.loss == 0 ? 0 : policy_nonfinite<A>(a, r);
}

template <class A, bool Extra, Kl E>
void policy_all(const PolicyLossArgs& a) {
  Scratch<RowSums> sums(a.rows.count);
  sweep_rows<A>(a, sums.data,
                [&](int64_t r, A weight, const uint16_t* kept, bool stream) { policy_row<A, Extra, E>(a, r, weight, kept, stream, sums.data[r]); });
  policy_results(a, sums.data, a.clip.clamp);
}

template <class A>
void policy_terms(const PolicyLossArgs& a) {
  if (a.ref_log_prob) return with_estimator(a.kl.estimator, [&](auto e) { policy_all<A, true, decltype(e)::value>(a); });
  a.weights || a.entropy ? policy_all<A, true, Kl::none>(a) : policy_all<A, false, Kl::none>(a);
}

// ---- backward: the gradient times the loss's cotangent ---------------------------------------------------------------
template <class A>
void scale_all(const ScaleArgs& a) {
  const Chunks chunks(one_row_if_gapless(Rows{a.x.rows, a.x.cols, nullptr}, a.x, a.out));
  const Vec<A> factor = splat(load_any<A>(a.factor.data, a.factor.dtype, 0, 1)[0]), zero{};
  const bool stream = worth_streaming(chunks.rows.total(), 8);
  chunks.each(a.place, [&](int64_t c) {
    chunks.pieces(c, [&](int64_t r, int64_t begin, int64_t end) {
      const Column<A> x(a.x, chunks.rows, r);
      const OutColumn<A> out(a.out, chunks.rows, r, stream);
      for_vectors<A, false>(end - begin, [&](int64_t i, int64_t n) RLKERN_INLINE {
        const Vec<A> v = x(begin + i, n);
        out(begin + i, n, v == zero ? v : v * factor);
      });
    });
    if (stream) stream_fence();
  });
}

}  // namespace

double policy_loss(const PolicyLossArgs& a) {
  any_double(a.old_log_prob, a.log_prob, a.advantages, a.weights, a.ref_log_prob, a.entropy) ? policy_terms<double>(a) : policy_terms<float>(a);
  return 0;
}
double scale(const ScaleArgs& a) {
  any_double(a.x, a.factor) ? scale_all<double>(a) : scale_all<float>(a);
  return 0;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
