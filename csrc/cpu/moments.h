// SPDX-License-Identifier: Apache-2.0
// Count, mean and M2 of a stream of vectors, in float64. Shifted by the running mean and merged every few vectors: one
// pass over memory, and no difference of large squares.
#pragma once
#include "../math/whiten.h"
#include "lanes.h"

namespace rlkern {
namespace RLKERN_ISA {

template <class A>
class MomentLanes {
 public:
  void add(Vec<A> x, uint32_t m) {
    if (m == 0) return;
    if (pending_ == kFlush) flush();
    if (pending_++ == 0) shift_ = done_.count > 0 ? static_cast<A>(done_.mean) : x[__builtin_ctz(m)];
    const Vec<A> shift = splat(shift_);
    const Doubles d = widen(x), s = widen(shift);
    Doubles e{d.a - s.a, d.b - s.b};
    if (m != kAllLanes<A>) {
      e.a = blend(m & kAllLanes<double>, e.a, VD{});
      e.b = blend(m >> kLanes<double>, e.b, VD{});
    }
    sum_.a += e.a, square_.a += e.a * e.a;
    if constexpr (sizeof(A) == 4) sum_.b += e.b, square_.b += e.b * e.b;
    count_ += __builtin_popcount(m);
  }
  Moments total() {
    flush();
    return done_;
  }

 private:
  static constexpr int kFlush = 16;
  void flush() {
    if (count_ == 0) return;
    Moments m;
    const double n = static_cast<double>(count_), s = fold(sum_.a + sum_.b), q = fold(square_.a + square_.b), d = s / n;
    m.count = n, m.mean = static_cast<double>(shift_) + d, m.m2 = q - s * d;
    if (m.m2 < 0) m.m2 = 0;  // rounding; a NaN stays
    done_.merge(m);
    sum_ = square_ = Doubles{};
    count_ = 0, pending_ = 0;
  }
  Moments done_;
  Doubles sum_, square_;
  A shift_ = 0;
  int64_t count_ = 0;
  int pending_ = 0;
};

}  // namespace RLKERN_ISA
}  // namespace rlkern
