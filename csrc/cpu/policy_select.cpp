// SPDX-License-Identifier: Apache-2.0
// Which tokens clip-cov and kl-cov treat apart: by the covariance of advantage and log-prob, in float64 whatever the inputs
// are, since a choice has no error budget. One sweep for the means, one for the choice; both on one thread.
#include <cstring>

#include "../kernels.h"
#include "loss.h"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

// The k largest keys, the first of equal ones: a heap whose root is the one to leave next.
struct Largest {
  Scratch<double> keys;
  Scratch<int64_t> tokens;
  int64_t size = 0, most;
  explicit Largest(int64_t k) : keys(k), tokens(k), most(k) {}
  bool takes(double key) const { return size < most || key > keys.data[0]; }  // a later token loses a tie
  void add(double key, int64_t token) {
    int64_t i = size < most ? size++ : 0;
    if (i == 0) return sink(key, token);
    for (; i > 0 && before(key, token, (i - 1) / 2); i = (i - 1) / 2) move((i - 1) / 2, i);
    keys.data[i] = key, tokens.data[i] = token;
  }

 private:
  bool before(double key, int64_t token, int64_t i) const { return key < keys.data[i] || (key == keys.data[i] && token > tokens.data[i]); }
  void move(int64_t from, int64_t to) { keys.data[to] = keys.data[from], tokens.data[to] = tokens.data[from]; }
  void sink(double key, int64_t token) {
    int64_t i = 0;
    for (int64_t child = 1; child < size; child = 2 * i + 1) {
      if (child + 1 < size && before(keys.data[child + 1], tokens.data[child + 1], child)) ++child;
      if (before(key, token, child)) break;
      move(child, i), i = child;
    }
    keys.data[i] = key, tokens.data[i] = token;
  }
};

// Bits as bytes of 0 and 1.
inline void store_bits(uint8_t* p, uint32_t bits, int64_t n) {
  for (int64_t i = 0; i < n; i += 8, bits >>= 8) {
    const uint64_t spread = ((bits & 255u) * 0x0101010101010101u) & 0x8040201008040201u,
                   ones = ((spread + 0x7f7f7f7f7f7f7f7fu) | spread) >> 7 & 0x0101010101010101u;
    std::memcpy(p + i, &ones, static_cast<size_t>(n - i < 8 ? n - i : 8));
  }
}

template <class A>
struct Selection {
  using V = Vec<A>;
  static constexpr int W = kLanes<A>, WD = kLanes<double>;
  const PolicySelectArgs& a;
  double advantage = 0, log_prob = 0, tokens = 0;  // means
  explicit Selection(const PolicySelectArgs& args) : a(args) {
    Sum<A> advantages, log_probs;
    int64_t n = 0;
    for (int64_t r = 0; r < a.rows.count; ++r)
      each(r, [&](int64_t, int64_t, uint32_t m, V x, V y, V) RLKERN_INLINE { advantages.add(x), log_probs.add(y), n += __builtin_popcount(m); });
    tokens = static_cast<double>(n), advantage = advantages.total() / tokens, log_prob = log_probs.total() / tokens;
  }
  // f(i, n, valid lanes, advantage, log-prob, old log-prob) for a row's vectors with a valid token
  template <class F>
  RLKERN_INLINE void each(int64_t r, F&& f) const {
    const Column<A> adv(a.advantages, a.rows, r), lp(a.log_prob, a.rows, r), old(a.old_log_prob, a.rows, r);
    const MaskRow mask(a.mask, a.rows, r);
    for_vectors<A, false>(a.rows.len(r), [&](int64_t i, int64_t n) RLKERN_INLINE {
      const uint32_t m = mask.lanes<W>(i, n);
      if (m) f(i, n, m, adv.valid(i, n, m), lp.valid(i, n, m), old.valid(i, n, m));
    });
  }
  RLKERN_INLINE Doubles covariance(V x, V y) const {
    const Doubles u = widen(x), v = widen(y);
    const VD mean = splat(advantage), other = splat(log_prob);
    return {(u.a - mean) * (v.a - other), (u.b - mean) * (v.b - other)};
  }
  template <class F>
  RLKERN_INLINE uint32_t where(Doubles c, F&& test) const {
    const uint32_t low = lanes_of(test(c.a));
    return sizeof(A) == 4 ? low | lanes_of(test(c.b)) << WD : low;
  }
};

template <class A>
int64_t choose_between(const PolicySelectArgs& a, const Selection<A>& s, uint8_t* out) {
  using V = Vec<A>;
  const VD above = splat(a.numbers[0]), below = splat(a.numbers[1]);
  const V low = splat(A(1 - a.numbers[2])), high = splat(A(1 + a.numbers[3])), zero{};
  int64_t found = 0;
  for (int64_t r = 0; r < a.rows.count; ++r) {
    uint8_t* row = out + a.rows.base(a.selected, r);
    std::memset(row, 0, static_cast<size_t>(a.rows.len(r)));
    s.each(r, [&](int64_t i, int64_t n, uint32_t m, V x, V y, V old) RLKERN_INLINE {
      m &= s.where(s.covariance(x, y), [&](VD c) RLKERN_INLINE { return (c > above) & (c < below); });
      if (!m) return;
      const V ratio = exp_of(y - old);
      m &= lanes_of(ratio == ratio) & ~lanes_of(((ratio > high) & (x > zero)) | ((ratio < low) & (x < zero)));  // a NaN stays in the loss
      store_bits(row + i, m, n);
      found += __builtin_popcount(m);
    });
  }
  return found;
}

template <class A>
int64_t choose_largest(const PolicySelectArgs& a, const Selection<A>& s, uint8_t* out) {
  using V = Vec<A>;
  const double share = __builtin_floor(s.tokens * a.numbers[0]);
  Largest largest(static_cast<int64_t>(s.tokens > 0 ? (share < 1 ? 1 : (share > s.tokens ? s.tokens : share)) : 0));
  for (int64_t r = 0; r < a.rows.count; ++r) {
    const int64_t base = a.rows.base(a.selected, r);
    std::memset(out + base, 0, static_cast<size_t>(a.rows.len(r)));
    s.each(r, [&](int64_t i, int64_t, uint32_t m, V x, V y, V) RLKERN_INLINE {
      const Doubles c = s.covariance(x, y);
      const VD least = splat(largest.size < largest.most ? -__builtin_inf() : largest.keys.data[0]);
      m &= s.where(c, [&](VD v) RLKERN_INLINE { return ~(v <= least); }) | (largest.size < largest.most ? m : 0);
      for (; m; m &= m - 1) {
        const int lane = __builtin_ctz(m);
        const double v = lane < Selection<A>::WD ? c.a[lane] : c.b[lane - Selection<A>::WD], key = v == v ? v : __builtin_inf();  // NaN is the largest
        if (largest.takes(key)) largest.add(key, base + i + lane);
      }
    });
  }
  for (int64_t k = 0; k < largest.size; ++k) out[largest.tokens.data[k]] = 1;
  return largest.size;
}

template <class A>
void select_all(const PolicySelectArgs& a) {
  const Selection<A> s(a);
  auto* out = static_cast<uint8_t*>(a.selected.data);
  const int64_t found = a.rows.total() == 0 ? 0 : (a.largest ? choose_largest<A>(a, s, out) : choose_between<A>(a, s, out));
  put(a.counts, 0, static_cast<double>(found)), put(a.counts, 1, s.tokens);
}

}  // namespace

double policy_select(const PolicySelectArgs& a) {
  any_double(a.old_log_prob, a.log_prob, a.advantages) ? select_all<double>(a) : select_all<float>(a);
  return 0;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
