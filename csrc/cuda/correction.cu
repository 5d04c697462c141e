// SPDX-License-Identifier: Apache-2.0
// Rollout correction: one column of sums a row, the weights, the mask less what is rejected.
#include "correction.cuh"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

// ---- the mask less what is rejected ---------------------------------------------------------------------------------------
// `one` where kept. Of a mask that holds other values, those as they are, read again.
template <int N, class Word>
__device__ __forceinline__ void store_kept(void* address, Word one, const Piece& p, unsigned keep, const void* own, int64_t step) {
  Word* const to = static_cast<Word*>(address);
  Word v[N];
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = keep >> i & 1 ? (own ? static_cast<const Word*>(own)[i * step] : one) : Word(0);
  if (store_whole<N* static_cast<int>(sizeof(Word))>(to, v, p)) return;
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i >= p.begin && i < p.end) to[i] = v[i];
}
template <int N>
__device__ __forceinline__ void store_mask(const CorrectionArgs& a, int64_t r, const Piece& p, unsigned keep, bool weighs) {
  const int size = bytes_of(a.mask.dtype);
  void* const to = static_cast<char*>(a.modified.data) + (a.rows.base(a.modified, r) + p.first) * size;
  const int64_t step = a.mask.inner_stride;
  const void* const own = weighs ? static_cast<const char*>(a.mask.data) + (a.rows.base(a.mask, r) + p.first * step) * size : nullptr;
  switch (a.mask.dtype) {
    case Dtype::f32: return store_kept<N, uint32_t>(to, 0x3f800000u, p, keep, own, step);
    case Dtype::f64: return store_kept<N, uint64_t>(to, uint64_t(0x3ff) << 52, p, keep, own, step);
    case Dtype::f16: return store_kept<N, uint16_t>(to, 0x3c00, p, keep, own, step);
    case Dtype::bf16: return store_kept<N, uint16_t>(to, 0x3f80, p, keep, own, step);
    case Dtype::i32: return store_kept<N, uint32_t>(to, 1, p, keep, own, step);
    case Dtype::i64: return store_kept<N, uint64_t>(to, 1, p, keep, own, step);
    default: return store_kept<N, uint8_t>(to, 1, p, keep, own, step);
  }
}

// Rare storage has the fullest form alone, which then serves what it need not.
template <class S>
constexpr bool kOften = Stored<S>::kSame && !std::is_same_v<S, double>;
template <class S>
constexpr int kAtOnce = Stored<S>::kPiece < 4 ? Stored<S>::kPiece : 4;  // tokens whose terms are in registers
// A loaded piece without those.
template <class S>
__device__ __forceinline__ void go_on(Loaded<S>& x) {
  if constexpr (Stored<S>::kPiece > kAtOnce<S>) x.raw = {x.raw.z, x.raw.w, 0, 0};
}
static_assert(kVector<__half> == 2 * kAtOnce<__half>, "a piece in two halves");

// ---- a row ----------------------------------------------------------------------------------------------------------------
// Which valid tokens of a piece the options token_k* keep.
template <class S>
__device__ __forceinline__ unsigned kept_bits(const CorrectionArgs& a, const Asked<ArithmeticOf<S>>& asked, int64_t r, const Piece& p, unsigned valid) {
  using A = ArithmeticOf<S>;
  if (!valid || !(asked.token[0] || asked.token[1] || asked.token[2])) return valid;
  const auto x = load<S>(a.old_log_prob, a.rows.base(a.old_log_prob, r), p);
  const auto y = load<S>(a.rollout_log_prob, a.rows.base(a.rollout_log_prob, r), p);
  unsigned keep = 0;
#pragma unroll
  for (int i = 0; i < Stored<S>::kPiece; ++i) {
    const Token<A> t(x[i], y[i], valid >> i & 1);
    const bool stays = asked.within(0, divergence<1>(t.terms.q, t.terms.k3)) && asked.within(1, divergence<2>(t.terms.q, t.terms.k3)) &&
                       asked.within(2, divergence<3>(t.terms.q, t.terms.k3));
    keep |= static_cast<unsigned>(stays) << i;
  }
  return keep & valid;
}

// Does every option of rows keep the row? An option a lane.
template <class A>
__device__ __forceinline__ bool row_stays_by_all(const CorrectionArgs& a, const Table& table, int warp) {
  const int o = static_cast<int>(threadIdx.x) % kWarp;
  bool stays = true;
  if (o < a.options && a.option[o].by != RejectBy::token) {
    const int of_k = kRByK + (a.option[o].k - 1) * kByK;
    stays = row_stays<A>(a.option[o], table.field(kRTokens, warp), table.field(of_k + kKSum, warp), table.field(of_k + kKMax, warp));
  }
  return __all_sync(kWholeWarp, stays);
}

// plan rollout_correction_kernel: warps of a block have a row, or blocks of a cooperative grid where rows are long and few
//   (teams.cuh). A thread takes every so many-th piece of 16 bytes and keeps the sums that this form asks for: weights of
//   tokens (Weigh), rejection (Reject), with neither the probabilities; weights and mask are written in the same sweep. Where
//   the row decides, two bytes of bits a piece stay in shared memory until its sums are folded, and the row's weights and mask
//   are written then. Bytes per element: both log-probs and the mask read once (twice behind that memory; a mask of other
//   values than 0 and 1 twice), weights and mask written once, the table's column a row. Numerics: sums in float64, of what
//   lies near 1 about 1, folded by threads, warps, blocks in order.
// budget rollout_correction_kernel<S, false, false>: 128 registers, loads 2, stores 1
// budget rollout_correction_kernel<S, true, false>: 128 registers, loads 2, stores 1
// budget rollout_correction_kernel<S, false, true>: 128 registers, loads 2, stores 1
// budget rollout_correction_kernel<double, true, true>: 208 registers, loads 2, stores 1
// budget rollout_correction_kernel<S, true, true>: 128 registers, loads 2, stores 1
template <class S, bool Weigh, bool Reject>
__global__ void __launch_bounds__(kTeamThreads, Weigh&& Reject&& std::is_same_v<S, double> ? 1 : kTeamBlocks)
    rollout_correction_kernel(const __grid_constant__ CorrectionArgs a, const __grid_constant__ Teams teams,
                              const __grid_constant__ Asked<ArithmeticOf<S>> asked, const bool late, double* parts) {
  using A = ArithmeticOf<S>;
  constexpr int N = Stored<S>::kPiece;
  constexpr bool kLate = !Weigh || Reject;
  constexpr int M = kAtOnce<S>;
  constexpr bool kWhole = Weigh && !Reject;  // else half a piece after the other: many sums are in registers
  [[maybe_unused]] constexpr int kHalves = kWhole ? N / M : 1;
  RLKERN_SHARED(double, of_warps, kCorrectionFields* kTeamWarps);
  RLKERN_DYNAMIC_SHARED(uint16_t, held);  // what is valid, then what is kept
  const Table table{of_warps};
  table.clear();
  const Team team = team_of(teams);
  const int r = team.there(teams) ? team.row : 0;
  const int64_t base = a.rows.base(a.old_log_prob, r);
  const int64_t rollout_base = a.rows.base(a.rollout_log_prob, r), mask_base = a.rows.base(a.mask, r), out_base = a.rows.base(a.weights, r);
  const int lead = lead_of<S>(a.old_log_prob, base);
  const int share = team.there(teams) ? team.share(teams, pieces_of<N>(lead, team.length)) : 0;
  const bool weigh = Weigh && a.level == WeightLevel::token, compare = !Weigh && !Reject && a.probabilities;

  OffPolicy off_policy;
  TokenWeights<A> weights;
  Probabilities<A> probabilities;
  ByK<A, 1> k1;
  ByK<A, 2> k2;
  ByK<A, 3> k3;
  unsigned kept = 0, numbers = 0;
  bool weighs = false;  // this thread's mask holds other values than 0 and 1
  for (int j = 0; j < share; ++j) {
    const Piece p = piece_of<N>(team.first + static_cast<int64_t>(j) * team.step, lead, team.length);
    auto x = load<S>(a.old_log_prob, base, p);
    auto y = load<S>(a.rollout_log_prob, rollout_base, p);
    const Bits bits = mask_bits<N>(a.mask, mask_base, p);
    unsigned keep = bits.valid;
    A w[kWhole ? N : M] = {};
#pragma unroll kHalves
    for (int h = 0; h < N; h += M) {
      const unsigned valid = bits.valid >> h;
      if (bits.valid) {
        RatioTerms<A> terms[M];
#pragma unroll
        for (int i = 0; i < M; ++i) {
          const bool is_valid = valid >> i & 1;
          const Token<A> t(x[i], y[i], is_valid);
          off_policy.add(t), terms[i] = t.terms;
          if constexpr (Reject) numbers += is_valid && t.terms.q == t.terms.q;
          if (compare) probabilities.add(t, is_valid);
          if (weigh) w[kWhole ? h + i : i] = weights.add(t.terms.e, is_valid, asked.least, asked.most, a.icepop);
        }
        if constexpr (Reject) k1.add(terms, valid, h, keep, asked), k2.add(terms, valid, h, keep, asked), k3.add(terms, valid, h, keep, asked);
      }
      go_on<S>(x), go_on<S>(y);
      if (!kWhole && weigh) store_as(a.weights, out_base, p, w, h);
    }
    off_policy.tokens += __popc(bits.valid), kept += __popc(keep), weighs |= bits.weighs;
    if (kWhole && weigh) store_as(a.weights, out_base, p, w);
    if constexpr (Reject)
      if (!late && a.modified) store_mask<N>(a, r, p, keep, bits.weighs);
    if (kLate && j < teams.held) held[j * kTeamThreads + threadIdx.x] = static_cast<uint16_t>(bits.valid | keep << 8);
  }
  off_policy.leave(table), table.template leave<Fold::sum>(kRKept, kept);
  if (weigh) weights.leave(table);
  if (compare) probabilities.leave(table);
  if constexpr (Reject) k1.leave(table, numbers, asked), k2.leave(table, numbers, asked), k3.leave(table, numbers, asked);
  table.merge(teams, team, parts, fold_of);

  const bool stays = !Reject || row_stays_by_all<A>(a, table, team.warp), sequence = (!Weigh || !kOften<S>) && a.level == WeightLevel::sequence;
  if (!team.there(teams)) return;
  const A q = A(table.field(kROld, team.warp) - table.field(kRRollout, team.warp)), ratio = exp_of(clamped(q, A(-kSafety), A(kSafety)));
  if (team.leads()) {
    double* const column = static_cast<double*>(a.table.data) + r;
    const int fields = (Weigh || Reject) && a.probabilities ? kRProbability : kCorrectionFields;  // those are another launch's
    for (int f = team.thread(); f < fields; f += teams.warps * kWarp) {
      const double found = f == kRKept && !stays ? 0 : f == kRRatio && sequence ? static_cast<double>(ratio) : table.field(f, team.warp);
      column[f * a.rows.count] = found;
    }
  }
  if (!kLate || !late) return;
  const A of_row = correction_weight(ratio, asked.least, asked.most, a.icepop);
  for (int j = 0; j < share; ++j) {
    const Piece p = piece_of<N>(team.first + static_cast<int64_t>(j) * team.step, lead, team.length);
    unsigned bits = 0;
    if (j < teams.held) {
      bits = held[j * kTeamThreads + threadIdx.x];
    } else {
      bits = valid_bits<N>(a.mask, mask_base, p);
      bits |= (Reject && stays ? kept_bits<S>(a, asked, r, p, bits) : 0) << 8;
    }
    if (sequence) {
      A w[N];
#pragma unroll
      for (int i = 0; i < N; ++i) w[i] = bits >> i & 1 ? of_row : A(0);
      store_as(a.weights, out_base, p, w);
    }
    if constexpr (Reject)
      if (a.modified) store_mask<N>(a, r, p, stays ? bits >> 8 : 0, weighs);
  }
}

template <class S, bool Weigh, bool Reject>
void correction_form(const CorrectionArgs& a) {
  using A = ArithmeticOf<S>;
  constexpr const char* op = "rollout_correction";
  Asked<A> asked;
  asked.least = A(a.low), asked.most = A(a.high);
  bool late = a.level == WeightLevel::sequence;
  for (int o = 0; o < a.options; ++o) {
    const Rejection& option = a.option[o];
    const int k = option.k - 1;
    asked.any[k] = true;
    if (option.by == RejectBy::token) asked.token[k] = true, asked.low[k] = A(option.low), asked.high[k] = A(option.high);
    else late = true;
  }
  Teams teams{a.rows};
  const Grid grid = team_grid(op, a.place, teams, a.old_log_prob, Stored<S>::kPiece, late ? sizeof(uint16_t) : 0, rollout_correction_kernel<S, Weigh, Reject>);
  double* const parts = room_for<double>(op, a.place, grid.cooperative ? grid.blocks * kCorrectionFields : 0);
  launch(op, a.place, grid, rollout_correction_kernel<S, Weigh, Reject>, a, teams, asked, late, parts);
}

template <class S>
void correction_as(const CorrectionArgs& a) {
  const bool weigh = a.level == WeightLevel::token, reject = a.options > 0;
  if (!weigh && !reject) return correction_form<S, false, false>(a);
  if (a.probabilities) {
    CorrectionArgs only = a;
    only.level = WeightLevel::none, only.options = 0, only.modified = Operand{};
    correction_form<S, false, false>(only);
  }
  if constexpr (kOften<S>) {
    if (!reject) return correction_form<S, true, false>(a);
    if (!weigh) return correction_form<S, false, true>(a);
  }
  correction_form<S, true, true>(a);
}

}  // namespace

// The count of valid tokens, emulated.
double rollout_correction(const CorrectionArgs& a) {
  with_storage([&](auto s) { correction_as<decltype(s)>(a); }, a.old_log_prob, a.rollout_log_prob);
  double tokens = 0;
  for (int64_t r = 0; kEmulated && r < a.rows.count; ++r) tokens += static_cast<const double*>(a.table.data)[kRTokens * a.rows.count + r];
  return tokens;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
