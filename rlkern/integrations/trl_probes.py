# SPDX-License-Identifier: Apache-2.0
"""What rlkern covers of TRL's losses, and the calls that show whether a version computes it so: a trainer of stubs."""

from __future__ import annotations

import collections
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlkern.integrations.site import Call

LOGPS = "_get_per_token_logps_and_entropies"
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
VARIANTS = dict.fromkeys(CLIPPED, "ppo") | {"cispo": "cispo", "sapo": "sapo", "vespo": "vespo"}  # of policy_loss, by loss type
METHODS = ("get_off_policy_mask", "get_gamma_weights")  # what ours does in their place
_OPTIONS: list[dict[str, Any]] = [
    *({"loss_type": kind, "importance_sampling_level": level, "beta": beta}
      for kind in VARIANTS for level, beta in (("token", 0.0), ("sequence", 0.1))),
    {"loss_type": "dapo", "beta": 0.1, "args.use_bias_correction_kl": True},
    {"importance_sampling_level": "sequence", "beta": 0.1, "args.use_bias_correction_kl": True, "loss_type": "bnpo"},
    {"args.delta": 1.5}, {"off_policy_mask_threshold": 0.05}, {"top_entropy_quantile": 0.5}, {"use_vllm": True},
    {"loss_type": "vespo", "off_policy_mask_threshold": 0.05, "top_entropy_quantile": 0.5}, {"loss_type": "sapo", "use_vllm": True},
    {"_entropy_bonus_enabled": True, "top_entropy_quantile": 0.5}, {"loss_type": "cispo", "_entropy_bonus_enabled": True},
    {"aux_loss_enabled": True},
]  # fmt: skip


def stub(methods: Any, logps: tuple[Any, ...], **options: Any) -> Any:
    """What the two methods read of their trainer, of one process; options of its arguments as "args.name"."""
    args = {
        "delta": None, "use_bias_correction_kl": False, "steps_per_generation": 4,
        "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05,
        "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0,
    } | {name.removeprefix("args."): x for name, x in options.items() if name.startswith("args.")}  # fmt: skip
    given = {
        "loss_type": "grpo", "importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.3, "beta": 0.0, "use_vllm": False,
        "vllm_importance_sampling_correction": True, "off_policy_mask_threshold": None, "top_entropy_quantile": 1.0,
        "_entropy_bonus_enabled": False, "use_adaptive_entropy": False, "entropy_coef": 0.01, "aux_loss_enabled": False,
        "router_aux_loss_coef": 0.1, "max_completion_length": 16, "current_gradient_accumulation_steps": 2,
    } | {name: x for name, x in options.items() if not name.startswith("args.")}  # fmt: skip
    made = SimpleNamespace(
        **given, args=SimpleNamespace(**args), model=SimpleNamespace(training=True),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        accelerator=SimpleNamespace(
            num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x.reshape(-1, *x.shape[1:]), sync_gradients=True,
            gather_for_metrics=lambda x: x, pad_across_processes=lambda x, dim, pad_index: x,
        ),
    )  # fmt: skip
    for name in METHODS:
        setattr(made, name, getattr(methods, name, None))
    if hasattr(methods, "get_high_entropy_mask"):
        made.get_high_entropy_mask = methods.get_high_entropy_mask.__get__(made)
    setattr(made, LOGPS, lambda *a, **k: (*logps[:2], logps[2] if made.aux_loss_enabled else None))
    return made


def batch() -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """Four rows, one of them masked whole."""
    g = torch.Generator().manual_seed(0)
    lp, old, ref, ratio = torch.randn(4, 4, 7, generator=g).mul(0.3).sub(1).unbind(0)
    mask = (torch.rand(4, 7, generator=g) < 0.7).long()
    mask[1] = 0
    inputs = {
        "prompt_ids": torch.ones(4, 2, dtype=torch.long), "prompt_mask": torch.ones(4, 2, dtype=torch.long), "completion_mask": mask,
        "completion_ids": torch.ones(4, 7, dtype=torch.long), "advantages": torch.tensor([1.0, 2.0, -1.0, 0.5]), "old_per_token_logps": old,
        "ref_per_token_logps": ref, "num_items_inbatch": torch.tensor(31), "old_logps": (old * mask).sum(1),
    }  # fmt: skip
    return inputs | {"importance_sampling_ratio": ratio.abs()}, (lp, old.abs(), torch.tensor(0.7))


def probes(original: Any) -> list[Call]:
    """Each option that is covered, by TRL's own methods."""
    inputs, logps = batch()
    own, plain = original.__globals__["GRPOTrainer"], {k: x for k, x in inputs.items() if k != "importance_sampling_ratio"}
    return [((stub(own, logps, **o), None, inputs if o.get("use_vllm") else plain), {}) for o in _OPTIONS]


def probes_rloo(original: Any) -> list[Call]:
    inputs, logps = batch()
    return [((stub(None, logps, aux_loss_enabled=aux), None, inputs), {}) for aux in (False, True)]
