# SPDX-License-Identifier: Apache-2.0
"""The losses of TRL's drop-in, by a trainer of stubs: values, gradients and metrics as recorded; the real one: `make test-frameworks`."""

import json
import math
import pathlib

import pytest
import torch

pytest.importorskip("wrapt")
from rlkern.integrations.site import Uncovered
from rlkern.integrations.trl import GRPOLoss, RLOOLoss, compute_loss, compute_rloo_loss
from rlkern.integrations.trl_probes import METHODS, stub

FOLDER = pathlib.Path(__file__).parent / "golden"
GOLDEN = json.loads((FOLDER / "trl_1.16.0.json").read_text())
INPUTS = {k: torch.tensor(v) for k, v in json.loads((FOLDER / "verl_0.9.1.json").read_text())["inputs"].items() if k != "index"}
A = torch.tensor(GOLDEN["advantages"])
TRAINER = {
    "epsilon_high": 0.28, "epsilon_low": 0.2, "vllm_importance_sampling_correction": True, "max_completion_length": 10,
    "current_gradient_accumulation_steps": 4,
}  # fmt: skip


class Methods:
    """What the loss asks of its trainer: TRL's formulas, written here."""

    @staticmethod
    def get_off_policy_mask(*unused):
        raise AssertionError("ours is asked")

    @staticmethod
    def get_gamma_weights(
        advantages, log_ratio_per_token, mask, importance_sampling_ratio, k_pos=2.0, lambda_pos=3.0, k_neg=3.0, lambda_neg=2.0
    ):
        total = (log_ratio_per_token.clamp(-20, 20) * mask).sum(-1, keepdim=True)
        if importance_sampling_ratio is not None:
            total = total + importance_sampling_ratio.log().clamp(math.log(1e-8), 20).sum(-1, keepdim=True)
        total = total.clamp(math.log(1e-8), 20)
        k, lam = (torch.where(advantages >= 0, a, b) for a, b in ((k_pos, k_neg), (lambda_pos, lambda_neg)))
        return (lam + k * total - lam * total.exp()).exp()

    def get_high_entropy_mask(self, entropies, mask, threshold):
        return (entropies * mask >= torch.quantile(entropies[mask != 0], threshold)) & (mask != 0)


for _name in METHODS:
    getattr(Methods, _name).__module__ = "trl.trainer.grpo_trainer"


def inputs(**more):
    mask = INPUTS["mask"].long()
    ids = torch.ones_like(mask)
    return {
        "prompt_ids": ids[:, :2], "prompt_mask": ids[:, :2], "completion_ids": ids, "completion_mask": mask, "advantages": A,
        "old_per_token_logps": INPUTS["old_log_probs"], "ref_per_token_logps": INPUTS["ref_log_prob"],
        "num_items_in_batch": torch.tensor(60), "sampling_per_token_logps": INPUTS["old_log_probs"] - 0.05,
    } | more  # fmt: skip


def step(given, loss=compute_loss, entropies=None, aux=None, **options):
    """(loss, gradient, metrics)."""
    leaf = INPUTS["log_prob"].clone().requires_grad_()
    entropies = 0.5 * leaf.detach().abs() + 0.1 if entropies is None else entropies
    trainer = stub(Methods, (leaf, entropies, aux), **TRAINER | options)
    trainer.accelerator.num_processes = 2
    found = loss(trainer, None, given)
    found.backward()
    return found.detach(), leaf.grad, {k: x[0] for k, x in trainer._metrics["train"].items()}


def case(key):
    """(inputs, options of the trainer) of a recorded case."""
    if not key.startswith("{"):
        w = INPUTS["rollout_is_weights"]
        ratio = {} if "advantages" in key else {"importance_sampling_ratio": w[:, :1] if "sequence" in key else w}
        more = {"advantages": INPUTS["advantages"]} if "(B,T)" in key else {}
        return inputs(**ratio, **more), {"loss_type": key.partition(",")[0], "use_vllm": bool(ratio)}
    o = json.loads(key)
    names = {
        "level": "importance_sampling_level", "epsh": "epsilon_high", "opsm": "off_policy_mask_threshold", "q": "top_entropy_quantile",
        "delta": "args.delta", "bias": "args.use_bias_correction_kl",
    }  # fmt: skip
    given = inputs()
    if o.pop("olp", True) is False:
        del given["old_per_token_logps"]
    return given, {names.get(name, name): x for name, x in o.items()}


@pytest.mark.parametrize("key", GOLDEN["cases"])
def test_trl_loss_known_values(backend, key):
    golden, (given, options) = GOLDEN["cases"][key], case(key)
    loss, grad, metrics = step(given, **options)
    torch.testing.assert_close(loss, torch.tensor(golden["loss"]), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(grad, torch.tensor(golden["grad"]), rtol=2e-6, atol=1e-6)
    assert metrics.keys() == golden["metrics"].keys()
    for name, value in golden["metrics"].items():
        assert metrics[name] == pytest.approx(value, rel=3e-6, abs=1e-6, nan_ok=True), name


def test_trl_loss_entropy_bonus_and_router_loss():
    """Both beside the policy loss, divided by the accumulation; the bonus acts on the tokens that the entropy mask keeps."""
    plain, grad, metrics = step(inputs(), top_entropy_quantile=0.5)
    entropies = (0.5 * INPUTS["log_prob"].abs() + 0.1).requires_grad_()
    aux = torch.tensor(0.7)
    options = {"_entropy_bonus_enabled": True, "entropy_coef": 0.02, "aux_loss_enabled": True, "router_aux_loss_coef": 0.1}
    loss, same, more = step(inputs(), entropies=entropies, aux=aux, top_entropy_quantile=0.5, **options)
    kept = Methods().get_high_entropy_mask(entropies.detach(), INPUTS["mask"], 0.5)
    bonus = entropies.detach()[kept].mean()
    torch.testing.assert_close(loss, plain - 0.02 * bonus / 4 + 0.1 * 0.7 / 4)
    torch.testing.assert_close(same, grad)
    torch.testing.assert_close(entropies.grad, kept * (-0.02 / kept.sum() / 4))
    assert more["policy_loss"] == pytest.approx(4 * plain.item(), rel=1e-6)
    assert more["entropy_coef"] == 0.02
    assert more["aux_loss"] == pytest.approx(0.7)
    assert {k: more[k] for k in metrics} == metrics


def test_trl_loss_masks_leave_the_kl():
    """A row that the off-policy mask drops, and tokens of low entropy, still have their KL."""
    dropped, _, _ = step(inputs(advantages=-A.abs()), off_policy_mask_threshold=-1e9, beta=0.1)
    nothing, _, _ = step(inputs(advantages=0 * A), beta=0.1)
    torch.testing.assert_close(dropped, nothing)


def test_trl_loss_padding_nan():
    """NaN in padding reaches neither loss nor gradient nor metrics."""
    given, key = inputs(), '{"loss_type": "dapo", "beta": 0.05, "bias": true}'
    _, options = case(key)
    clean = step(given, **options)
    hidden = INPUTS["mask"] == 0
    dirty = given | {k: given[k].masked_fill(hidden, math.nan) for k in ("old_per_token_logps", "ref_per_token_logps")}
    found = step(dirty, **options)
    assert torch.equal(found[0], clean[0])
    assert torch.equal(found[1], clean[1])
    assert found[2] == clean[2]


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "other"}, {"importance_sampling_level": "other"}, {"args.delta": 1.1},
        {"_entropy_bonus_enabled": True, "use_adaptive_entropy": True},
        {"loss_type": "vespo", "importance_sampling_level": "sequence", "beta": 0.1, "args.use_bias_correction_kl": True},
    ],
    ids=str,
)  # fmt: skip
def test_trl_loss_leaves(options):
    with pytest.raises(Uncovered):
        step(inputs(), **options)


def test_trl_loss_leaves_overridden_methods():
    class Changed(Methods):
        @staticmethod
        def get_gamma_weights(*unused):
            return 1.0

    with pytest.raises(Uncovered, match="get_gamma_weights is overridden"):
        compute_loss(stub(Changed, ()), None, inputs())


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_trl_loss_metrics_of_one_token(level):
    """Where rows have one token, TRL's means are over all rows, those without a token too."""
    given = {k: x[:, :1] if x.dim() == 2 else x for k, x in inputs().items()}
    given["completion_mask"] = torch.tensor([[1], [0], [1], [1], [0], [1]])
    lp, old, ref = INPUTS["log_prob"][:, :1], given["old_per_token_logps"], given["ref_per_token_logps"]
    trainer = stub(Methods, (lp, 0.5 * lp.abs() + 0.1), **TRAINER, beta=0.1, importance_sampling_level=level)
    compute_loss(trainer, None, given)
    found = {k: x[0] for k, x in trainer._metrics["train"].items()}
    ratio = (lp - old).exp().squeeze(1)
    if level == "sequence":
        ratio = torch.where(given["completion_mask"].squeeze(1) != 0, ratio, 1.0)
    d, low, high = ref - lp, (ratio < 0.8) & (A < 0), (ratio > 1.28) & (A > 0)
    expected = {"entropy": (0.5 * lp.abs() + 0.1).mean(), "kl": (d.exp() - d - 1).mean(), "clip_ratio/low_mean": low.float().mean()}
    expected |= {"clip_ratio/high_mean": high.float().mean(), "clip_ratio/region_mean": (low | high).float().mean()}
    expected |= {"clip_ratio/low_min": low.float().min(), "clip_ratio/high_max": high.float().max()}
    assert found == {k: pytest.approx(float(x), rel=1e-5) for k, x in expected.items()}


# ---- RLOO ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("empty", [False, True], ids=["", "an empty row"])
def test_rloo_loss_matches_formula(backend, empty):
    mask = INPUTS["mask"].long().clone()
    if not empty:
        mask[:, 0] = 1
    old = (INPUTS["old_log_probs"] * mask).sum(1)
    given = inputs(old_logps=old, completion_mask=mask)
    loss, grad, metrics = step(given, compute_rloo_loss)

    leaf = INPUTS["log_prob"].double().requires_grad_()
    ratio = ((leaf * mask).sum(1) - old.double()).exp()
    exact = -torch.min(ratio * A, ratio.clamp(0.8, 1.28) * A).mean()
    exact.backward()
    torch.testing.assert_close(loss.double(), exact.detach(), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), leaf.grad, rtol=1e-5, atol=1e-6)
    low, high = (ratio < 0.8) & (A < 0), (ratio > 1.28) & (A > 0)
    entropy = (0.5 * INPUTS["log_prob"].abs() + 0.1)[mask != 0].mean().item()
    expected = {"entropy": entropy, "clip_ratio/low_mean": low.float().mean(), "clip_ratio/high_mean": high.float().mean()}
    expected |= {"clip_ratio/low_min": low.float().min(), "clip_ratio/high_max": high.float().max()}
    expected["clip_ratio/region_mean"] = (low | high).float().mean()
    assert metrics == {k: pytest.approx(float(x), rel=1e-6) for k, x in expected.items()}


# ---- the mixin ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mixin", [GRPOLoss, RLOOLoss])
def test_trl_mixin_falls_back(caplog, mixin):
    class Own:
        def _compute_loss(self, model, given):
            return "TRL's"

    class Trainer(mixin, Own):
        pass

    trainer = Trainer()  # has nothing that ours reads
    assert trainer._compute_loss(None, inputs(old_logps=A)) == "TRL's"
    assert trainer._compute_loss(None, inputs(old_logps=A)) == "TRL's"
    assert caplog.text.count("the loss is TRL's own") == 1
