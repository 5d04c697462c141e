// SPDX-License-Identifier: Apache-2.0
// The optimal token baseline, group by group: a sweep over each row makes its rewards to go G and path variances W and adds both
// to the group's columns; a second one takes the columns' means off. By token, a row is its valid tokens side by side.
#include "../kernels.h"
#include "group.h"
#include "mask.h"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

template <class A, bool Reverse>
Vec<A> running_sum(Vec<A> x) {
  const Vec<A> zero{};
  x += shift<A, 1, Reverse>(x, zero);
  if constexpr (kLanes<A> > 2) x += shift<A, 2, Reverse>(x, zero);
  if constexpr (kLanes<A> > 4) x += shift<A, 4, Reverse>(x, zero);
  if constexpr (kLanes<A> > 8) x += shift<A, 8, Reverse>(x, zero);
  return x;
}
// The same over vectors: what came before is a double, and so is every sum of vectors.
template <class A, bool Reverse>
struct Running {
  double before = 0;
  Vec<A> operator()(Vec<A> x) {
    const Vec<A> own = running_sum<A, Reverse>(x), y = own + splat(static_cast<A>(before));
    before += static_cast<double>(own[Reverse ? 0 : kLanes<A> - 1]);
    return y;
  }
};
template <class A>
void add_to(double* column, Vec<A> x) {
  const Doubles d = widen(x);
  storeu(column, loadu(column) + d.a);
  if constexpr (sizeof(A) == 4) storeu(column + kLanes<double>, loadu(column + kLanes<double>) + d.b);
}
// The lanes of m, side by side from `to` on; up to a vector behind them is overwritten.
template <class A>
void pack(A* to, uint32_t m, Vec<A> x) {
  if (m == kAllLanes<A>) return storeu(to, x);
  A lanes[kLanes<A>];
  storeu(lanes, x);
  for (; m; m &= m - 1) *to++ = lanes[__builtin_ctz(m)];
}

// One group at a time; memory for the largest of some groups.
template <class A>
struct Sweeps {
  static constexpr int W = kLanes<A>;
  const TokenBaselineArgs& a;
  bool stream;
  int64_t width;  // of a row's buffers: a vector behind the longest row is always there
  Scratch<double> total, weight;
  Scratch<A> base, tail, rewards, variance, to_go;
  Scratch<uint16_t> lanes;
  Scratch<int64_t> lengths;

  static int64_t widest(const TokenBaselineArgs& a, int64_t begin, int64_t end) {
    int64_t most = 0;
    for (int64_t i = a.groups.offsets[begin]; i < a.groups.offsets[end]; ++i) {
      const int64_t n = a.rows.len(a.groups.order[i]);
      most = n > most ? n : most;
    }
    return (most / W + 2) * W;
  }
  static int64_t most_rows(const TokenBaselineArgs& a, int64_t begin, int64_t end) {
    int64_t most = 0;
    for (int64_t g = begin; g < end; ++g) {
      const int64_t k = a.groups.offsets[g + 1] - a.groups.offsets[g];
      most = k > most ? k : most;
    }
    return most;
  }
  Sweeps(const TokenBaselineArgs& args, int64_t begin, int64_t end, bool streaming)
      : Sweeps(args, streaming, widest(args, begin, end), most_rows(args, begin, end)) {}
  Sweeps(const TokenBaselineArgs& args, bool streaming, int64_t w, int64_t k)
      : a(args), stream(streaming), width(w), total(w), weight(w), base(w), tail(w), rewards(w), variance(w), to_go(k * w), lanes(k * (w / W)), lengths(k) {}

  // Lanes of the mask, rewards and path variances of valid tokens; f(i, n, m, reward, variance).
  template <class F>
  RLKERN_INLINE int64_t read(int64_t r, uint16_t* kept, F&& f) {
    const Column<A> reward(a.rewards, a.rows, r), old(a.old_log_prob, a.rows, r), squares(a.sum_pi_squared, a.rows, r), rho(a.weights, a.rows, r);
    const MaskRow mask(a.mask, a.rows, r);
    int64_t valid = 0;
    for_vectors<A, false>(a.rows.len(r), [&](int64_t i, int64_t n) RLKERN_INLINE {
      const uint32_t m = mask.lanes<W>(i, n);
      kept[i / W] = static_cast<uint16_t>(m), valid += __builtin_popcount(m);
      Vec<A> w{};
      if (m) {
        w = path_variance(old.valid(i, n, m), squares.valid(i, n, m));
        if (rho) {
          const Vec<A> p = rho.valid(i, n, m);
          w *= p * p;
        }
        w = blend(m, w, Vec<A>{});
      }
      f(i, m, reward.valid(i, n, m), w);
    });
    return valid;
  }
  void columns(int64_t i, uint32_t m, Vec<A> g, Vec<A> w) {
    add_to<A>(total.data + i, blend(m, g * w, Vec<A>{}));
    add_to<A>(weight.data + i, w);
  }
  // G of a row, and both into the columns.
  int64_t padded_row(int64_t r, A* g, uint16_t* kept) {
    Running<A, false> sum;
    const int64_t valid = read(r, kept, [&](int64_t i, uint32_t m, Vec<A> reward, Vec<A> w) RLKERN_INLINE {
      storeu(rewards.data + i, reward);
      storeu(variance.data + i, m ? blend(m, sum(w), Vec<A>{}) : Vec<A>{});  // padding adds nothing, and is half a batch
    });
    const OutColumn<A> returns(a.returns, a.rows, r, stream);
    Running<A, true> rest;
    for_vectors<A, true>(a.rows.len(r), [&](int64_t i, int64_t n) RLKERN_INLINE {
      const uint32_t m = kept[i / W];
      const Vec<A> y = m ? rest(loadu(rewards.data + i)) : splat(static_cast<A>(rest.before));
      storeu(g + i, y), returns(i, n, y);
      if (m) columns(i, m, y, loadu(variance.data + i));
    });
    return valid;
  }
  int64_t packed_row(int64_t r, A* g, uint16_t* kept) {
    int64_t at = 0;
    const int64_t valid = read(r, kept, [&](int64_t, uint32_t m, Vec<A> reward, Vec<A> w) RLKERN_INLINE {
      pack<A>(rewards.data + at, m, reward), pack<A>(variance.data + at, m, w);
      at += __builtin_popcount(m);
    });
    const Vec<A> zero{};
    storeu(rewards.data + valid, zero), storeu(variance.data + valid, zero);
    Running<A, false> sum;
    for_vectors<A, false>(valid, [&](int64_t i, int64_t) RLKERN_INLINE { storeu(variance.data + i, sum(loadu(variance.data + i))); });
    Running<A, true> rest;
    storeu(g + valid, zero);
    for_vectors<A, true>(valid, [&](int64_t i, int64_t n) RLKERN_INLINE {
      const uint32_t m = static_cast<uint32_t>((uint64_t{1} << n) - 1);
      const Vec<A> y = rest(loadu(rewards.data + i));
      storeu(g + i, blend(m, y, zero));
      columns(i, m, y, blend(m, loadu(variance.data + i), zero));
    });
    return valid;
  }
  void write_padded(int64_t r, const A* g, const A* b, const uint16_t* kept) {
    const OutColumn<A> advantages(a.advantages, a.rows, r, stream);
    for_vectors<A, false>(a.rows.len(r),
                          [&](int64_t i, int64_t n) RLKERN_INLINE { advantages(i, n, blend(kept[i / W], loadu(g + i) - loadu(b + i), Vec<A>{})); });
  }
  void write_packed(int64_t r, const A* g, const A* b, const uint16_t* kept) {
    const OutColumn<A> advantages(a.advantages, a.rows, r, stream), returns(a.returns, a.rows, r, stream);
    int64_t at = 0;
    for_vectors<A, false>(a.rows.len(r), [&](int64_t i, int64_t n) RLKERN_INLINE {
      const uint32_t m = kept[i / W];
      if (m == kAllLanes<A>) {
        returns(i, n, loadu(g + at)), advantages(i, n, loadu(g + at) - loadu(b + at));
      } else if (m == 0) {
        returns(i, n, splat(g[at])), advantages(i, n, Vec<A>{});
      } else {
        A y[W], x[W];
        int64_t next = at;
        for (int k = 0; k < W; ++k) {
          const bool here = m >> k & 1;
          y[k] = g[next], x[k] = here ? g[next] - b[next] : A(0);
          next += here;
        }
        returns(i, n, loadu(y)), advantages(i, n, loadu(x));
      }
      at += __builtin_popcount(m);
    });
  }
  void group(int64_t g) {
    const int64_t *rows = a.groups.order + a.groups.offsets[g], k = a.groups.offsets[g + 1] - a.groups.offsets[g], words = width / W;
    for (int64_t t = 0; t < width; ++t) total.data[t] = weight.data[t] = 0;
    TwoLongest of;
    for (int64_t i = 0; i < k; ++i) {
      A* to = to_go.data + i * width;
      uint16_t* kept = lanes.data + i * words;
      lengths.data[i] = a.by_token ? packed_row(rows[i], to, kept) : padded_row(rows[i], to, kept);
      of.add(lengths.data[i], a.by_token);
    }
    for (int64_t t = 0; t < width; ++t) base.data[t] = of.members > 1 ? static_cast<A>(total.data[t] / (weight.data[t] + a.eps)) : A(0);
    const bool cut = a.zero_tail && of.cuts(of.longest);
    for (int64_t t = 0; t < width && cut; ++t) tail.data[t] = t < of.second ? base.data[t] : A(0);
    for (int64_t i = 0; i < k; ++i) {
      const A *from = to_go.data + i * width, *b = cut && of.cuts(lengths.data[i]) ? tail.data : base.data;
      a.by_token ? write_packed(rows[i], from, b, lanes.data + i * words) : write_padded(rows[i], from, b, lanes.data + i * words);
    }
  }
};

template <class A>
void token_baseline_all(const TokenBaselineArgs& a) {
  const int64_t total = a.rows.total();
  const bool stream = worth_streaming(total, 32);
  parallel_rows(a.groups.count, total, a.place, [&](int64_t begin, int64_t end) {
    Sweeps<A> sweeps(a, begin, end, stream);
    for (int64_t g = begin; g < end; ++g) sweeps.group(g);
    if (stream) stream_fence();
  });
}
bool doubled(const Operand& x) { return x && x.dtype == Dtype::f64; }

}  // namespace

double token_baseline(const TokenBaselineArgs& a) {
  const bool wide = doubled(a.rewards) || doubled(a.mask) || doubled(a.old_log_prob) || doubled(a.sum_pi_squared) || doubled(a.weights);
  wide ? token_baseline_all<double>(a) : token_baseline_all<float>(a);
  return 0;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
