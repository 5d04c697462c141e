// SPDX-License-Identifier: Apache-2.0
// Masked reductions and whitening, forward.
#include "whiten.h"

#include "../kernels.h"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

// ---- reductions ------------------------------------------------------------------------------------------------------
template <class A, class Lanes>
void reduce_all(const ReduceArgs& a) {
  auto finish = [&](int64_t r, const Moments& m) {
    put_moments(a.moments, r, m);
    put_value(a.result, r, kIsSum<Lanes> ? reduced(a.kind, m.count, m.mean, 0, false) : reduced(a.kind, m.count, 0, m.m2, a.unbiased));
  };
  if (!a.by_row) return finish(0, all_statistics<A, Lanes>(a.values, a.mask, Chunks(one_row_if_gapless(a.rows, a.values, a.mask)), a.place));
  parallel_rows(a.rows.count, a.rows.total(), a.place, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) finish(r, row_statistics<A, Lanes>(a.values, a.mask, a.rows, r));
  });
}
template <class A>
void reduce_as(const ReduceArgs& a) {
  a.kind == Reduce::sum || a.kind == Reduce::mean ? reduce_all<A, SumLanes<A>>(a) : reduce_all<A, MomentLanes<A>>(a);
}

// ---- whitening -------------------------------------------------------------------------------------------------------
template <class A>
void apply_piece(const WhitenArgs& a, const Rows& rows, int64_t r, int64_t begin, int64_t end, bool stream, const uint16_t* kept, const Moments& m) {
  constexpr int W = kLanes<A>;
  const WhitenScale<Vec<A>, A> scale(m, a.options);
  const Column<A> values(a.values, rows, r);
  const MaskRow mask(a.mask, rows, r);
  const OutColumn<A> out(a.out, rows, r, stream);
  const bool direct = values.direct() && out.direct();
  if (!a.options.mask_output) {
    for_lanes<A, false>(end - begin, direct, [&](auto way, int64_t i, int64_t n) RLKERN_INLINE { out(way, begin + i, n, scale(values(way, begin + i, n))); });
  } else {
    for_lanes<A, false>(end - begin, direct && (kept || mask.direct()), [&](auto way, int64_t i, int64_t n) RLKERN_INLINE {
      const uint32_t lanes = kept ? kept[(begin + i) / W] : mask.template lanes<W>(way, begin + i, n);
      out(way, begin + i, n, blend(lanes, scale(values(way, begin + i, n)), Vec<A>{}));
    });
  }
}

template <class A>
double whiten_all(const WhitenArgs& a) {
  const Rows rows = one_row_if_gapless(a.rows, a.values, a.mask, a.out);
  const Chunks chunks(rows);
  const bool keep = a.options.mask_output && !a.given, stream = worth_streaming(rows.total(), 20);
  Scratch<uint16_t> lanes(keep ? KeptLanes::count(rows, kLanes<A>) : 0);
  const KeptLanes kept(rows, kLanes<A>, lanes.data);
  const Moments all = a.given ? get_moments(a.moments, 0) : all_statistics<A, MomentLanes<A>>(a.values, a.mask, chunks, a.place, keep ? &kept : nullptr);
  if (!a.given) put_moments(a.moments, 0, all);
  if (all.count == 0 || (a.options.unbiased && all.count == 1)) return all.count;  // the caller refuses
  chunks.each(a.place, [&](int64_t c) {
    chunks.pieces(c, [&](int64_t r, int64_t begin, int64_t end) { apply_piece<A>(a, rows, r, begin, end, stream, keep ? kept.row(r) : nullptr, all); });
    if (stream) stream_fence();
  });
  return all.count;
}

template <class A>
void whiten_rows(const WhitenArgs& a) {
  const bool stream = worth_streaming(a.rows.total(), 20);
  parallel_rows(a.rows.count, a.rows.total(), a.place, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Moments m = a.given ? get_moments(a.moments, r) : row_statistics<A, MomentLanes<A>>(a.values, a.mask, a.rows, r);
      if (!a.given) put_moments(a.moments, r, m);
      apply_piece<A>(a, a.rows, r, 0, a.rows.len(r), stream, nullptr, a.at_least_one ? over_at_least_one(m) : m);
    }
    if (stream) stream_fence();
  });
}

template <class A>
double whiten_as(const WhitenArgs& a) {
  return a.by_row ? (whiten_rows<A>(a), 0) : whiten_all<A>(a);
}

}  // namespace

// Returns the count where there is one for all rows.
double masked_reduce(const ReduceArgs& a) {
  ReduceArgs with = a;
  double kept[3];
  if (!a.moments && !a.by_row) with.moments = Operand{kept, Dtype::f64, 1, 3, 0, 1};
  a.values.dtype == Dtype::f64 ? reduce_as<double>(with) : reduce_as<float>(with);
  return a.by_row ? 0 : get_moments(with.moments, 0).count;
}
double whiten_fwd(const WhitenArgs& a) { return a.values.dtype == Dtype::f64 ? whiten_as<double>(a) : whiten_as<float>(a); }

}  // namespace RLKERN_ISA
}  // namespace rlkern
