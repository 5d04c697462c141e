// SPDX-License-Identifier: Apache-2.0
// The variants of the policy loss whose ratio or weight is the row's: a row is looked at twice.
#include "variants.cuh"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

constexpr int kRowBlocks = kEmulated ? 1 : 2;  // of a multiprocessor, of narrow arithmetic; one of float64
// Bytes of a block's shared memory that hold no tokens. The emulated chip has few, and counts none of these.
constexpr int64_t kRowRoom = kEmulated ? 0 : 4 << 10;
constexpr int64_t kLeastSteps = kEmulated ? 1 : 4;  // of a block that shares a row: what a barrier is worth

// A thread's pieces of a section are every 256th. Both log-probs and the mask's bits of the first ones stay in shared memory.
template <class S>
struct HeldRow {
  static constexpr int N = Stored<S>::kPiece;
  const int slots;
  Loaded<S>* const held;
  __device__ __forceinline__ int64_t size() const { return int64_t{slots} * kLossThreads; }
  __device__ __forceinline__ uint8_t* bits() const { return reinterpret_cast<uint8_t*>(held + 2 * size()); }
  __device__ __forceinline__ void keep(int64_t j, const VariantPiece<S>& x, unsigned valid) const {
    if (j >= slots) return;
    const int64_t at = j * kLossThreads + threadIdx.x;
    held[at] = x.log_prob, held[size() + at] = x.old_log_prob, bits()[at] = static_cast<uint8_t>(valid);
  }
  // Valid bits; the log-probs are read if there is one.
  __device__ __forceinline__ unsigned look(int64_t j, const VariantReader<S>& reader, const Piece& p, VariantPiece<S>& x) const {
    if (j < slots) {
      const int64_t at = j * kLossThreads + threadIdx.x;
      x.log_prob = held[at], x.old_log_prob = held[size() + at];
      return bits()[at];
    }
    return read(reader, p, x);
  }
  __device__ __forceinline__ static unsigned read(const VariantReader<S>& reader, const Piece& p, VariantPiece<S>& x) {
    const unsigned valid = valid_bits<N>(reader.a.mask, reader.rows.base(reader.a.mask, reader.row), p);
    if (valid) reader.log_probs(x, p);
    return valid;
  }
};

// f(section) for those of this block: all its threads call together. A row is one section or, where each block has but one,
// cut.sections of them. `first`: rows are cut at its addresses.
template <class S, class F>
__device__ __forceinline__ void each_row(const Cut& cut, const Operand& first, F&& f) {
  constexpr int N = Stored<S>::kPiece;
  for (int64_t i = blockIdx.x; i < cut.rows.count * cut.sections; i += gridDim.x) {
    Section s;
    s.row = i / cut.sections, s.length = cut.rows.len(s.row);
    s.lead = lead_of<S>(first, cut.rows.base(first, s.row));
    const int64_t pieces = pieces_of<N>(s.lead, s.length), steps = (pieces + kLossThreads - 1) / kLossThreads;
    const int64_t share = (steps + cut.sections - 1) / cut.sections * kLossThreads;
    s.begin = (i - s.row * cut.sections) * share, s.end = s.begin + share < pieces ? s.begin + share : pieces;
    f(s);
  }
}
// Of all threads that share a row: the fold of theirs. `parts`: a block each.
template <class T, class Op>
__device__ __forceinline__ T row_fold(const Cut& cut, const Section& s, const T& mine, T* parts, Op op) {
  const T of_block = block_fold<kLossThreads>(mine, op);
  if (cut.sections == 1) return of_block;
  if (threadIdx.x == 0) parts[blockIdx.x] = of_block;
  grid_barrier();
  return fold_parts<kLossThreads>(parts + s.row * cut.sections, static_cast<int>(cut.sections), T{}, op);
}

// All of the mask; the grid is cooperative. `mine`: what this thread has seen.
template <class S>
__device__ __forceinline__ MaskCount count_rows(const PolicyVariantArgs& a, const Cut& cut, MaskCount& mine) {
  constexpr int N = Stored<S>::kPiece;
  each_row<S>(cut, a.log_prob, [&](const Section& s) {
    int64_t tokens = 0;
    for (int64_t k = s.begin + threadIdx.x; k < s.end; k += kLossThreads)
      tokens += __popc(valid_bits<N>(a.mask, cut.rows.base(a.mask, s.row), piece_of<N>(k, s.lead, s.length)));
    tokens = block_fold<kLossThreads>(tokens, add_tokens);
    if (threadIdx.x == 0) note(cut, s.row, tokens, mine);
  });
  if (threadIdx.x == 0) cut.counts[blockIdx.x] = mine;
  grid_barrier();
  return fold_parts<kLossThreads>(cut.counts, static_cast<int>(gridDim.x), MaskCount{}, [](const MaskCount& x, const MaskCount& y) { return plus(x, y); });
}

__device__ __forceinline__ VariantSums plus(VariantSums x, const VariantSums& y) {
  x.tokens += y.tokens, x.x += y.x, x.parts += y.parts, x.advantages += y.advantages, x.logs += y.logs;
  return x;
}
// What this thread's pieces add up to.
template <class S>
__device__ __forceinline__ VariantSums first_look(const PolicyVariantArgs& a, const VariantFrame<ArithmeticOf<S>>& frame, const Section& s,
                                                  const VariantReader<S>& reader, const HeldRow<S>& held) {
  using A = ArithmeticOf<S>;
  constexpr int N = Stored<S>::kPiece;
  const bool vespo = a.kind == PolicyKind::vespo, geo_mean = a.kind == PolicyKind::geo_mean, weighs = frame.weighted && a.weights.inner_stride;
  VariantSums sums;
  if (vespo && frame.weighted && !weighs && s.begin == 0 && threadIdx.x == 0 && s.length > 0)  // once
    sums.logs += vespo_log(row_value<double>(a.weights, s.row));
  for (int64_t j = 0, k = s.begin + threadIdx.x; k < s.end; ++j, k += kLossThreads) {
    const Piece p = piece_of<N>(k, s.lead, s.length);
    VariantPiece<S> x;
    const unsigned valid = HeldRow<S>::read(reader, p, x);
    held.keep(j, x, valid);
    if (geo_mean && valid) x.advantage = reader.advantages.piece(k, p);
    if ((geo_mean && valid) || (vespo && weighs)) x.weight = reader.weights.piece(k, p);
    sums.tokens += __popc(valid);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (vespo && weighs && i >= p.begin && i < p.end) sums.logs += static_cast<double>(vespo_log(x.weight[i]));  // masked tokens too
      if (!(valid >> i & 1)) continue;
      const A raw = x.log_prob[i] - x.old_log_prob[i];
      sums.x += static_cast<double>(vespo ? vespo_part(raw) : raw);
      if (!geo_mean) continue;
      const A advantage = reader.advantages.value(x.advantage, i);
      sums.advantages += static_cast<double>(advantage), sums.parts += static_cast<double>(geo_mean_part(raw, advantage, frame.numbers));
      if (frame.weighted) sums.logs += static_cast<double>(geo_mean_log(reader.weights.value(x.weight, i)));
    }
  }
  return sums;
}

struct RowParts {
  PolicyTotals* totals;
  VariantSums* sums;
  double* through;
};

// plan policy_variant_rows_kernel: a block owns a row at a time, a thread every 256th piece of 16 bytes; where rows are fewer
//   than blocks that run at once, a row is shared by several, which meet at a barrier of the grid. First look: log_prob,
//   old_log_prob and mask, kept in shared memory as far as it holds them, and the row's sums; then everything else, the loss and
//   the gradients. Where the gradient goes through the row, what all its tokens send there is folded, and d_log_prob is a sweep
//   of its own. The mask is counted beforehand where a gradient needs that. Bytes per element: each operand and the mask read
//   once as far as shared memory and caches hold them, each gradient written once; vespo and geo-mean read weights (and
//   advantages) in both looks. Numerics: tokens and rows by csrc/math/variants.h; sums in float64, in one order.
// budget policy_variant_rows_kernel<double>: 232 registers, loads 6, stores 2
// budget policy_variant_rows_kernel<Mixed_double>: 208 registers, loads 0, stores 0
// budget policy_variant_rows_kernel<__nv_bfloat16>: 216 registers, loads 6, stores 2
// budget policy_variant_rows_kernel<S>: 128 registers, loads 6, stores 2
template <class S>
__global__ void __launch_bounds__(kLossThreads, kPolicyBlocks<S>)
    policy_variant_rows_kernel(const PolicyVariantArgs a, const Cut cut, const VariantFrame<ArithmeticOf<S>> frame, const int slots, const RowParts parts) {
  using A = ArithmeticOf<S>;
  constexpr int N = Stored<S>::kPiece;
  RLKERN_DYNAMIC_SHARED(Loaded<S>, memory);
  const HeldRow<S> held{slots, memory};
  MaskCount counts, seen;
  if (cut.first) counts = count_rows<S>(a, cut, seen);
  const AggWeights agg(with_counts(a.agg), static_cast<double>(counts.tokens), static_cast<double>(counts.sequences));
  const bool shares = frame.of_row && a.row_grad && (through_ratio(a.kind) || a.by_ratio) && a.d_log_prob;
  PolicySums<A> sums;
  each_row<S>(cut, a.log_prob, [&](const Section& s) {
    const VariantReader<S> reader(a, cut.rows, s);
    const GradColumn<S> d_log_prob(a.d_log_prob, cut.rows, s), d_entropy(a.d_entropy, cut.rows, s);
    const VariantSums of_tokens = row_fold(cut, s, first_look(a, frame, s, reader, held), parts.sums, [](const auto& x, const auto& y) { return plus(x, y); });
    if (threadIdx.x == 0 && s.begin == 0 && !cut.first)
      seen.tokens += static_cast<unsigned long long>(of_tokens.tokens), seen.sequences += of_tokens.tokens > 0 ? 1 : 0;
    const VariantOfRow<A> of_row(variant_row(a, of_tokens));
    const double weight = agg.row(of_tokens.tokens);
    const A g = A(agg.scale * weight);
    double sent = 0;  // through the row
    A shared = -constant<A>(0);  // which adds nothing
#pragma unroll 1
    for (int pass = 0; pass <= (shares ? 1 : 0); ++pass) {
      const bool token = pass == 0 || !through_ratio(a.kind) || frame.with_kl;  // has a derivative of its own
      if (pass) {
        const double all = row_fold(cut, s, sent, parts.through, [](double x, double y) { return x + y; });
        shared = A(all * static_cast<double>(g) / (a.level == Level::sequence && of_tokens.tokens > 0 ? of_tokens.tokens : 1));
      }
      for (int64_t k = s.begin + threadIdx.x; k < s.end; k += kLossThreads) {
        const Piece p = piece_of<N>(k, s.lead, s.length);
        VariantPiece<S> x;
        const unsigned valid = held.look((k - s.begin) / kLossThreads, reader, p, x);
        A own[N] = {};
        if (valid && token) {
          reader.others(x, k, p);
          variant_tokens<S>(frame, of_row, reader, x, valid, weight, shares, pass == 0, own, sent, sums);
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
          own[i] = valid >> i & 1 ? own[i] * g + shared : A(0);
        }
        if (a.d_log_prob && (pass || !shares)) d_log_prob.put(p, own);
        if (a.d_entropy && pass == 0) put_number(d_entropy, p, valid, A(-a.entropy_coeff * static_cast<double>(g)));
      }
    }
  });
  finish_loss(cut, sums.totals(seen), parts.totals, [&](const PolicyTotals& t) {
    const AggWeights all(with_counts(a.agg), t.tokens, t.sequences);
    put_policy(a, t, all.scale, a.level == Level::token ? a.clip.clamp : __builtin_inf(), PutNumber{});
  });
}

template <class S>
void rows_as(const PolicyVariantArgs& a) {
  const char* const op = "policy_loss";
  const OnDevice device(a.place.device, op);
  constexpr int64_t kBlocks = sizeof(ArithmeticOf<S>) == 8 ? 1 : kRowBlocks;
  constexpr int64_t kSlot = (2 * sizeof(Loaded<S>) + 1) * kLossThreads;
  const bool grads = a.d_log_prob || a.d_entropy;
  Cut cut;
  cut.rows = a.rows;
  cut.first = grads && a.agg.mode != Agg::token_sum && (a.agg.mode == Agg::token_mean ? a.agg.local_tokens : a.agg.local_sequences);
  const int64_t longest = a.rows.cu ? a.log_prob.cols : a.rows.length, bytes = size_of(a.log_prob.dtype);
  const bool even = !a.rows.cu && reinterpret_cast<uintptr_t>(a.log_prob.data) % kWide == 0 && a.log_prob.row_stride * bytes % kWide == 0;
  const int64_t pieces = (longest + Stored<S>::kPiece - 1) / Stored<S>::kPiece + (even ? 0 : 1), steps = (pieces + kLossThreads - 1) / kLossThreads;
  const int64_t full = kBlocks * device_number(cudaDevAttrMultiProcessorCount, a.place, op);
  const int64_t each = a.rows.count ? full / a.rows.count : 1, most = steps / kLeastSteps;
  cut.sections = each < 1 || most < 1 ? 1 : each < most ? each : most;
  const int64_t room = device_number(cudaDevAttrMaxSharedMemoryPerMultiprocessor, a.place, op) / kBlocks - kRowRoom;
  const int64_t share = (steps + cut.sections - 1) / cut.sections, fit = room / kSlot;
  const int slots = static_cast<int>(share < fit ? share : fit);
  Grid grid{a.rows.count * cut.sections, kLossThreads, static_cast<size_t>(slots * kSlot), cut.first || cut.sections > 1};
  const int64_t together = resident_blocks(op, a.place, policy_variant_rows_kernel<S>, kLossThreads, grid.shared);
  if (cut.sections > 1 && grid.blocks > together)
    cut.sections = together / a.rows.count > 1 ? together / a.rows.count : 1, grid.blocks = a.rows.count * cut.sections;
  grid.blocks = grid.blocks < 1 ? 1 : grid.blocks < together ? grid.blocks : together;
  PolicyTotals* const room_of = room_for<PolicyTotals>(op, a.place, 4 * grid.blocks);
  static_assert(sizeof(VariantSums) <= sizeof(PolicyTotals) && sizeof(MaskCount) <= sizeof(PolicyTotals), "a quarter of the room each");
  cut.counter = counters(a.place), cut.of_row = reinterpret_cast<unsigned long long*>(counters(a.place) + kWide / sizeof(unsigned));
  cut.counts = reinterpret_cast<MaskCount*>(room_of + grid.blocks);
  const RowParts parts{room_of, reinterpret_cast<VariantSums*>(room_of + 2 * grid.blocks), reinterpret_cast<double*>(room_of + 3 * grid.blocks)};
  launch(op, a.place, grid, policy_variant_rows_kernel<S>, a, cut, VariantFrame<ArithmeticOf<S>>(a), slots, parts);
}

}  // namespace

void policy_variant_rows(const PolicyVariantArgs& a) {
  with_variant_storage([&](auto s) { rows_as<decltype(s)>(a); }, a);
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
