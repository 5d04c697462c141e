// SPDX-License-Identifier: Apache-2.0
// The Python module: each function takes a raw op's arguments in the order of its schema (rlkern/library.py), then its
// outputs, then the place: a thread count, or a GPU's stream. Compiled twice, as _C and, by RLKERN_CUDA, as _C_cuda.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "cpu/parallel.h"
#include "kernels.h"
#include "labels.h"
#include "operands.h"

using namespace rlkern;

namespace rlkern {
#define RLKERN_TABLE(isa)     \
  namespace isa {             \
  extern const Kernels table; \
  }
RLKERN_ISAS(RLKERN_TABLE)
}  // namespace rlkern

namespace {

bool runs(const std::string& isa) {
#if defined(RLKERN_CUDA)
  return isa == "cuda";
#elif defined(__x86_64__)
  if (isa == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return isa == "base";
}
#define RLKERN_ADDRESS(isa) &isa::table,
const Kernels* const tables[] = {RLKERN_ISAS(RLKERN_ADDRESS)};

const Kernels* widest() {
  const Kernels* best = tables[0];
  for (const Kernels* t : tables)
    if (runs(t->isa)) best = t;
  return best;
}
const Kernels* chosen = widest();

template <class Args>
double run(double (*Kernels::*kernel)(const Args&), const Args& args) {
  py::gil_scoped_release other_threads;
  return (chosen->*kernel)(args);
}

Operand either(const Operand& tokens, const Operand& per_row) { return tokens ? tokens : per_row; }

using Range = std::array<double, 4>;
using Flags = std::optional<std::array<bool, 5>>;

double gae_fwd(Tokens rewards, Tokens values, Tokens mask, PerRow bootstrap, PerRow lam_row, Tokens old_log_prob, Tokens ref_log_prob, Packed packed,
               Masked masked, double gamma, double lam, double kl_coef, const std::string& kl, const Range& kl_range, const Flags& whiten, double eps,
               Tokens advantages, Tokens returns, Place place) {
  const WhitenOptions options = whiten ? whiten_options(*whiten, eps) : WhitenOptions{};
  const KlOptions estimator = kl_options(kl, kl_range);
  return run(&Kernels::scan_fwd, ScanArgs{rows_of(rewards, packed), rewards, values, mask, bootstrap, lam_row, old_log_prob, ref_log_prob, advantages, returns,
                                          masked, gamma, lam, kl_coef, estimator, whiten.has_value(), options, place});
}
double returns_fwd(Tokens rewards, Tokens mask, PerRow bootstrap, Tokens old_log_prob, Tokens ref_log_prob, Packed packed, Masked masked, double gamma,
                   double kl_coef, const std::string& kl, const Range& kl_range, const Flags& whiten, double eps, Tokens advantages, Tokens returns,
                   Place place) {
  const WhitenOptions options = whiten ? whiten_options(*whiten, eps) : WhitenOptions{};
  const KlOptions estimator = kl_options(kl, kl_range);
  return run(&Kernels::scan_fwd, ScanArgs{rows_of(rewards, packed), rewards, Operand{}, mask, bootstrap, Operand{}, old_log_prob, ref_log_prob, advantages,
                                          returns, masked, gamma, 0, kl_coef, estimator, whiten.has_value(), options, place});
}
double gae_bwd(Tokens grad_advantages, Tokens grad_returns, Tokens mask, PerRow lam_row, Packed packed, Masked masked, double gamma, double lam,
               const std::array<bool, 3>&, Tokens d_rewards, Tokens d_values, PerRow d_bootstrap, Place place) {
  return run(&Kernels::scan_bwd, ScanGradArgs{rows_of(grad_returns, packed), mask, lam_row, grad_advantages, grad_returns, d_rewards, d_values, d_bootstrap,
                                              masked, true, gamma, lam, place});
}
double returns_bwd(Tokens grad_returns, Tokens mask, Packed packed, Masked masked, double gamma, const std::array<bool, 2>&, Tokens d_rewards,
                   PerRow d_bootstrap, Place place) {
  return run(&Kernels::scan_bwd, ScanGradArgs{rows_of(grad_returns, packed), mask, Operand{}, Operand{}, grad_returns, d_rewards, Operand{}, d_bootstrap,
                                              masked, false, gamma, 0, place});
}
double affine_scan(Tokens decay, PerRow decay_row, Tokens x, PerRow initial, Packed packed, double decay_value, bool reverse, Tokens y, Place place) {
  return run(&Kernels::affine_scan, AffineArgs{rows_of(x, packed), either(decay, decay_row), x, initial, y, decay_value, reverse, place});
}
double affine_scan_bwd(Tokens grad, Tokens decay, PerRow decay_row, Tokens y, PerRow initial, Packed packed, double decay_value, bool reverse,
                       const std::array<bool, 3>&, Tokens d_x, Tokens d_decay, PerRow d_initial, Place place) {
  return run(&Kernels::affine_scan_bwd,
             AffineGradArgs{rows_of(y, packed), either(decay, decay_row), y, initial, grad, d_decay, d_x, d_initial, decay_value, reverse, place});
}

// ---- groups: `ids` serves the reference only ------------------------------------------------------------------------
double group_mean_std_fwd(PerRow scores, py::handle, Tokens order, Tokens offsets, bool unbiased, double eps, Singleton singleton, bool omit, PerRow mean,
                          PerRow std, Place place) {
  const GroupOptions options{Baseline::mean, true, unbiased, singleton, eps, omit};
  return run(&Kernels::group_mean_std, GroupMeanStdArgs{groups_of(order, offsets, scores.rows), scores, mean, std, options, place});
}
double group_mean_std_bwd(PerRow grad_mean, PerRow grad_std, PerRow scores, py::handle, Tokens order, Tokens offsets, bool unbiased, double eps,
                          Singleton singleton, bool omit, PerRow d_scores, Place place) {
  const GroupOptions options{Baseline::mean, true, unbiased, singleton, eps, omit};
  return run(&Kernels::group_mean_std_bwd, GroupMeanStdGradArgs{groups_of(order, offsets, scores.rows), scores, grad_mean, grad_std, d_scores, options, place});
}
double group_normalize_fwd(PerRow scores, PerRow lengths, py::handle, Tokens order, Tokens offsets, Baseline baseline, bool scale, bool unbiased, double eps,
                           Singleton singleton, bool omit, PerRow advantages, Place place) {
  const GroupOptions options{baseline, scale, unbiased, singleton, eps, omit};
  return run(&Kernels::group_normalize, GroupNormalizeArgs{groups_of(order, offsets, scores.rows), scores, lengths, advantages, options, place});
}
double group_normalize_bwd(PerRow grad, PerRow scores, PerRow lengths, py::handle, Tokens order, Tokens offsets, Baseline baseline, bool scale, bool unbiased,
                           double eps, Singleton singleton, bool omit, PerRow d_scores, Place place) {
  const GroupOptions options{baseline, scale, unbiased, singleton, eps, omit};
  return run(&Kernels::group_normalize_bwd, GroupNormalizeGradArgs{groups_of(order, offsets, scores.rows), scores, lengths, grad, d_scores, options, place});
}
// Without an order `ids` are raw labels: small batches on the CPU are spared the tensors of a GroupIndex.
double group_advantage_fwd(Tokens rewards, Tokens mask, py::handle ids, std::optional<Tokens> order, Tokens offsets, Packed packed, Baseline baseline,
                           bool scale, double eps, Singleton singleton, const Flags& whiten, double whiten_eps, Tokens components, PerRow component_weights,
                           double f_norm, Tokens advantages, Place place) {
  const GroupOptions options{baseline, scale, true, singleton, eps, false};
  const WhitenOptions whitening = whiten ? whiten_options(*whiten, whiten_eps) : WhitenOptions{};
  const Rows rows = rows_of(rewards, packed);
  std::vector<int64_t> memory;
  Groups groups;
  if (order) {
    groups = groups_of(*order, offsets, rows.count);
  } else {
    if (!kHostReads) throw py::value_error("rlkern: index must be a GroupIndex on the device; got labels, which only the host reads.");
    memory.resize(static_cast<size_t>(4 * rows.count + 1));
    LabelGroups found;
    if (!group_labels(ids.ptr(), rows.count, memory.data(), found)) throw py::error_already_set();
    groups = {found.order, found.offsets, found.groups};
  }
  return run(&Kernels::group_advantage,
             GroupAdvantageArgs{rows, rewards, mask, advantages, groups, options, whiten.has_value(), whitening, components, component_weights, f_norm, place});
}
double token_baseline_fwd(Tokens rewards, Tokens mask, Tokens old_log_prob, Tokens sum_pi_squared, Tokens weights, py::handle, Tokens order, Tokens offsets,
                          Packed packed, bool by_token, bool zero_tail, double eps, Tokens advantages, Tokens returns, Place place) {
  const Rows rows = rows_of(rewards, packed);
  return run(&Kernels::token_baseline, TokenBaselineArgs{rows, rewards, mask, old_log_prob, sum_pi_squared, weights, advantages, returns,
                                                         groups_of(order, offsets, rows.count), by_token, zero_tail, eps, place});
}
int64_t labels_to_ids(py::handle labels, int64_t n, uintptr_t memory) {
  LabelGroups found;
  if (!group_labels(labels.ptr(), n, reinterpret_cast<int64_t*>(memory), found)) throw py::error_already_set();
  return found.groups;
}

// ---- kl ------------------------------------------------------------------------------------------------------------
double kl_penalty_fwd(Tokens log_prob, Tokens ref_log_prob, Tokens old_log_prob, const std::string& kl, const Range& kl_range, double weight_max, Tokens value,
                      Place place) {
  return run(&Kernels::kl, KlArgs{log_prob, ref_log_prob, old_log_prob, Operand{}, value, Operand{}, Operand{}, kl_options(kl, kl_range), weight_max, place});
}
double kl_penalty_bwd(Tokens grad, Tokens log_prob, Tokens ref_log_prob, Tokens old_log_prob, const std::string& kl, const Range& kl_range, double weight_max,
                      const std::array<bool, 2>&, Tokens d_log_prob, Tokens d_ref_log_prob, Place place) {
  return run(&Kernels::kl,
             KlArgs{log_prob, ref_log_prob, old_log_prob, grad, Operand{}, d_log_prob, d_ref_log_prob, kl_options(kl, kl_range), weight_max, place});
}
double shape_rewards_fwd(Tokens rewards, PerRow scores, Tokens old_log_prob, Tokens ref_log_prob, Tokens mask, Packed packed, double kl_coef,
                         const std::string& kl, const Range& kl_range, const std::array<double, 2>& clip, Tokens out, Place place) {
  return run(&Kernels::shape_rewards, RewardArgs{rows_of(old_log_prob, packed), either(rewards, scores), old_log_prob, ref_log_prob, mask, out,
                                                 static_cast<bool>(scores), kl_coef, clip[0], clip[1], kl_options(kl, kl_range), place});
}
double shape_rewards_bwd(Tokens grad, PerRow scores, Tokens mask, Packed packed, const std::array<double, 2>& clip, PerRow d_scores, Place place) {
  return run(&Kernels::shape_rewards_bwd, RewardGradArgs{rows_of(grad, packed), grad, scores, mask, d_scores, clip[0], clip[1], place});
}

// ---- loss ----------------------------------------------------------------------------------------------------------
// dp_size, batch_num_tokens, global_batch_size, loss_scale_factor: a number, NaN for the local count, -infinity where the
// tensor of counts has it.
AggOptions agg_options(Agg mode, std::array<double, 4> n, const PerRow& counts) {
  const bool local_tokens = std::isnan(n[1]), local_sequences = std::isnan(n[2]);
  for (size_t i = 0; i < n.size(); ++i)
    if (counts && kHostReads && n[i] == -std::numeric_limits<double>::infinity()) n[i] = static_cast<const double*>(counts.data)[i];
  return {mode, n[0], n[1], n[2], n[3], local_tokens, local_sequences, kHostReads ? nullptr : static_cast<const double*>(counts.data)};
}
double policy_loss_fwd(Tokens old_log_prob, Tokens log_prob, Tokens advantages, PerRow advantages_row, Tokens mask, Tokens weights, PerRow weights_row,
                       Tokens ref_log_prob, Tokens entropy, PerRow counts, Packed packed, const std::array<double, 4>& clip, Agg mode,
                       const std::array<double, 4>& numbers, const std::string& kl, const Range& kl_range, const std::array<double, 2>& coefs, py::handle,
                       py::handle, Tokens loss, Tokens sums, Tokens maxes, Tokens d_log_prob, Tokens d_entropy, Place place) {
  const PolicyClipOptions options{clip[0], clip[1], clip[2], clip[3]};
  return run(&Kernels::policy_loss, PolicyLossArgs{rows_of(log_prob, packed), old_log_prob, log_prob, either(advantages, advantages_row), mask,
                                                   either(weights, weights_row), ref_log_prob, entropy, loss, sums, maxes, d_log_prob, d_entropy, options,
                                                   agg_options(mode, numbers, counts), kl_options(kl, kl_range), coefs[0], coefs[1], place});
}
double policy_variant_fwd(Tokens old_log_prob, Tokens log_prob, Tokens advantages, PerRow advantages_row, Tokens mask, Tokens weights, PerRow weights_row,
                          Tokens ref_log_prob, Tokens entropy, Tokens selected, Tokens behave, PerRow counts, Packed packed, PolicyKind kind, Level level,
                          const std::array<bool, 2>& flags, const std::array<double, 8>& clip, Agg mode, const std::array<double, 4>& numbers,
                          const std::string& kl, const Range& kl_range, const std::array<double, 2>& coefs, py::handle, py::handle, Tokens loss, Tokens sums,
                          Tokens maxes, Tokens d_log_prob, Tokens d_entropy, Place place) {
  const PolicyClipOptions options{clip[0], clip[1], clip[2], clip[3]};
  const PolicyLossArgs base{rows_of(log_prob, packed),
                            old_log_prob,
                            log_prob,
                            either(advantages, advantages_row),
                            mask,
                            either(weights, weights_row),
                            ref_log_prob,
                            entropy,
                            loss,
                            sums,
                            maxes,
                            d_log_prob,
                            d_entropy,
                            options,
                            agg_options(mode, numbers, counts),
                            kl_options(kl, kl_range),
                            coefs[0],
                            coefs[1],
                            place};
  return run(&Kernels::policy_variant, PolicyVariantArgs{base, selected, behave, kind, level, flags[0], flags[1], {clip[4], clip[5], clip[6], clip[7]}});
}
double policy_select_fwd(Tokens old_log_prob, Tokens log_prob, Tokens advantages, PerRow advantages_row, Tokens mask, Packed packed, const std::string& kind,
                         const std::vector<double>& numbers, Tokens selected, Tokens counts, Place place) {
  PolicySelectArgs args{rows_of(log_prob, packed), old_log_prob, log_prob, either(advantages, advantages_row), mask, selected, counts,
                        kind == "kl_cov",          {},           place};
  for (size_t i = 0; i < numbers.size() && i < 4; ++i) args.numbers[i] = numbers[i];
  return run(&Kernels::policy_select, args);
}
double value_loss_fwd(Tokens vpreds, Tokens returns, Tokens values, Tokens mask, PerRow counts, Packed packed, double range, double delta, Agg mode,
                      const std::array<double, 4>& numbers, py::handle, py::handle, Tokens loss, Tokens sums, Tokens maxes, Tokens d_vpreds, Place place) {
  return run(&Kernels::value_loss, ValueLossArgs{rows_of(vpreds, packed), vpreds, returns, values, mask, loss, sums, maxes, d_vpreds, range, delta,
                                                 agg_options(mode, numbers, counts), place});
}
double scale_fwd(Tokens x, Tokens factor, py::handle, Tokens out, Place place) { return run(&Kernels::scale, ScaleArgs{x, factor, out, place}); }

// ---- rollout correction --------------------------------------------------------------------------------------------
// "token_k1,seq_mean_k3" and two limits each.
int rejections(const std::string& options, const std::vector<double>& limits, Rejection (&found)[kMaxRejections]) {
  int count = 0;
  for (size_t begin = 0; begin < options.size();) {
    const size_t end = std::min(options.find(',', begin), options.size());
    const std::string name = options.substr(begin, end - begin), by = name.substr(0, name.size() - std::min<size_t>(name.size(), 3));
    const size_t at = 2 * static_cast<size_t>(count);
    const int k = name.empty() ? 0 : name.back() - '0';
    if (count == kMaxRejections || at + 1 >= limits.size() || k < 1 || k > 3) throw py::value_error("rlkern._C: options and limits do not fit");
    const RejectBy kind = by == "token" ? RejectBy::token : by == "seq_sum" ? RejectBy::sum : by == "seq_mean" ? RejectBy::mean : RejectBy::max;
    found[count++] = {kind, k, limits[at], limits[at + 1]};
    begin = end + 1;
  }
  return count;
}
double rollout_correction_fwd(Tokens old_log_prob, Tokens rollout_log_prob, Tokens mask, Packed packed, WeightLevel level, bool icepop,
                              const std::array<double, 2>& range, const std::string& options, const std::vector<double>& limits, bool probabilities, py::handle,
                              Tokens weights, Tokens modified, Tokens table, Place place) {
  CorrectionArgs a{};
  a.rows = rows_of(old_log_prob, packed), a.old_log_prob = old_log_prob, a.rollout_log_prob = rollout_log_prob, a.mask = mask;
  a.weights = weights, a.modified = modified, a.table = table;
  a.level = level, a.icepop = icepop, a.low = range[0], a.high = range[1], a.probabilities = probabilities, a.place = place;
  a.options = rejections(options, limits, a.option);
  return run(&Kernels::rollout_correction, a);
}
double importance_weights_fwd(Tokens old_log_prob, Tokens rollout_log_prob, Tokens mask, Packed packed, Gating gating, GateUnit unit, bool per_row, bool clip,
                              const std::array<double, 2>& bounds, OnNan nan, double padding, py::handle, Tokens weights, Tokens table, Place place) {
  return run(&Kernels::importance_weights, ImportanceArgs{rows_of(old_log_prob, packed), old_log_prob, rollout_log_prob, mask, weights, table, gating, unit,
                                                          per_row, clip, bounds[0], bounds[1], nan, padding, place});
}

// ---- whiten ----------------------------------------------------------------------------------------------------------
template <Reduce kind>
double masked_reduce(Tokens values, Tokens mask, Packed packed, bool by_row, bool unbiased, bool, Tokens result, Tokens moments, Place place) {
  const Operand first = kind == Reduce::moments ? Operand{} : result;
  return run(&Kernels::masked_reduce,
             ReduceArgs{rows_of(values, packed), values, mask, first, kind == Reduce::moments ? result : moments, kind, by_row, unbiased, place});
}
template <Reduce kind>
double masked_reduce_bwd(Tokens grad, Tokens values, Tokens mask, Packed packed, Tokens moments, bool by_row, bool unbiased, Tokens d_values, Place place) {
  return run(&Kernels::masked_reduce_bwd, ReduceGradArgs{rows_of(values, packed), grad, mask, values, moments, d_values, kind, by_row, unbiased, place});
}
using WhitenFlags = std::array<bool, 5>;
template <bool by_row>  // masked_whiten, or masked_normalize
double whiten_fwd(Tokens values, Tokens mask, Packed packed, const WhitenFlags& flags, double eps, bool, Tokens out, Tokens moments, Place place) {
  return run(&Kernels::whiten_fwd, WhitenArgs{rows_of(values, packed), values, mask, moments, out, by_row, false, by_row, whiten_options(flags, eps), place});
}
template <bool by_row>
double whiten_bwd(Tokens grad, Tokens values, Tokens mask, Packed packed, Tokens moments, const WhitenFlags& flags, double eps, Tokens d_values, Place place) {
  return run(&Kernels::whiten_bwd, WhitenGradArgs{rows_of(values, packed), grad, values, mask, moments, d_values, Operand{}, by_row, false, by_row,
                                                  whiten_options(flags, eps), place});
}
double whiten_apply(Tokens values, Tokens mask, Packed packed, Tokens moments, const WhitenFlags& flags, double eps, bool by_row, Tokens out, Place place) {
  return run(&Kernels::whiten_fwd, WhitenArgs{rows_of(values, packed), values, mask, moments, out, by_row, true, false, whiten_options(flags, eps), place});
}
double whiten_apply_bwd(Tokens grad, Tokens values, Tokens mask, Packed packed, Tokens moments, const WhitenFlags& flags, double eps, bool by_row,
                        const std::array<bool, 2>&, Tokens d_values, Tokens d_moments, Place place) {
  return run(&Kernels::whiten_bwd,
             WhitenGradArgs{rows_of(values, packed), grad, values, mask, moments, d_values, d_moments, by_row, true, false, whiten_options(flags, eps), place});
}

}  // namespace

PYBIND11_MODULE(RLKERN_MODULE, m) {
  m.doc() = "rlkern's kernels, by address.";
  m.def("register_torch", [](const py::list& l, py::handle tensor, py::handle parameter, const py::object& exchange_api) {
    for (int i = 0; i < kDtypes; ++i) dtypes[i] = py::object(l[static_cast<size_t>(i)]).release().ptr();
    tensor_types[0] = reinterpret_cast<PyTypeObject*>(tensor.ptr()), tensor_types[1] = reinterpret_cast<PyTypeObject*>(parameter.ptr());
    const auto* api = exchange_api.is_none() ? nullptr : py::reinterpret_borrow<py::capsule>(exchange_api).get_pointer<const dlpack::Api>();
    exchange = api && api->header.major == dlpack::kMajor ? api : nullptr;
    return exchange != nullptr;
  });
  m.def("offsets_fit", [](const Packed& cu_seqlens, int64_t total) { return offsets_fit(cu_seqlens, total); });
  m.def("alike", [](py::handle like, const py::dict& others) { return alike(like.ptr(), others); });
  m.def("isa", [] { return chosen->isa; });
  m.def("isas", [] {
    py::dict d;
    for (const Kernels* t : tables) d[t->isa] = runs(t->isa);
    return d;
  });
  m.def("set_isa", [](const std::string& isa) {
    for (const Kernels* t : tables)
      if (isa == t->isa && runs(isa)) return chosen = t, true;
    return isa.empty() ? (chosen = widest(), true) : false;
  });
#if defined(RLKERN_CUDA)
  m.def("capture", [](uintptr_t stream) { return capture_of(reinterpret_cast<void*>(stream)); });
#else
  m.def("huge_pages", [](uintptr_t address, size_t bytes) { advise_huge_pages(address, bytes); });
  m.def("stream_copy", [](uintptr_t to, uintptr_t from, int64_t bytes, Place place) {
    return run(&Kernels::stream_copy, CopyArgs{reinterpret_cast<const void*>(from), reinterpret_cast<void*>(to), bytes, place});
  });
#endif
  m.def("_gae_fwd", gae_fwd);
  m.def("_gae_bwd", gae_bwd);
  m.def("_discounted_returns_fwd", returns_fwd);
  m.def("_discounted_returns_bwd", returns_bwd);
  m.def("_affine_scan_fwd", affine_scan);
  m.def("_affine_scan_bwd", affine_scan_bwd);
  m.def("group_labels", labels_to_ids);
  m.def("_group_mean_std_fwd", group_mean_std_fwd);
  m.def("_group_mean_std_bwd", group_mean_std_bwd);
  m.def("_group_normalize_fwd", group_normalize_fwd);
  m.def("_group_normalize_bwd", group_normalize_bwd);
  m.def("_group_advantage_fwd", group_advantage_fwd);
  m.def("_optimal_token_baseline_fwd", token_baseline_fwd);
  m.def("_kl_penalty_fwd", kl_penalty_fwd);
  m.def("_kl_penalty_bwd", kl_penalty_bwd);
  m.def("_shape_rewards_fwd", shape_rewards_fwd);
  m.def("_shape_rewards_bwd", shape_rewards_bwd);
  m.def("_policy_loss_fwd", policy_loss_fwd);
  m.def("_policy_variant_fwd", policy_variant_fwd);
  m.def("_policy_select_fwd", policy_select_fwd);
  m.def("_value_loss_fwd", value_loss_fwd);
  m.def("_scale_fwd", scale_fwd);
  m.def("_rollout_correction_fwd", rollout_correction_fwd);
  m.def("_importance_weights_fwd", importance_weights_fwd);
  m.def("_masked_sum_fwd", masked_reduce<Reduce::sum>);
  m.def("_masked_sum_bwd", masked_reduce_bwd<Reduce::sum>);
  m.def("_masked_mean_fwd", masked_reduce<Reduce::mean>);
  m.def("_masked_mean_bwd", masked_reduce_bwd<Reduce::mean>);
  m.def("_masked_var_fwd", masked_reduce<Reduce::var>);
  m.def("_masked_var_bwd", masked_reduce_bwd<Reduce::var>);
  m.def("_masked_moments_fwd", masked_reduce<Reduce::moments>);
  m.def("_masked_moments_bwd", masked_reduce_bwd<Reduce::moments>);
  m.def("_masked_whiten_fwd", whiten_fwd<false>);
  m.def("_masked_whiten_bwd", whiten_bwd<false>);
  m.def("_masked_normalize_fwd", whiten_fwd<true>);
  m.def("_masked_normalize_bwd", whiten_bwd<true>);
  m.def("_whiten_apply_fwd", whiten_apply);
  m.def("_whiten_apply_bwd", whiten_apply_bwd);
}
