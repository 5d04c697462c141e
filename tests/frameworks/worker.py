# SPDX-License-Identifier: Apache-2.0
"""verl's real TrainingWorker, FSDP2, on the CPU: `python worker.py FOLDER off|on`. Prints losses, calls of ours, and the weights' sum."""

import json
import os
import sys
import types
from pathlib import Path

sys.modules["trl"] = None  # verl asks TRL for a class that it no longer has
os.environ |= {
    "VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda", "VERL_ENGINE_VENDOR": "nvidia", "RANK": "0", "WORLD_SIZE": "1",
    "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ.get("MASTER_PORT", "29511"),
}  # fmt: skip
sys.path.insert(0, str(Path(__file__).parent))
import tiny_lm  # noqa: E402
import torch  # noqa: E402
from verl.plugin.platform.platform_base import PlatformBase  # noqa: E402
from verl.plugin.platform.platform_manager import PlatformRegistry  # noqa: E402

FOLDER, MODE = sys.argv[1:3]
if MODE == "on":
    from rlkern import integrations

    integrations.patch("verl")


class Nothing(types.ModuleType):
    """torch.cpu, and 0 for what only an accelerator has."""

    def __getattr__(self, name):
        none = {"mem_get_info": (0, 0), "get_device_name": "cpu"}.get(name, 0)
        return getattr(torch.cpu, name, lambda *args, **kwargs: none)


# What the platform's interface asks for: values, read or called as the interface has them; nothing elsewhere.
VALUES = {
    "device_name": "cpu", "vendor_name": "none", "device_module": Nothing("torch_cpu"), "ray_resource_name": "CPU", "ray_noset_envvars": [],
    "communication_backend_name": "gloo", "visible_devices_envvar": "NO_DEVICES", "is_available": True, "current_device": "cpu",
    "device_count": 1,
}  # fmt: skip


def member(name):
    def get(self, *args, **kwargs):
        return VALUES.get(name)

    return property(get) if isinstance(getattr(PlatformBase, name), property) else get


names = {name: member(name) for name in PlatformBase.__abstractmethods__ | (VALUES.keys() & set(dir(PlatformBase)))}
PlatformRegistry.register(platform="cpu")(type("PlatformCPU", (PlatformBase,), names))
torch.distributed.init_process_group("gloo", rank=0, world_size=1)

from functools import partial  # noqa: E402

from tensordict import TensorDict  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.workers.config import ActorConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig  # noqa: E402
from verl.workers.engine_workers import TrainingWorker  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402


def nested(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def batch(step, tok):
    """Thirty-two sums, right or wrong, with the advantage of each."""
    pairs = tiny_lm.sums(32, step)
    g = torch.Generator().manual_seed(step)
    prompts = [torch.tensor(tok(f"{a}+{b}=", add_special_tokens=False)["input_ids"]) for a, b in pairs]
    answers = [str(a + b if i % 2 else (a + b + 1) % 19) for i, (a, b) in enumerate(pairs)]
    responses = [torch.tensor([*tok(text, add_special_tokens=False)["input_ids"], tiny_lm.EOS]) for text in answers]
    whole = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    old = [-torch.rand(len(r), generator=g) for r in responses]
    sign = [1.0 if i % 2 else -1.0 for i in range(len(pairs))]
    data = TensorDict(
        {
            "input_ids": nested(whole), "position_ids": nested([torch.arange(len(w)) for w in whole]), "prompts": nested(prompts),
            "responses": nested(responses), "response_mask": nested([torch.ones_like(r) for r in responses]),
            "loss_mask": nested([torch.ones_like(r) for r in responses]), "old_log_probs": nested(old),
            "ref_log_prob": nested([o - 0.1 for o in old]),
            "advantages": nested([torch.full((len(r),), s) for r, s in zip(responses, sign, strict=True)]),
        },
        batch_size=len(pairs),
    )  # fmt: skip
    tu.assign_non_tensor(
        data, temperature=1.0, use_remove_padding=False, calculate_entropy=True, use_dynamic_bsz=False, micro_batch_size_per_gpu=16,
        global_batch_size=len(pairs), global_token_num=[len(w) for w in whole], compute_loss=True, update_lr_scheduler=True,
        use_fused_kernels=False, max_token_len_per_gpu=4096,
    )  # fmt: skip
    return data


def main():
    torch.manual_seed(0)
    model = HFModelConfig(
        path=FOLDER, use_remove_padding=False, enable_gradient_checkpointing=False, load_tokenizer=False,
        override_config={"attn_implementation": "eager"},
    )  # fmt: skip
    engine = FSDPEngineConfig(
        strategy="fsdp2", param_offload=False, optimizer_offload=False, dtype="float32", use_torch_compile=False, model_dtype="fp32",
        mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
    )  # fmt: skip
    optimizer = FSDPOptimizerConfig(lr=1e-3, lr_warmup_steps=0, total_training_steps=100)
    config = TrainingWorkerConfig(model_type="language_model", model_config=model, engine_config=engine, optimizer_config=optimizer)
    worker = TrainingWorker(config)
    worker.reset()
    actor = ActorConfig(strategy="fsdp2", rollout_n=8, ppo_micro_batch_size_per_gpu=16, use_kl_loss=True, entropy_coeff=0.01)
    worker.set_loss_fn(partial(ppo_loss, config=actor))
    tok, losses = tiny_lm.tokenizer(), []
    for step in range(10):
        with worker.engine.train_mode():
            found = worker.train_batch(batch(step, tok))
        losses.append(tu.get(found, "metrics")["loss"])
    weights = sum(float(p.full_tensor().double().abs().sum()) for p in worker.engine.module.parameters())
    reached = []
    if MODE == "on":
        import verl.workers.utils.losses as bound

        reached = [name for name in ("agg_loss", "kl_penalty", "masked_sum") if hasattr(getattr(bound, name), "__rlkern__")]
        reached += ["vanilla"] * hasattr(bound.get_policy_loss_fn("vanilla"), "__rlkern__")
    print("RESULT", json.dumps([losses, weights, reached]))


if __name__ == "__main__":
    main()
