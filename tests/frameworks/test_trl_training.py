# SPDX-License-Identifier: Apache-2.0
"""TRL's real GRPOTrainer on a tiny model: in shadow mode, and switched on."""

import sys
from pathlib import Path

import pytest
import torch

from rlkern import integrations
from rlkern.integrations.trl import GRPOLoss

trl = pytest.importorskip("trl")
sys.path.insert(0, str(Path(__file__).parent))
import tiny_lm  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import TrainerCallback  # noqa: E402


def rewarded(prompts, completions, **unused):
    return [tiny_lm.reward(*map(int, p.rstrip("=").split("+")), c) for p, c in zip(prompts, completions, strict=True)]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder, tok = tmp_path_factory.mktemp("lm"), tiny_lm.tokenizer()
    tiny_lm.warmed(tiny_lm.model(), tok).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


class Losses(TrainerCallback):
    def __init__(self, name):
        self.seen, self.name = [], name

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.name in logs:
            self.seen.append(dict(logs))


def train(start, tmp_path, steps, seed=0, cls=None, config=trl.GRPOConfig, steps_with="reward", **options):
    """The logs of a run: of the steps that generate, or of all of them, which have a "loss"."""
    given = {
        "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 128, "num_generations": 8, "max_completion_length": 3,
        "max_steps": steps, "learning_rate": 3e-4, "lr_scheduler_type": "constant", "num_iterations": 2, "use_cpu": True, "report_to": [],
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "bf16": False, "seed": seed,
    }  # fmt: skip
    made = config(**given | options)
    prompts = Dataset.from_list([{"prompt": f"{a}+{b}="} for a, b in tiny_lm.sums(512, seed)])
    heard = Losses(steps_with)
    trainer = (cls or trl.GRPOTrainer)(
        model=str(start), reward_funcs=rewarded, args=made, train_dataset=prompts, processing_class=tiny_lm.tokenizer(), callbacks=[heard]
    )
    trainer.train()
    return heard.seen


def same_logs(a, b):
    own, other = ({k: v for k, v in x.items() if "time" not in k and "speed" not in k} for x in (a, b))
    assert own == other


@pytest.mark.parametrize("kind", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_trl_shadow(start, tmp_path, kind):
    """Per-step loss and gradient inside the budget over 100 steps."""
    own = train(start, tmp_path, 4, loss_type=kind, beta=0.005)
    with integrations.patched("trl", "shadow"):
        logs = train(start, tmp_path, 100, loss_type=kind, beta=0.005)
        worst = trl.GRPOTrainer._compute_loss.__rlkern__.worst
        assert worst.calls >= 100
        assert worst.left == 0
        assert worst.share <= 1, worst.line()
    for a, b in zip(own, logs, strict=False):
        same_logs(a, b)


OPTIONS = {
    "gspo": {"importance_sampling_level": "sequence", "epsilon": 0.01, "beta": 0.01, "use_bias_correction_kl": True},
    "bias correction": {"loss_type": "dapo", "beta": 0.01, "use_bias_correction_kl": True},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.05, "beta": 0.01},
    "cispo of rows": {"loss_type": "cispo", "epsilon_high": 1.05, "importance_sampling_level": "sequence"},
    "sapo": {"loss_type": "sapo"},
    "sapo of rows": {"loss_type": "sapo", "importance_sampling_level": "sequence"},
    "vespo": {"loss_type": "vespo", "beta": 0.01, "off_policy_mask_threshold": 0.01},
    "luspo of rows": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "delta": {"delta": 1.3},
    "off-policy mask": {"off_policy_mask_threshold": 0.01, "beta": 0.01},
    "high entropy": {"top_entropy_quantile": 0.5, "entropy_coef": 0.01},
}


def compared(start, tmp_path, method, **options):
    """Value and gradients of ten steps inside the budget; switched on, TRL's logs at the first steps."""
    options["steps_with"] = "loss"
    own = train(start, tmp_path, 10, **options)
    with integrations.patched("trl", "shadow"):
        logs = train(start, tmp_path, 10, **options)
        worst = method().__rlkern__.worst
        assert (worst.calls, worst.left) == (10, 0)
        assert worst.share <= 1, worst.line()
    for a, b in zip(own, logs, strict=True):
        same_logs(a, b)
    with integrations.patched("trl"):
        ours = train(start, tmp_path, 4, **options)
        assert not method().__rlkern__.said
    for a, b in zip(own[:4], ours, strict=True):  # the second step of a batch has ratios that are not 1
        assert a.keys() == b.keys()
        for key in a:
            if "time" not in key and "speed" not in key:
                assert float(b[key]) == pytest.approx(float(a[key]), rel=2e-3, abs=1e-5), key


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_trl_options(start, tmp_path, options):
    compared(start, tmp_path, lambda: trl.GRPOTrainer._compute_loss, **options)


def test_trl_rloo(start, tmp_path):
    compared(start, tmp_path, lambda: trl.RLOOTrainer._compute_loss, cls=trl.RLOOTrainer, config=trl.RLOOConfig, beta=0.01)


def test_trl_adaptive_entropy_stays(start, tmp_path):
    """Shadow mode does not move TRL's controller."""
    options = {"use_adaptive_entropy": True, "entropy_coef": 0.01, "entropy_target": 5.0, "entropy_coef_delta": 0.001}
    own = train(start, tmp_path, 3, steps_with="loss", **options)
    with integrations.patched("trl", "shadow"):
        logs = train(start, tmp_path, 3, steps_with="loss", **options)
        worst = trl.GRPOTrainer._compute_loss.__rlkern__.worst
        assert (worst.calls, worst.left) == (0, 3)
    for a, b in zip(own, logs, strict=True):
        same_logs(a, b)


def test_trl_on(start, tmp_path):
    """The first step equal, the final reward within the spread of five seeds without us."""
    spread = [sum(x["reward"] for x in train(start, tmp_path, 100, seed)[-10:]) / 10 for seed in range(5)]
    own = train(start, tmp_path, 1)[0]
    with integrations.patched("trl"):
        assert integrations.status()[0].state == "on"
        logs = train(start, tmp_path, 100)
    for key in ("loss", "reward", "kl", "entropy", "clip_ratio/region_mean", "grad_norm"):
        if key in own:
            assert logs[0][key] == pytest.approx(own[key], rel=1e-4, abs=1e-6), key
    final = sum(x["reward"] for x in logs[-10:]) / 10
    assert final > logs[0]["reward"] + 0.05
    margin = max(spread) - min(spread)
    assert min(spread) - margin <= final <= max(spread) + margin, (spread, final)


def test_trl_mixin_and_uncovered_options(start, tmp_path, caplog):
    class Trainer(GRPOLoss, trl.GRPOTrainer):
        pass

    own = train(start, tmp_path, 1)[0]
    ours = train(start, tmp_path, 1, cls=Trainer)[0]
    assert ours["loss"] == pytest.approx(own["loss"], rel=1e-4, abs=1e-6)
    assert not caplog.records or not any("TRL's own" in r.message for r in caplog.records)
    train(start, tmp_path, 2, cls=Trainer, use_adaptive_entropy=True, entropy_coef=0.01, entropy_target=5.0)
    said = [r for r in caplog.records if "TRL's own" in r.message]
    assert len(said) == 1
    assert "use_adaptive_entropy" in said[0].message


def test_trl_gradients_agree(start, tmp_path):
    """Another loss type than the shadow runs, with KL that is not corrected."""
    with integrations.patched("trl", "shadow"):
        train(start, tmp_path, 6, loss_type="luspo", beta=0.1, use_bias_correction_kl=False)
        assert trl.GRPOTrainer._compute_loss.__rlkern__.worst.share <= 1
    assert torch.is_grad_enabled()
