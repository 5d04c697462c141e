// SPDX-License-Identifier: Apache-2.0
// y_t = x_t + decay_t y_next, in either direction, and its adjoint, which is the same scan in the other direction with the
// decays one step over.
#include "scan.h"

#include "../kernels.h"
#include "lanes.h"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

template <class A>
uint32_t inside(int64_t n) {
  return static_cast<uint32_t>((uint64_t{1} << n) - 1);
}

template <class A, bool Reverse>
void affine_row(const AffineArgs& a, int64_t r, bool stream) {
  const Column<A> decay(a.decay, a.rows, r), x(a.x, a.rows, r);
  const OutColumn<A> y(a.y, a.rows, r, stream);
  const bool one_decay = !a.decay || a.decay.inner_stride == 0;
  const Powers<A, Reverse> power(a.decay ? (one_decay ? decay.value[0] : A(0)) : A(a.decay_value));
  A carry = a.initial ? row_value<A>(a.initial, r) : A(0);
  for_vectors<A, Reverse>(a.rows.len(r), [&](int64_t i, int64_t n) RLKERN_INLINE {
    Vec<A> out;
    if (one_decay && n == kLanes<A>) {
      out = power.scan(x(i, n), carry);
    } else {  // lanes past the end pass the carry through
      const Vec<A> c = one_decay ? power.g1 : decay(i, n);
      out = affine_lanes<A, Reverse>(blend(inside<A>(n), c, splat(A(1))), x(i, n), carry);
    }
    carry = leaving<A, Reverse>(out);
    y(i, n, out);
  });
}

// c_t = G_t + decay_prev c_prev against the scan; d_x = c, d_decay_t = c_t y_next. `prev` is the token before t in this walk,
// the one after it in the scan's.
template <class A, bool Reverse>
void affine_grad_row(const AffineGradArgs& a, int64_t r, bool stream) {
  constexpr int W = kLanes<A>;
  const Column<A> decay(a.decay, a.rows, r), y(a.y, a.rows, r), grad(a.grad, a.rows, r);
  const OutColumn<A> d_x(a.d_x, a.rows, r, stream);
  const bool one_decay = !a.decay || a.decay.inner_stride == 0;
  const bool per_token = a.d_decay && a.decay && (!one_decay || a.decay.cols != 1);  // or one decay, expanded
  const OutColumn<A> d_decay(per_token ? a.d_decay : Operand{}, a.rows, r, stream);
  const A only = a.decay ? (one_decay ? decay.value[0] : A(0)) : A(a.decay_value);
  const A initial = a.initial ? row_value<A>(a.initial, r) : A(0);
  const Powers<A, !Reverse> power(only);
  const int64_t length = a.rows.len(r), step = Reverse ? 1 : -1;
  const int64_t first = Reverse ? 0 : length - 1, last = length - 1 - first;
  Sum<A> inside;
  double ends = 0;
  A c = 0;
  auto decay_at = [&](int64_t t) { return one_decay ? only : decay(t, 1)[0]; };
  auto one = [&](int64_t t) RLKERN_INLINE {
    c = t == first ? grad(t, 1)[0] : Ops<A>::fused(decay_at(t - step), c, grad(t, 1)[0]);
    d_x(t, 1, splat(c));
    if (!a.d_decay) return;
    const A product = c * (t == last ? initial : y(t + step, 1)[0]);
    if (per_token) d_decay(t, 1, splat(product));
    ends += static_cast<double>(product);
  };
  for_vectors<A, !Reverse>(length, [&](int64_t i, int64_t n) RLKERN_INLINE {
    if (n < W || i < 1 || i + W >= length) {  // a neighbour is missing
      for (int64_t k = 0; k < n; ++k) one(Reverse ? i + k : i + n - 1 - k);
      return;
    }
    const Vec<A> out = one_decay ? power.scan(grad(i, n), c) : affine_lanes<A, !Reverse>(decay(i - step, n), grad(i, n), c);
    c = leaving<A, !Reverse>(out);
    d_x(i, n, out);
    if (!a.d_decay) return;
    const Vec<A> product = out * y(i + step, n);
    if (per_token) d_decay(i, n, product);
    inside.add(product);
  });
  const Rows lone{1, 1, nullptr};
  if (a.d_decay && !per_token) OutColumn<A>(a.d_decay, lone, 0, false)(r, 1, splat(A(ends + inside.total())));
  if (a.d_initial) OutColumn<A>(a.d_initial, lone, 0, false)(r * a.d_initial.row_stride, 1, splat(length > 0 ? decay_at(last) * c : A(0)));
}

template <class A>
void all(const AffineArgs& a) {
  const bool stream = worth_streaming(a.rows.total(), 12);
  parallel_rows(a.rows.count, a.rows.total(), a.place, [&](int64_t begin, int64_t end) {
    for (int64_t r = end - 1; r >= begin; --r) a.reverse ? affine_row<A, true>(a, r, stream) : affine_row<A, false>(a, r, stream);
    if (stream) stream_fence();
  });
}
template <class A>
void all_grads(const AffineGradArgs& a) {
  const bool stream = worth_streaming(a.rows.total(), 20);
  parallel_rows(a.rows.count, a.rows.total(), a.place, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) a.reverse ? affine_grad_row<A, true>(a, r, stream) : affine_grad_row<A, false>(a, r, stream);
    if (stream) stream_fence();
  });
}

}  // namespace

double affine_scan(const AffineArgs& a) {
  a.y.dtype == Dtype::f64 ? all<double>(a) : all<float>(a);
  return 0;
}
double affine_scan_bwd(const AffineGradArgs& a) {
  a.grad.dtype == Dtype::f64 ? all_grads<double>(a) : all_grads<float>(a);
  return 0;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
