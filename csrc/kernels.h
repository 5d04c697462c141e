// SPDX-License-Identifier: Apache-2.0
// The table of kernels: one list, from which every ISA fills its own set of pointers and bind.cpp picks one.
#pragma once
#include "args.h"

// X(name, argument struct): every op's kernel. It returns the mask's sum where its caller must judge it, else 0.
#define RLKERN_OPS(X)                            \
  X(scan_fwd, ScanArgs)                          \
  X(scan_bwd, ScanGradArgs)                      \
  X(affine_scan, AffineArgs)                     \
  X(affine_scan_bwd, AffineGradArgs)             \
  X(group_mean_std, GroupMeanStdArgs)            \
  X(group_mean_std_bwd, GroupMeanStdGradArgs)    \
  X(group_normalize, GroupNormalizeArgs)         \
  X(group_normalize_bwd, GroupNormalizeGradArgs) \
  X(group_advantage, GroupAdvantageArgs)         \
  X(token_baseline, TokenBaselineArgs)           \
  X(kl, KlArgs)                                  \
  X(shape_rewards, RewardArgs)                   \
  X(shape_rewards_bwd, RewardGradArgs)           \
  X(policy_loss, PolicyLossArgs)                 \
  X(policy_variant, PolicyVariantArgs)           \
  X(policy_select, PolicySelectArgs)             \
  X(value_loss, ValueLossArgs)                   \
  X(scale, ScaleArgs)                            \
  X(rollout_correction, CorrectionArgs)          \
  X(importance_weights, ImportanceArgs)          \
  X(masked_reduce, ReduceArgs)                   \
  X(masked_reduce_bwd, ReduceGradArgs)           \
  X(whiten_fwd, WhitenArgs)                      \
  X(whiten_bwd, WhitenGradArgs)

#if defined(RLKERN_CUDA)
#define RLKERN_KERNELS(X) RLKERN_OPS(X)
namespace rlkern {
uint64_t capture_of(void* stream);  // into a graph; 0: none
}
#else
#define RLKERN_KERNELS(X) RLKERN_OPS(X) X(stream_copy, CopyArgs)
#endif

#if defined(RLKERN_CUDA)
#define RLKERN_ISAS(X) X(cuda)
#elif defined(__x86_64__)
#define RLKERN_ISAS(X) X(base) X(avx2) X(avx512)  // the widest last
#else
#define RLKERN_ISAS(X) X(base)
#endif

namespace rlkern {

struct Kernels {
  const char* isa;
#define RLKERN_POINTER(name, Args) double (*name)(const Args&);
  RLKERN_KERNELS(RLKERN_POINTER)
#undef RLKERN_POINTER
};

#ifdef RLKERN_ISA
namespace RLKERN_ISA {
#define RLKERN_DECLARE(name, Args) double name(const Args&);
RLKERN_KERNELS(RLKERN_DECLARE)
#undef RLKERN_DECLARE
}  // namespace RLKERN_ISA
#endif

}  // namespace rlkern
