# SPDX-License-Identifier: Apache-2.0
"""Random options and batches through TRL's own loss methods and ours: values and gradients by the error budget, metrics by name."""

import math
import os
import random

import pytest
import torch

from rlkern import integrations
from rlkern.integrations.site import Uncovered, Worst
from rlkern.integrations.trl_probes import LOGPS, VARIANTS, stub

trl = pytest.importorskip("trl")
CASES = int(os.environ.get("RLKERN_TEST_CASES", "2000"))


def drawn(seed):
    """(trainer, inputs, (log-probs, entropies, router loss))."""
    draw, g = random.Random(seed), torch.Generator().manual_seed(seed)
    B, T = draw.randint(1, 6), draw.choice([1, 2, 5, 7, 16, 33])
    lp = -torch.randn(B, T, generator=g).abs()
    old, ref, sampling = (lp + draw.choice([0.01, 0.1, 0.5]) * torch.randn(B, T, generator=g) for _ in range(3))
    lengths = torch.randint(0, T + 1, (B, 1), generator=g)
    mask = (torch.arange(T) < lengths).long()
    if draw.random() < 0.3:
        mask[0, 0] = 1
    ids = torch.ones(B, T, dtype=torch.long)
    ratio = torch.randn(B, draw.choice([1, T]), generator=g).exp() * (torch.rand(B, 1, generator=g) < 0.8)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": mask,
        "advantages": torch.randn((B, T) if draw.random() < 0.2 else (B,), generator=g), "ref_per_token_logps": ref,
        "num_items_in_batch": torch.tensor(draw.randint(0, 50)), "importance_sampling_ratio": ratio,
    }  # fmt: skip
    if draw.random() < 0.8:
        inputs["old_per_token_logps"] = old
    if draw.random() < 0.5:
        inputs["sampling_per_token_logps"] = sampling
    if draw.random() < 0.3:
        inputs["tool_mask"] = (torch.rand(B, T, generator=g) < 0.7).int()
    kind = draw.choice(list(VARIANTS))
    if kind == "vespo":  # its weight is an exponential of their logs: moderate ones, as rows that all vanish have no digits
        inputs["importance_sampling_ratio"] = torch.where(ratio > 0, ratio, 1.0) ** 0.1
    if draw.random() < 0.5:
        del inputs["importance_sampling_ratio"]
    options = {
        "loss_type": kind, "importance_sampling_level": draw.choice(["token", "sequence"]), "beta": draw.choice([0.0, 0.05]),
        "args.use_bias_correction_kl": draw.random() < 0.5, "args.delta": draw.choice([None, None, 1.5]),
        "epsilon_low": draw.uniform(0.05, 0.4), "epsilon_high": draw.uniform(0.9, 2.0) if kind == "cispo" else draw.uniform(0.05, 0.4),
        "use_vllm": "importance_sampling_ratio" in inputs, "off_policy_mask_threshold": draw.choice([None, None, 0.05]),
        "top_entropy_quantile": draw.choice([1.0, 1.0, 0.5]), "_entropy_bonus_enabled": draw.random() < 0.2,
        "aux_loss_enabled": draw.random() < 0.2,
    }  # fmt: skip
    logps = (lp, torch.rand(B, T, generator=g) + 0.1, torch.tensor(0.7))
    trainer = stub(trl.GRPOTrainer, logps, **options)
    trainer.model.training = draw.random() < 0.8
    return trainer, inputs, logps if options["aux_loss_enabled"] else (*logps[:2], None)


def metrics(trainer, loss, inputs, logps):
    trainer._metrics.clear()
    setattr(trainer, LOGPS, lambda *a, **k: logps)
    loss(trainer, None, inputs)
    return {(mode, name): value for mode, found in trainer._metrics.items() for name, (value,) in found.items()}


def test_trl_differential():
    seen = 0
    integrations.patch("trl")
    site = trl.GRPOTrainer._compute_loss.__rlkern__
    for seed in range(CASES):
        trainer, inputs, logps = drawn(seed)
        site.worst = Worst()
        try:
            site.compare_losses(trainer, None, inputs, logps)
        except Uncovered:
            continue
        assert site.worst.share <= 1, (seed, site.worst.line())
        own, ours = metrics(trainer, site.original, inputs, logps), metrics(trainer, site.chosen, inputs, logps)
        assert own.keys() == ours.keys(), seed
        for name, value in own.items():
            same = math.isnan(value) and math.isnan(ours[name])
            assert same or ours[name] == pytest.approx(value, rel=1e-5, abs=1e-6), (seed, name)
        seen += 1
    assert seen > 0.9 * CASES
