// SPDX-License-Identifier: Apache-2.0
// Importance weights behind a gate. What a token decides is written while its row is summed up; what a row decides, by a
// second walk over the row.
#include "../kernels.h"
#include "../math/correction.h"
#include "loss.h"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

template <class A>
RLKERN_RARE Vec<A> binary_kl_lanes(Vec<A> p, Vec<A> q) {
  for (int k = 0; k < kLanes<A>; ++k) p[k] = static_cast<A>(binary_kl(p[k], q[k]));
  return p;
}
template <class A>
void importance_row(const ImportanceArgs& a, int64_t r, bool stream) {
  using V = Vec<A>;
  constexpr int W = kLanes<A>;
  const Column<A> old_log_prob(a.old_log_prob, a.rows, r), rollout_log_prob(a.rollout_log_prob, a.rows, r);
  const MaskRow mask(a.mask, a.rows, r);
  const OutColumn<A> weights(a.per_row ? Operand{} : a.weights, a.rows, r, stream);
  const Gate<V> gate(a);
  const V padding = splat(A(a.padding));
  const bool by_token = a.unit == GateUnit::token, ratio = a.gating == Gating::ratio;
  const bool direct = old_log_prob.direct() && rollout_log_prob.direct() && mask.direct() && weights.direct();
  const int64_t length = a.rows.len(r);
  Sum<A> log_ratios, terms;
  int64_t tokens = 0, out = 0;
  const auto read = [&](auto way, int64_t i, int64_t n, uint32_t m, V& old, V& rollout) RLKERN_INLINE {
    old = old_log_prob.valid(way, i, n, m), rollout = rollout_log_prob.valid(way, i, n, m);
    const V q = old - rollout;
    if (a.nan != OnNan::one) return q;
    old = q == q ? old : V{}, rollout = q == q ? rollout : V{};
    return q == q ? q : V{};
  };
  for_lanes<A, false>(length, direct, [&](auto way, int64_t i, int64_t n) RLKERN_INLINE {
    const uint32_t m = mask.template lanes<W>(way, i, n);
    if (m == 0) return by_token ? weights(way, i, n, padding) : void();
    V old, rollout;
    const V q = read(way, i, n, m, old, rollout), term = gate_term(a.gating, old, rollout, q, binary_kl_lanes<A>);
    tokens += __builtin_popcount(m), log_ratios.add(q), terms.add(blend(m, term, V{}));
    if (!by_token) return;
    const V w = exp_of(q);
    const auto filtered = gate.filtered(ratio ? w : term);
    out += __builtin_popcount(lanes_of(filtered) & m);
    weights(way, i, n, blend(m, gate.weight(w, filtered), padding));
  });
  const A statistic = A(a.unit == GateUnit::mean ? terms.total() / static_cast<double>(tokens) : terms.total());
  const V of_row = ratio ? exp_of(splat(statistic)) : splat(statistic);
  const auto filtered = gate.filtered(of_row);
  double* table = static_cast<double*>(a.table.data) + r;
  table[kWTokens * a.rows.count] = static_cast<double>(tokens), table[kWLogRatio * a.rows.count] = log_ratios.total();
  table[kWStatistic * a.rows.count] = statistic;
  table[kWFiltered * a.rows.count] = by_token ? static_cast<double>(out) : filtered[0] ? 1 : 0;
  if (a.per_row) put(a.weights, r, gate.weight(of_row, filtered)[0]);
  if (by_token || a.per_row) return;
  for_lanes<A, false>(length, direct, [&](auto way, int64_t i, int64_t n) RLKERN_INLINE {
    const uint32_t m = mask.template lanes<W>(way, i, n);
    V old, rollout;
    weights(way, i, n, m ? blend(m, gate.weight(exp_of(read(way, i, n, m, old, rollout)), filtered), padding) : padding);
  });
}

template <class A>
void importance_all(const ImportanceArgs& a) {
  const bool stream = worth_streaming(a.rows.total(), 20);
  parallel_rows(a.rows.count, a.rows.total(), a.place, [&](int64_t begin, int64_t end) {
    for (int64_t r = end - 1; r >= begin; --r) importance_row<A>(a, r, stream);
    if (stream) stream_fence();
  });
}

}  // namespace

double importance_weights(const ImportanceArgs& a) {
  any_double(a.old_log_prob, a.rollout_log_prob) ? importance_all<double>(a) : importance_all<float>(a);
  return 0;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
