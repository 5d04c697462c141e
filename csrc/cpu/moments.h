// SPDX-License-Identifier: Apache-2.0
// Count, mean and M2 of a stream of vectors, in float64: sums of differences to a shift, merged into the running moments now
// and then. One pass over memory, and no difference of large squares: the shift is the mean of the first vector, then of
// all that came before, so that not even an outlier among the first values makes the sum of squares much larger than M2.
#pragma once
#include "../math/whiten.h"
#include "lanes.h"

namespace rlkern {
namespace RLKERN_ISA {

// Keep one as a local: `add` is inlined, and its state then lives in registers.
template <class A>
class MomentLanes {
 public:
  RLKERN_INLINE void add(Vec<A> x, uint32_t m) {
    if (m == 0) return;
    if (count_ >= limit_) {
      if (limit_ > 0) done_ = merged(done_, sum_, square_, center_[0], count_);
      shift_ = splat(static_cast<A>(limit_ > 0 ? done_.mean : mean_of(x, m)));
      center_ = splat(static_cast<double>(shift_[0]));
      sum_ = square_ = Doubles{};
      count_ = 0, limit_ = limit_ > 0 ? kMerge : kFirst;
    }
    const Doubles v = widen(blend(m, x, shift_));  // a masked lane adds 0
    const VD a = v.a - center_;
    sum_.a += a, square_.a = fused(a, a, square_.a);
    if constexpr (sizeof(A) == 4) {
      const VD b = v.b - center_;
      sum_.b += b, square_.b = fused(b, b, square_.b);
    }
    count_ += __builtin_popcount(m);
  }
  Moments total() const { return merged(done_, sum_, square_, center_[0], count_); }

 private:
  // double rounds at every addition, float values are exact: it merges more often
  static constexpr int64_t kFirst = 256, kMerge = sizeof(A) == 8 ? 512 : 4096;
  __attribute__((noinline)) static double mean_of(Vec<A> x, uint32_t m) {
    const Doubles v = widen(blend(m, x, Vec<A>{}));
    return fold(v.a + v.b) / __builtin_popcount(m);
  }
  __attribute__((noinline)) static Moments merged(Moments done, Doubles sum, Doubles square, double shift, int64_t count) {
    if (count == 0) return done;
    Moments m;
    const double n = static_cast<double>(count), s = fold(sum.a + sum.b), d = s / n;
    m.count = n, m.mean = shift + d, m.m2 = fold(square.a + square.b) - s * d;
    if (m.m2 < 0) m.m2 = 0;  // rounding; a NaN stays
    done.merge(m);
    return done;
  }
  Moments done_;
  Doubles sum_, square_;
  Vec<A> shift_{};
  VD center_{};  // shift_ as double
  int64_t count_ = 0, limit_ = 0;
};

}  // namespace RLKERN_ISA
}  // namespace rlkern
