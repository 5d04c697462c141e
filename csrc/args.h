// SPDX-License-Identifier: Apache-2.0
// What a kernel is told: plain addresses, strides and numbers, one struct per op. Every floor below includes only this.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define RLKERN_HD __host__ __device__ inline
#else
#define RLKERN_HD inline
#endif

namespace rlkern {

// Where a call runs: so many threads of the CPU; or a stream of a GPU, with memory for what its blocks tell each other
// (csrc/cuda/launch.cuh).
#if defined(RLKERN_CUDA)
struct Place {
  void* stream = nullptr;
  int device = 0;
  void* memory = nullptr;
  int64_t bytes = 0;
};
#else
using Place = int;
#endif

enum class Dtype : int32_t { f32, f64, f16, bf16, b8, u8, i32, i64 };

// A tensor as rows. Padded (B, T): element (r, t) sits at r * row_stride + t * inner_stride, inner_stride 1, or 0 where a
// row holds one value (advantages of an outcome estimator). Packed: see Rows.
struct Operand {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t rows = 0, cols = 0;
  int64_t row_stride = 0;
  int64_t inner_stride = 1;
  RLKERN_HD explicit operator bool() const { return data != nullptr; }
};

// The rows of one call: `count` rows of `length` tokens, or, packed, row r = [cu[r], cu[r + 1]) of one long row.
struct Rows {
  int64_t count = 0, length = 0;
  const int64_t* cu = nullptr;
  RLKERN_HD int64_t len(int64_t r) const { return cu ? cu[r + 1] - cu[r] : length; }
  // Offset of a row's first element in an operand; a packed per-row operand keeps its own row stride.
  RLKERN_HD int64_t base(const Operand& x, int64_t r) const { return cu && x.inner_stride ? cu[r] : r * x.row_stride; }
  RLKERN_HD int64_t total() const { return cu ? cu[count] : count * length; }
};

enum class Masked : int32_t { none, skip, reset, zero, turn };
enum class Kl : int32_t { none, k1, abs, k2, k3 };
enum class Baseline : int32_t { none, mean, leave_one_out, length_weighted, second_best };
enum class Singleton : int32_t { raw, zero, nan };
enum class Agg : int32_t { token_mean, seq_mean_token_sum, seq_mean_token_mean, seq_mean_token_sum_norm, token_sum };

// (v - mean) * rstd and its choices; see rlkern/whiten.py for the words.
struct WhitenOptions {
  bool unbiased = true, floor = false, shift_mean = true, scale = true, mask_output = false;
  double eps = 1e-8;
};

// The log-ratio and value clamps of a KL estimator; infinite where a framework has none.
struct KlOptions {
  Kl estimator = Kl::none;
  bool straight_through = false;
  double ratio_low, ratio_high, value_low, value_high;
};

// Kernels take exclusive outputs; an output with a null address is not wanted. `stream` asks for non-temporal stores.
struct ScanArgs {
  Rows rows;
  Operand rewards, values, mask, bootstrap, lam, old_log_prob, ref_log_prob;
  Operand advantages, returns;  // outputs; discounted returns leaves advantages and values null
  Masked masked;
  double gamma, lam_value, kl_coef;
  KlOptions kl;
  bool whiten;  // advantages := whitened advantages (gae) or returns (REINFORCE++)
  WhitenOptions whiten_options;
  Place place;
};

struct ScanGradArgs {
  Rows rows;
  Operand mask, lam, grad_advantages, grad_returns;
  Operand d_rewards, d_values, d_bootstrap;
  Masked masked;
  bool gae;  // else discounted returns, from grad_returns
  double gamma, lam_value;
  Place place;
};

struct AffineArgs {
  Rows rows;
  Operand decay, x, initial, y;
  double decay_value;  // used where decay is null
  bool reverse;
  Place place;
};

// Both 64-byte aligned; whole pieces of 256 KiB are copied.
struct CopyArgs {
  const void* from;
  void* to;
  int64_t bytes;
  Place place;
};

// y is the forward result; d_decay is per token, or (B,) summed over the row.
struct AffineGradArgs {
  Rows rows;
  Operand decay, y, initial, grad;
  Operand d_decay, d_x, d_initial;
  double decay_value;
  bool reverse;
  Place place;
};

// Rows by group: group g holds rows order[offsets[g]], ..., order[offsets[g + 1] - 1].
struct Groups {
  const int64_t* order = nullptr;
  const int64_t* offsets = nullptr;
  int64_t count = 0;
};

// `eps` is added to the standard deviation; in group_mean_std it is the floor of the variance. `singleton`: what a group of
// one row has for mean and deviation. `omit`: a NaN is no score.
struct GroupOptions {
  Baseline baseline = Baseline::mean;
  bool scale = true, unbiased = true;
  Singleton singleton = Singleton::raw;
  double eps = 1e-6;
  bool omit = false;
};

// Scores, lengths, gradients and outputs are (B,), or (G,) for mean and std.
struct GroupMeanStdArgs {
  Groups groups;
  Operand scores, mean, std;
  GroupOptions options;
};
struct GroupMeanStdGradArgs {
  Groups groups;
  Operand scores, grad_mean, grad_std, d_scores;
  GroupOptions options;
};
struct GroupNormalizeArgs {
  Groups groups;
  Operand scores, lengths, advantages;
  GroupOptions options;
};
struct GroupNormalizeGradArgs {
  Groups groups;
  Operand scores, lengths, grad, d_scores;
  GroupOptions options;
};
// Row sums of rewards, or weighted components (B, K), normalized in their groups, broadcast over the mask; whitened over all
// valid tokens if asked. f_norm, if not 0: times rows / (scores that are not 0) / f_norm.
struct GroupAdvantageArgs {
  Rows rows;
  Operand rewards, mask, advantages;
  Groups groups;
  GroupOptions options;
  bool whiten;
  WhitenOptions whiten_options;
  Operand components, component_weights;
  double f_norm;
  Place place;
};

// Rewards to go less a baseline per group and column. by_token: a column is a number among a row's valid tokens.
struct TokenBaselineArgs {
  Rows rows;
  Operand rewards, mask, old_log_prob, sum_pi_squared, weights;
  Operand advantages, returns;
  Groups groups;
  bool by_token, zero_tail;
  double eps;
  Place place;
};

// kl: the value; else d_log_prob and d_ref_log_prob from grad. With old_log_prob both are weighted.
struct KlArgs {
  Operand log_prob, ref_log_prob, old_log_prob, grad;
  Operand kl, d_log_prob, d_ref_log_prob;
  KlOptions options;
  double weight_max;  // infinite = off
  Place place;
};

// rewards - kl_coef * KL at valid tokens. per_row: one reward a row, clipped, at the last valid token.
struct RewardArgs {
  Rows rows;
  Operand rewards, old_log_prob, ref_log_prob, mask, out;
  bool per_row;
  double kl_coef, clip_low, clip_high;
  KlOptions options;
  Place place;
};
struct RewardGradArgs {  // of per-row rewards
  Rows rows;
  Operand grad, rewards, mask, d_rewards;
  double clip_low, clip_high;
  Place place;
};

// How a loss adds up. What is local is counted by the kernel. On a GPU the numbers that are -infinity are in `counts`, four of
// them in this order, in its memory.
struct AggOptions {
  Agg mode;
  double dp_size, tokens, sequences, scale;
  bool local_tokens, local_sequences;
  const double* counts = nullptr;
};
struct PolicyClipOptions {
  double low, high;  // r in [1 - low, 1 + high]
  double cap;        // dual clip: at most -A cap where A < 0; infinite = off
  double clamp;      // |log-ratio| at most this; infinite = off
};

// Sums and maxes in the order of kPolicySums and kPolicyMaxes (rlkern/metrics.py names them). loss, sums and maxes are
// one row each.
enum PolicySum { kTokens, kSequences, kClipped, kClippedLower, kNegLogRatio, kPgLoss, kKlLoss, kEntropyLoss, kNonfinite, kPolicySums };
enum PolicyMax { kRatioMax, kAbsLogRatioMax, kPolicyMaxes };
struct PolicyLossArgs {
  Rows rows;
  Operand old_log_prob, log_prob, advantages, mask, weights, ref_log_prob, entropy;
  Operand loss, sums, maxes, d_log_prob, d_entropy;
  PolicyClipOptions clip;
  AggOptions agg;
  KlOptions kl;
  double kl_coef, entropy_coeff;
  Place place;
};

// A variant of the policy loss: the function of a token, what its ratio is of, its own numbers (rlkern/policy.py).
enum class PolicyKind : int32_t { clip, kl_cov, sapo, reinforce, cispo, dppo_tv, dppo_kl, dro, vespo, geo_mean, topr };
enum class Level : int32_t { token, sequence, sequence_sum };
struct PolicyVariantArgs : PolicyLossArgs {
  Operand selected, behave;  // a byte per token; the behaviour policy's log-prob
  PolicyKind kind;
  Level level;
  bool row_grad, by_ratio;  // the gradient goes through the row; the KL is multiplied by the ratio
  double own[4];
};
// selected: a byte per token; counts: how many are set, and valid tokens. numbers: of clip-cov the covariance's bounds and the
// clip, of kl-cov the share of tokens.
struct PolicySelectArgs {
  Rows rows;
  Operand old_log_prob, log_prob, advantages, mask;
  Operand selected, counts;
  bool largest;  // kl-cov
  double numbers[4];
  Place place;
};

enum ValueSum { kVTokens, kVSequences, kVClipped, kVPredictions, kVLoss, kVNonfinite, kValueSums };
enum ValueMax { kAbsErrorMax, kValueMaxes };
struct ValueLossArgs {
  Rows rows;
  Operand vpreds, returns, values, mask;
  Operand loss, sums, maxes, d_vpreds;
  double range;  // infinite = off, values unread
  double delta;  // Huber's, infinite = off
  AggOptions agg;
  Place place;
};

// out = x * factor, 0 where x is 0; factor is one number.
struct ScaleArgs {
  Operand x, factor, out;
  Place place;
};

// ---- rollout correction ---------------------------------------------------------------------------------------------
// `table` is (fields, rows) float64, its lines in the order of FIELDS in rlkern/reference/correction.py.
enum class WeightLevel : int32_t { none, token, sequence };
enum class RejectBy : int32_t { token, sum, mean, max };
struct Rejection {
  RejectBy by;
  int k;  // 1, 2, 3
  double low, high;
};
// clang-format off
enum CorrectionField {
  kRTokens, kROld, kRRollout, kRK3, kRExcess, kRExcess2, kRKept, kRRatio, kRW, kRW2, kRWHigh, kRWLow, kRWMax, kRWMin, kRWSquare, kRByK
};
// clang-format on
enum CorrectionByK { kKSum, kKMax, kKMin, kKClamped, kKClamped2, kKHigh, kKLow, kKKept, kByK };  // three times, from kRByK on
enum CorrectionProbability { kPOld, kPRollout, kPOld2, kPRollout2, kPProduct, kPGap, kPGap2, kPGapMax, kPFields };  // behind those
constexpr int kRProbability = kRByK + 3 * kByK, kCorrectionFields = kRProbability + kPFields, kMaxRejections = 11;
struct CorrectionArgs {
  Rows rows;
  Operand old_log_prob, rollout_log_prob, mask;
  Operand weights, modified, table;  // modified: the mask, 0 where rejected
  WeightLevel level;
  bool icepop;
  double low, high;
  int options;
  Rejection option[kMaxRejections];
  bool probabilities;
  Place place;
};

enum class Gating : int32_t { ratio, binary_kl, tv };
enum class GateUnit : int32_t { token, mean, sum };
enum class OnNan : int32_t { show, one, drop };
enum WeightField { kWTokens, kWLogRatio, kWStatistic, kWFiltered };
struct ImportanceArgs {
  Rows rows;
  Operand old_log_prob, rollout_log_prob, mask;
  Operand weights, table;  // per_row: one weight a row
  Gating gating;
  GateUnit unit;
  bool per_row, clip;
  double low, high;
  OnNan nan;
  double padding;
  Place place;
};

// ---- whiten: one row of statistics a row (by_row), or one for all rows --------------------------------------------------
enum class Reduce : int32_t { sum, mean, var, moments };

// `moments` is (rows or 1, 3) float64: count, mean, M2.
struct ReduceArgs {
  Rows rows;
  Operand values, mask;
  Operand result, moments;  // outputs; for Reduce::moments the result is the moments
  Reduce kind;
  bool by_row, unbiased;
  Place place;
};

struct ReduceGradArgs {
  Rows rows;
  Operand grad, mask, values, moments;
  Operand d_values;
  Reduce kind;
  bool by_row, unbiased;
  Place place;
};

struct WhitenArgs {
  Rows rows;
  Operand values, mask, moments;  // moments: an output, or, if `given`, an input
  Operand out;
  bool by_row, given;
  bool at_least_one;  // divide by max(count, 1)
  WhitenOptions options;
  Place place;
};

struct WhitenGradArgs {
  Rows rows;
  Operand grad, values, mask, moments;
  Operand d_values, d_moments;
  bool by_row, given;  // given: the moments are constants of d_values, with a gradient of their own
  bool at_least_one;
  WhitenOptions options;
  Place place;
};

}  // namespace rlkern
