# SPDX-License-Identifier: Apache-2.0
"""Random calls of every function of verl that is replaced."""

import numpy as np
import torch

MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


# ---- random inputs ------------------------------------------------------------------------------------------------------
class Draw:
    """Everything of a case follows from its seed, which hypothesis prints."""

    def __init__(self, seed):
        self.g = torch.Generator().manual_seed(seed)
        self.B, self.T = self.integer(1, 7), self.choice([1, 2, 3, 7, 16, 17, 33, 64])
        self.dtype = self.choice([torch.float32] * 4 + [torch.bfloat16])

    def integer(self, low, high):
        return int(torch.randint(low, high + 1, (), generator=self.g))

    def choice(self, values):
        return values[self.integer(0, len(values) - 1)]

    def number(self, low, high):
        return low + (high - low) * float(torch.rand((), generator=self.g, dtype=torch.float64))

    def tensor(self, scale=None, dtype=None, shape=None):
        """Of some size, offset and stride; a few large values among small ones at times."""
        shape = shape or (self.B, self.T)
        x = torch.randn(shape, generator=self.g) * (scale or self.choice([1e-3, 1.0, 1.0, 10.0])) + self.choice([0.0, 0.0, 1.0])
        if self.integer(0, 9) == 0:
            x = torch.where(torch.rand(shape, generator=self.g) < 0.1, x * 100, x)
        x = x.to(dtype or self.dtype)
        if self.integer(0, 2) == 0:  # rows of a wider tensor
            wide = torch.full((shape[0], *[n + 5 for n in shape[1:]]), torch.nan, dtype=x.dtype)
            view = wide[:, 2 : 2 + shape[1]] if len(shape) > 1 else wide
            return view.copy_(x)
        return x

    def mask(self, kinds=(torch.int64, torch.bool, torch.float32), empty_rows=True):
        """Lengths, holes; with empty_rows also rows without a token, at times no token at all."""
        lengths = torch.randint(0, self.T + 1, (self.B,), generator=self.g)
        m = torch.arange(self.T)[None] < lengths[:, None]
        if self.integer(0, 1):
            m &= torch.rand(self.B, self.T, generator=self.g) < 0.8
        if self.integer(0, 30) == 0:
            m[:] = self.integer(0, 1)
        if not empty_rows:
            m[:, 0] = True
        return m.to(self.choice(kinds))

    def labels(self):
        names = [self.choice(["a", "b", "c-long-label"]) for _ in range(self.B)]
        return self.choice([np.array(names, dtype=object), np.array([ord(n[0]) for n in names])])


def log_probs(d):
    old = -d.tensor(1.0).abs()
    return old, (old + d.tensor(d.choice([1e-3, 0.1, 0.3, 30.0]))).to(old.dtype)


def counts(d):
    return d.choice([{}, {"dp_size": 2, "batch_num_tokens": 77, "global_batch_size": 9, "loss_scale_factor": 50}])


class Config:
    clip_ratio, gamma = 0.2, 0.9

    def __init__(self, d):
        self.clip_ratio_low, self.clip_ratio_high, self.gamma = d.number(0.05, 0.5), d.number(0.05, 0.5), d.number(0.5, 1.0)
        self.global_batch_info, self.cap = counts(d), d.number(1.5, 5.0)

    def get(self, name, default=None):
        return self.cap if name == "clip_ratio_c" else default


def actor(d, **policy):
    from verl.workers.config import ActorConfig
    from verl.workers.config.actor import PolicyLossConfig

    made = ActorConfig(
        strategy="fsdp", rollout_n=8, ppo_micro_batch_size_per_gpu=8, clip_ratio_low=d.number(0.05, 0.5), clip_ratio_c=d.number(1.5, 5.0),
        clip_ratio_high=d.number(0.05, 0.5), tau_pos=d.number(0.5, 2.0), tau_neg=d.number(0.5, 2.0), policy_loss=PolicyLossConfig(**policy),
    )  # fmt: skip
    made.global_batch_info.update(counts(d))
    return made


def loss_case(d, **policy):
    """Of a variant: log-probs below 0, at times with weights."""
    old, new = log_probs(d)
    new, mask = -new.abs(), d.mask((torch.int64, torch.bool))
    weights = d.choice([None, d.tensor(1.0).abs()])
    return old, new, d.tensor(), mask, d.choice(MODES), actor(d, **policy), weights


def cov_case(d):
    d.dtype = torch.float32  # among tokens of equal covariance, as in bfloat16, another may be the one that is penalized
    share, lowest = d.choice([2e-4, 0.1, 0.5]), d.choice([0.0, 0.1, 1.0])
    cov = {"clip_cov_ratio": share, "clip_cov_lb": lowest, "clip_cov_ub": lowest + d.number(0.1, 5.0)}
    return loss_case(d, **cov, kl_cov_ratio=share, ppo_kl_coef=d.number(0.01, 1.0))


LEVELS = (None, "token", "sequence")
BANDS = (2.0, 1.1, "0.5_2.0", "0.9_1.1", "3", None)
REJECTIONS = (
    None,
    "token_k1",
    "token_k2",
    "token_k3",
    "seq_sum_k1",
    "seq_mean_k3",
    "seq_max_k2",
    "seq_sum_k2,token_k1",
    "seq_mean_k1,seq_max_k3",
)


def thresholds(d, options):
    one = {"k1": d.choice(["0.5_2.0", "1.2", "0.9_1.5"]), "k2": d.choice(["0.1", "2"]), "k3": d.choice(["0.1", "2"])}
    return None if options is None else ",".join(one[name[-2:]] for name in options.split(","))


def gap(d):
    """Two policies that differ by at most exp(8), and a mask of numbers."""
    old, new = log_probs(d)
    return old, -(old + (new - old).clamp(-8, 8)).abs(), d.mask((torch.int64, torch.bool))


def correction_case(d):
    options = d.choice(REJECTIONS)
    return *gap(d), d.choice(LEVELS), d.choice(BANDS), d.choice([True, False]), options, thresholds(d, options)


def ratio(d):
    old, new, mask = gap(d)
    return old - new, mask


def rejection_case(d):
    options = d.choice(REJECTIONS[1:])
    return *ratio(d), options, thresholds(d, options)


def bypass_case(d):
    options = d.choice(REJECTIONS)
    own = {
        "loss_type": d.choice(["ppo_clip", "reinforce", "nonsense", "reinforce", "ppo_clip"]), "rollout_is": d.choice(LEVELS),
        "rollout_is_threshold": d.choice(BANDS), "rollout_rs": options, "rollout_rs_threshold": thresholds(d, options),
        "rollout_is_batch_normalize": d.choice([True, False]),
    }  # fmt: skip
    _, _, advantages, _, mode, config, _ = loss_case(d)
    old, new, mask = gap(d)
    config.policy_loss.rollout_correction.__dict__.update(own)
    return old, new, advantages, mask, mode, config


def token_case(d):
    d.dtype = torch.float32
    old = -d.tensor(1.0).abs()
    squares = (2 * old).exp() + 0.1 * torch.rand(d.B, d.T, generator=d.g)
    weights = d.choice([None, d.tensor(0.5).abs().clamp(max=2)])
    return d.tensor(), d.mask(NUMBERS[:1]), d.labels(), old, squares, weights, d.choice([True, False])


def pairs(d):
    """Labels that come twice at least, at times."""
    names = d.labels()
    d.B *= 2
    return np.concatenate([names, names])


def passk_case(d):
    labels = pairs(d) if d.integer(0, 9) else d.labels()
    config = {"norm_adv_by_std_in_grpo": d.choice([True, False])}
    return d.tensor(), d.mask(), labels, 1e-6, True, config


def gdpo_case(d):
    d.dtype = torch.float32
    rewards, mask, labels = d.tensor(), d.mask(NUMBERS[:1]), d.labels()
    if d.integer(0, 3) == 0:
        return rewards, mask, labels
    own = {name: d.tensor(shape=(d.B,)).numpy() for name in "abc"[: d.integer(1, 3)]}
    config = {"gdpo_reward_keys": list(own), "gdpo_reward_weights": d.choice([None, [1.0, 0.25, 3.0][: len(own)]])}
    return rewards, mask, labels, 1e-6, d.choice([True, False]), config, own, {"prompts": mask[:, :0], "attention_mask": mask}


def debug_case(d):
    from verl import DataProto

    old, new, mask = gap(d)
    wide = torch.cat((torch.ones(d.B, 3, dtype=mask.dtype), mask), 1)
    tensors = {"old_log_probs": old, "rollout_log_probs": new, "responses": mask.long(), "attention_mask": wide}
    return (DataProto.from_dict(tensors=tensors | d.choice([{}, {"response_mask": mask}])),)


SIMPLE = ("gspo", "sapo", "gpg", "geo_mean", "dppo_tv", "dppo_kl", "cispo", "reinforce")
NUMBERS = (torch.int64, torch.float32)  # a mask that verl subtracts from 1
VERL = {
    "masked_sum": lambda d: (d.tensor(), d.mask(), d.choice([None, 0, -1])),
    "masked_mean": lambda d: (d.tensor(), d.mask(), d.choice([None, 0, -1])),
    "masked_var": lambda d: (d.tensor(), d.mask(), d.choice([True, False])),
    "masked_whiten": lambda d: (d.tensor(), d.mask(), d.choice([True, False])),
    "group_mean_std": lambda d: (d.tensor(dtype=torch.float32, shape=(9,)), torch.randint(0, 5, (9,), generator=d.g), 1e-6, "cpu"),
    "compute_gae_advantage_return": lambda d: (d.tensor(), d.tensor(), d.mask(NUMBERS), d.number(0.5, 1), d.number(0, 1)),
    "compute_grpo_outcome_advantage": lambda d: (d.tensor(), d.mask(), d.labels(), 1e-6, d.choice([True, False])),
    "compute_grpo_vectorized_outcome_advantage": lambda d: (d.tensor(dtype=torch.float32), d.mask(), d.labels()),
    "compute_rloo_outcome_advantage": lambda d: (d.tensor(), d.mask(), d.labels()),
    "compute_rloo_vectorized_outcome_advantage": lambda d: (d.tensor(dtype=torch.float32), d.mask(), d.labels()),
    # a group without a token is NaN in verl, 0 in ours, and nobody reads it
    "compute_opo_outcome_advantage": lambda d: (d.tensor(), d.mask(NUMBERS, False), d.labels()),
    "compute_reinforce_plus_plus_baseline_outcome_advantage": lambda d: (d.tensor(), d.mask(), d.labels()),
    "compute_reinforce_plus_plus_outcome_advantage": lambda d: (d.tensor(), d.mask(NUMBERS), Config(d)),
    "compute_remax_outcome_advantage": lambda d: (d.tensor(), d.tensor(shape=(d.B,)), d.mask(NUMBERS)),
    "kl_penalty_forward": lambda d: (*log_probs(d), d.choice(["k3", "low_var_kl"])),
    "kl_penalty": lambda d: (*log_probs(d), d.choice(["k3", "low_var_kl", "k3+", "abs+", "k1+"])),
    "agg_loss": lambda d: (d.tensor(), d.mask((torch.int64, torch.bool)), d.choice(MODES[2:]), *counts(d).values()),
    "compute_policy_loss_vanilla": lambda d: (*log_probs(d), d.tensor(), d.mask((torch.int64, torch.bool)), d.choice(MODES), Config(d)),
    "compute_gpg_outcome_advantage": lambda d: (d.tensor(), d.mask(), d.labels(), 1e-6, d.choice([1.0, 3.0])),
    "compute_grpo_passk_outcome_advantage": passk_case,
    "compute_gdpo_outcome_advantage": gdpo_case,
    "compute_optimal_token_baseline_advantage": token_case,
    "compute_multi_turn_optimal_token_baseline_advantage": token_case,
    **{f"compute_policy_loss_{name}": loss_case for name in SIMPLE},
    **{f"compute_policy_loss_{name}": cov_case for name in ("clip_cov", "kl_cov")},
    "compute_policy_loss_dro": lambda d: loss_case(d, dro_beta=d.number(0.01, 2.0)),
    "compute_policy_loss_bypass_mode": bypass_case,
    "compute_rollout_correction_and_rejection_mask": correction_case,
    "compute_rollout_correction_weights": lambda d: (*ratio(d), d.choice(LEVELS[1:]), d.choice(BANDS[:-1]), d.choice([True, False])),
    "compute_rollout_rejection_mask": rejection_case,
    "compute_offpolicy_metrics": gap,
    "calculate_debug_metrics": debug_case,
    "compute_value_loss": lambda d: (
        d.tensor(), d.tensor(), d.tensor(), d.mask((torch.int64, torch.bool)), d.number(0.05, 1), d.choice(MODES), *counts(d).values()
    ),
}  # fmt: skip
