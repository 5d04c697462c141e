// SPDX-License-Identifier: Apache-2.0
// Importance weights behind a gate.
#include "teams.cuh"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

constexpr int kWeightFields = kWFiltered + 1;

// Both log-probs and their difference, 0 where masked; OnNan::one: where the difference is NaN too.
template <class A>
struct LogRatio {
  A old_log_prob, rollout_log_prob, q;
  __device__ __forceinline__ LogRatio(A old, A rollout, bool valid, bool one) {
    q = old - rollout;
    valid = valid && !(one && q != q);
    old_log_prob = valid ? old : A(0), rollout_log_prob = valid ? rollout : A(0), q = valid ? q : A(0);
  }
};

// plan importance_weights_kernel: warps of a block have a row, or blocks of a cooperative grid where rows are long and few
//   (teams.cuh). A thread takes every so many-th piece of 16 bytes: what a token decides is written at once; where a row
//   decides about its tokens, the log-ratios stay in shared memory as far as they fit until the row's sums are folded. Bytes
//   per element: both log-probs and the mask read once (twice behind that memory), the weights written once, four numbers a
//   row. Numerics: sums in float64, folded by threads, warps, blocks in order; the binary KL in float64.
// budget importance_weights_kernel<S>: 128 registers, loads 2, stores 1
template <class S>
__global__ void __launch_bounds__(kTeamThreads, kTeamBlocks)
    importance_weights_kernel(const __grid_constant__ ImportanceArgs a, const __grid_constant__ Teams teams, const Gate<ArithmeticOf<S>> gate, double* parts) {
  using A = ArithmeticOf<S>;
  constexpr int N = Stored<S>::kPiece;
  RLKERN_SHARED(double, of_warps, kWeightFields* kTeamWarps);
  RLKERN_DYNAMIC_SHARED(A, held);  // log-ratios, then the mask's bits
  unsigned char* const held_bits = reinterpret_cast<unsigned char*>(held + teams.held * N * kTeamThreads);
  const Columns<kWeightFields> columns{of_warps};
  columns.clear();
  const Team team = team_of(teams);
  const int r = team.there(teams) ? team.row : 0;
  const int64_t base = a.rows.base(a.old_log_prob, r);
  const int64_t rollout_base = a.rows.base(a.rollout_log_prob, r), mask_base = a.rows.base(a.mask, r), out_base = a.rows.base(a.weights, r);
  const bool by_token = a.unit == GateUnit::token, late = !by_token && !a.per_row, one = a.nan == OnNan::one;
  const int lead = lead_of<S>(a.old_log_prob, base);
  const int share = team.there(teams) ? team.share(teams, pieces_of<N>(lead, team.length)) : 0;
  const A padding = A(a.padding);

  double log_ratios = 0, terms = 0;
  unsigned tokens = 0, out = 0;
  for (int j = 0; j < share; ++j) {
    const Piece p = piece_of<N>(team.first + static_cast<int64_t>(j) * team.step, lead, team.length);
    const auto x = load<S>(a.old_log_prob, base, p);
    const auto y = load<S>(a.rollout_log_prob, rollout_base, p);
    const unsigned valid = valid_bits<N>(a.mask, mask_base, p);
    A w[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool is_valid = valid >> i & 1;
      const LogRatio<A> t(x[i], y[i], is_valid, one);
      const A term = gate_term(a.gating, t.old_log_prob, t.rollout_log_prob, t.q, [](A u, A v) { return static_cast<A>(binary_kl(u, v)); });
      log_ratios += static_cast<double>(t.q), terms += is_valid ? static_cast<double>(term) : 0.0;
      w[i] = t.q;
      if (!by_token) continue;
      w[i] = exp_of(t.q);
      const bool filtered = gate.filtered(a.gating == Gating::ratio ? w[i] : term);
      out += filtered && is_valid;
      w[i] = is_valid ? gate.weight(w[i], filtered) : padding;
    }
    tokens += __popc(valid);
    if (by_token) store_as(a.weights, out_base, p, w);
    if (j >= teams.held) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) held[(j * N + i) * kTeamThreads + threadIdx.x] = w[i];
    held_bits[j * kTeamThreads + threadIdx.x] = static_cast<unsigned char>(valid);
  }
  columns.leave<Fold::sum>(kWTokens, tokens), columns.leave<Fold::sum>(kWLogRatio, log_ratios);
  columns.leave<Fold::sum>(kWStatistic, terms), columns.leave<Fold::sum>(kWFiltered, out);
  columns.merge(teams, team, parts, [](int) { return Fold::sum; });
  if (!team.there(teams)) return;

  const double count = columns.field(kWTokens, team.warp), total = columns.field(kWStatistic, team.warp);
  const A statistic = static_cast<A>(a.unit == GateUnit::mean ? total / count : total);
  const A of_row = a.gating == Gating::ratio ? exp_of(statistic) : statistic;
  const bool filtered = gate.filtered(of_row);
  if (team.leads() && team.thread() == 0) {
    double* const table = static_cast<double*>(a.table.data) + r;
    table[kWTokens * a.rows.count] = count, table[kWLogRatio * a.rows.count] = columns.field(kWLogRatio, team.warp);
    table[kWStatistic * a.rows.count] = statistic;
    table[kWFiltered * a.rows.count] = by_token ? columns.field(kWFiltered, team.warp) : filtered ? 1 : 0;
    if (a.per_row) set_element(a.weights, r, gate.weight(of_row, filtered));
  }
  if (!late) return;
  for (int j = 0; j < share; ++j) {
    const Piece p = piece_of<N>(team.first + static_cast<int64_t>(j) * team.step, lead, team.length);
    A w[N];
    unsigned valid;
    if (j < teams.held) {
#pragma unroll
      for (int i = 0; i < N; ++i) w[i] = held[(j * N + i) * kTeamThreads + threadIdx.x];
      valid = held_bits[j * kTeamThreads + threadIdx.x];
    } else {
      const auto x = load<S>(a.old_log_prob, base, p);
      const auto y = load<S>(a.rollout_log_prob, rollout_base, p);
      valid = valid_bits<N>(a.mask, mask_base, p);
#pragma unroll
      for (int i = 0; i < N; ++i) w[i] = LogRatio<A>(x[i], y[i], valid >> i & 1, one).q;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) w[i] = valid >> i & 1 ? gate.weight(exp_of(w[i]), filtered) : padding;
    store_as(a.weights, out_base, p, w);
  }
}

template <class S>
void importance_as(const ImportanceArgs& a) {
  constexpr const char* op = "importance_weights";
  constexpr int N = Stored<S>::kPiece;
  Teams teams{a.rows};
  const bool late = a.unit != GateUnit::token && !a.per_row;
  const Grid grid = team_grid(op, a.place, teams, a.old_log_prob, N, late ? N * sizeof(ArithmeticOf<S>) + 1 : 0, importance_weights_kernel<S>);
  double* const parts = room_for<double>(op, a.place, grid.cooperative ? grid.blocks * kWeightFields : 0);
  launch(op, a.place, grid, importance_weights_kernel<S>, a, teams, Gate<ArithmeticOf<S>>(a), parts);
}

}  // namespace

double importance_weights(const ImportanceArgs& a) {
  with_storage([&](auto s) { importance_as<decltype(s)>(a); }, a.old_log_prob, a.rollout_log_prob);
  return 0;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
