// SPDX-License-Identifier: Apache-2.0
// y_i = x_i + c_i y_next over the lanes of one vector, in log steps; the carry enters last, so that the chain between
// vectors is a single multiply-add.
#pragma once
#include "simd.h"

namespace rlkern {
namespace RLKERN_ISA {

// A decay of its own in every lane: mixed masks, per-token decay. Identity lanes hold (1, 0).
template <class A, bool Reverse>
inline Vec<A> affine_lanes(Vec<A> c, Vec<A> x, A carry) {
  const Vec<A> zero{}, one = splat<A>(1);
  x = fused(c, shift<A, 1, Reverse>(x, zero), x), c *= shift<A, 1, Reverse>(c, one);
  if constexpr (kLanes<A> > 2) x = fused(c, shift<A, 2, Reverse>(x, zero), x), c *= shift<A, 2, Reverse>(c, one);
  if constexpr (kLanes<A> > 4) x = fused(c, shift<A, 4, Reverse>(x, zero), x), c *= shift<A, 4, Reverse>(c, one);
  if constexpr (kLanes<A> > 8) x = fused(c, shift<A, 8, Reverse>(x, zero), x), c *= shift<A, 8, Reverse>(c, one);
  return fused(c, splat(carry), x);
}

// One decay in all lanes: its powers are computed once a row.
template <class A, bool Reverse>
struct Powers {
  Vec<A> g1, g2, g4, g8, carry;  // carry: lane i holds g^(steps from the entering carry to lane i)
  explicit Powers(A g) {
    A p[17];
    p[0] = 1;
    for (int i = 1; i <= 16; ++i) p[i] = p[i - 1] * g;
    g1 = splat(p[1]), g2 = splat(p[2]), g4 = splat(p[4]), g8 = splat(p[8]);
    for (int i = 0; i < kLanes<A>; ++i) carry[i] = p[Reverse ? kLanes<A> - i : i + 1];
  }
  Vec<A> scan(Vec<A> x, A entering) const {
    const Vec<A> zero{};
    x = fused(g1, shift<A, 1, Reverse>(x, zero), x);
    if constexpr (kLanes<A> > 2) x = fused(g2, shift<A, 2, Reverse>(x, zero), x);
    if constexpr (kLanes<A> > 4) x = fused(g4, shift<A, 4, Reverse>(x, zero), x);
    if constexpr (kLanes<A> > 8) x = fused(g8, shift<A, 8, Reverse>(x, zero), x);
    return fused(carry, splat(entering), x);
  }
};

// The lane by which a scan leaves the vector.
template <class A, bool Reverse>
inline A leaving(Vec<A> y) {
  return y[Reverse ? 0 : kLanes<A> - 1];
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
