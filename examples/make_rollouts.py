# SPDX-License-Identifier: Apache-2.0
"""Train a tiny transformer on reasoning-gym tasks and write its last rollouts as one batch file.

    pip install rlkern[examples]
    python examples/make_rollouts.py --out rollouts.safetensors

The tasks, their answers and their scores come from reasoning-gym. A character-level decoder learns worked solutions by
teacher forcing, improves by a few policy-gradient steps, samples groups of responses and is updated on them, so that
every field of the file is what a trainer holds in the middle of a step. The policy may call two tools:
``calc(7-9)``, answered by ``[-2]``, and ``submit(4)``, answered by ``[ok]``, which ends the episode; the tokens of an
answer come from the environment, and their mask is 0.
"""

import argparse
import copy
import random
import re
import uuid
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import reasoning_gym
import torch
from tiny_policy import Episode, Policy, Tokenizer, calc, generate, pad
from torch import Tensor, nn
from torch.nn import functional as F

from rlkern.data import RolloutBatch, save_batch

TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 7, "min_digits": 1, "max_digits": 2},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 40},
    "spell_backward": {"min_word_len": 3, "max_word_len": 8},
}
MIX = ("chain_sum", "gcd", "chain_sum", "spell_backward")
# Steps, not seconds, decide when training ends: a seed must give one file however fast the machine is.
WARMUP_PER_MINUTE, RL_PER_MINUTE = 650, 9
TRAINING_ENTRIES, ENTRIES = 3000, 4000


def demonstrate(task: str, entry: dict[str, Any], rng: random.Random) -> list[tuple[str, int]]:
    """A worked solution as (text, 1 for the policy's or 0 for the environment's)."""
    numbers = re.findall(r"\d+|[-+]", entry["question"])
    steps: list[tuple[str, str]] = []  # what to compute, and what is left to compute after it
    if task == "chain_sum":
        total = int(numbers[0])
        for at in range(1, len(numbers), 2):
            steps.append((f"{total}{numbers[at]}{numbers[at + 1]}", "".join(numbers[at + 2 :])))
            total += int(numbers[at] + numbers[at + 1])
    elif task == "gcd":
        a, b = int(numbers[0]), int(numbers[1])
        while b:
            steps.append((f"{a}%{b}", ""))
            a, b = b, a % b
    out: list[tuple[str, int]] = []
    habit = rng.choice((0.2, 0.6, 0.95))
    for step, rest in steps:
        if rng.random() < habit:
            out += [(f"calc({step})", 1), (calc(step), 0), (f"{rest};", 1)]
        else:
            out += [(f"{step}={calc(step)[1:-1]}{rest};", 1)]
    if rng.random() < 0.25:
        return [*out, (f"submit({entry['answer']})", 1), ("[ok]", 0)]
    return [*out, (f"#{entry['answer']}<eos>", 1)]


class Lesson:
    """The tasks, the policy and its optimizer; every random choice comes from the seed."""

    def __init__(self, seed: int, temperature: float, limit: int) -> None:
        torch.manual_seed(seed)
        self.rng, self.dice = random.Random(seed), torch.Generator().manual_seed(seed)
        self.seed, self.temperature, self.limit = seed, temperature, limit
        self.data = {n: reasoning_gym.create_dataset(n, size=ENTRIES, seed=seed + 1, **c) for n, c in TASKS.items()}
        self.tokenizer = Tokenizer([[d[i]["question"] for i in range(200)] for d in self.data.values()])
        self.policy = Policy(len(self.tokenizer.pieces))
        heads = [p for n, p in self.policy.named_parameters() if n.startswith("value.")]
        trunk = [p for n, p in self.policy.named_parameters() if not n.startswith("value.")]
        self.optimizer = torch.optim.AdamW([{"params": trunk, "lr": 3e-3}, {"params": heads, "lr": 3e-3}])

    def draw(self, turn: int, low: int, high: int) -> tuple[str, dict[str, Any]]:
        task = MIX[turn % len(MIX)]
        return task, self.data[task][self.rng.randrange(low, high)]

    def warm_up(self, steps: int, parts: int = 4, size: int = 8) -> None:
        """Teacher forcing on worked solutions, the rate falling to a tenth."""
        demos = []
        for _ in range(steps * parts * size):
            task, entry = self.draw(self.rng.randrange(len(MIX)), 0, TRAINING_ENTRIES)
            row = self.tokenizer.encode(entry["question"])
            own = [0] * len(row)
            for text, spoken in demonstrate(task, entry, self.rng):
                tokens = self.tokenizer.encode(text)
                row, own = row + tokens, own + [spoken] * len(tokens)
            demos.append((row, own))
        # A part holds rows of one length, for speed; a step takes several, since one length is often one task.
        demos.sort(key=lambda demo: len(demo[0]))
        order = self.rng.sample(range(steps * parts), steps * parts)
        for step in range(steps):
            self.optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * (1 - 0.9 * step / steps)
            losses = []
            for at in order[step * parts : (step + 1) * parts]:
                rows = demos[at * size : (at + 1) * size]
                ids, mask = pad([row for row, _ in rows]), pad([own for _, own in rows])[:, 1:] > 0
                logits = self.policy.head(self.policy(ids[:, :-1], torch.arange(ids.shape[1] - 1)[None]))
                losses.append(F.cross_entropy(logits[mask], ids[:, 1:][mask]) / parts)
            self.descend(losses)
            if step % 200 == 0 or step == steps - 1:
                print(f"warm-up {step:5d}  loss {sum(loss.item() for loss in losses):.3f}", flush=True)

    def descend(self, losses: list[Tensor]) -> None:
        self.optimizer.zero_grad()
        torch.autograd.backward(losses)
        nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()

    def sample(self, entries: Sequence[tuple[str, dict[str, Any]]], each: int, greedy: bool = False) -> list[Episode]:
        episodes = [
            Episode(self.tokenizer, self.data[task].score_answer, task, entry, self.tokenizer.encode(entry["question"]))
            for task, entry in entries
            for _ in range(each)
        ]
        return generate(self.policy, episodes, self.limit, self.temperature, None if greedy else self.dice)

    def replay(self, episodes: Sequence[Episode], policy: Policy | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability, entropy and value at every response token in float32; 0 on padding."""
        policy = policy or self.policy
        ids, response = pad([e.prompt + e.ids for e in episodes]), pad([e.ids for e in episodes])
        hidden = policy(ids[:, :-1], torch.arange(ids.shape[1] - 1)[None])
        starts = torch.tensor([len(e.prompt) - 1 for e in episodes])
        place = (starts[:, None] + torch.arange(response.shape[1])).clamp(max=hidden.shape[1] - 1)
        hidden = hidden.gather(1, place[..., None].expand(-1, -1, hidden.shape[-1]))
        log_probs = F.log_softmax(policy.head(hidden) / self.temperature, dim=-1)
        real = pad([[1] * len(e.ids) for e in episodes]) > 0
        log_prob = log_probs.gather(-1, response[..., None])[..., 0]
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        # The value head learns from a detached trunk: a bad critic must not bend the policy.
        value = policy.value(hidden.detach())[..., 0]
        return log_prob.where(real, 0.0), entropy.where(real, 0.0), value.where(real, 0.0)

    def update(self, episodes: Sequence[Episode], each: int, parts: int, epochs: int, rate: float) -> None:
        """PPO with group-relative advantages, and a value head fitted to the undiscounted returns."""
        self.optimizer.param_groups[0]["lr"] = rate
        with torch.no_grad():
            old = self.replay(episodes)[0]
        scores = torch.tensor([e.score for e in episodes])
        groups = scores.view(-1, each)
        advantages = ((groups - groups.mean(1, True)) / (groups.std(1, keepdim=True) + 1e-6)).view(-1, 1)
        for _ in range(epochs):
            order = self.rng.sample(range(len(episodes)), len(episodes))
            for part in np.array_split(np.array(order), parts):
                rows = [episodes[i] for i in part]
                mask = pad([e.mask for e in rows]) > 0
                log_prob, _, values = self.replay(rows)
                ratio = (log_prob - old[part, : mask.shape[1]]).exp()
                gain = torch.minimum(ratio * advantages[part], ratio.clamp(0.8, 1.2) * advantages[part])
                error = (values - scores[part][:, None]) ** 2
                self.descend([-gain[mask].mean(), 0.5 * error[mask].mean()])


def record(lesson: Lesson, reference: Policy, rows: list[Episode], uids: list[str], each: int) -> RolloutBatch:
    """Everything a trainer knows of these rows, before and after it takes its steps on them."""
    baselines = [e.score for e in lesson.sample([(e.task, e.entry) for e in rows[::each]], 1, greedy=True)]
    with torch.no_grad():
        (old, _, values), (ref, _, _) = lesson.replay(rows), lesson.replay(rows, reference)
    lesson.update(rows, each, parts=4, epochs=2, rate=1.2e-3)
    with torch.no_grad():
        log_prob, entropy, _ = lesson.replay(rows)
    rewards = torch.zeros_like(old)
    for i, row in enumerate(rows):
        rewards[i, len(row.ids) - 1] = row.score
    # Trainers balance tokens over their workers, so the rows of a group never arrive side by side.
    order = torch.tensor(lesson.rng.sample(range(len(rows)), len(rows)))
    packages = {name: version(name) for name in ("torch", "reasoning-gym")}
    return RolloutBatch(
        token_level_rewards=rewards[order],
        response_mask=(pad([e.mask for e in rows]) > 0)[order],
        uid=np.array([uids[i // each] for i in order.tolist()], dtype=object),
        old_log_prob=old[order],
        log_prob=log_prob[order],
        ref_log_prob=ref[order],
        rollout_log_prob=pad([e.log_prob for e in rows])[order],
        values=values[order],
        entropy=entropy[order],
        reward_baselines=torch.tensor(baselines).repeat_interleave(each)[order],
        meta={
            "source": "examples/make_rollouts.py",
            "seed": str(lesson.seed),
            "temperature": str(lesson.temperature),
            "tasks": " ".join(TASKS),
        }
        | packages,
    )


def summarize(batch: RolloutBatch, rows: list[Episode], each: int, before: float) -> None:
    scores = torch.tensor([e.score for e in rows])
    lengths = torch.tensor([float(len(e.ids)) for e in rows])
    mask = batch.response_mask > 0
    ratio = (cast(Tensor, batch.log_prob) - batch.old_log_prob)[mask].exp()
    drift = (cast(Tensor, batch.rollout_log_prob) - batch.old_log_prob)[mask].abs()
    entropy = cast(Tensor, batch.entropy)[mask].mean()
    clipped = ((ratio - 1).abs() > 0.2).float().mean()
    right = (scores.view(-1, each) >= 1).float().mean(1)
    gaps = [("".join(map(str, e.mask))).strip("0").count("0") > 0 for e in rows]
    tool_end = [e.mask[-1] == 0 for e in rows]
    quartiles = [int(x) for x in lengths.quantile(torch.linspace(0, 1, 5))]
    print(f"shape             {batch.shape[0]} x {batch.shape[1]}")
    print(f"accuracy          {before:.3f} after warm-up, {(scores >= 1).float().mean():.3f} in the batch")
    print(f"groups            {len(right)}: {int((right == 1).sum())} all right, {int((right == 0).sum())} all wrong")
    print(f"lengths           {quartiles} (min, quartiles, max); {sum(not e.done for e in rows)} cut at the limit")
    print(f"tool answers      in {np.mean(gaps):.3f} of rows, at the end of {np.mean(tool_end):.3f}")
    print(f"masked share      {1 - mask.sum() / lengths.sum():.3f} of response tokens")
    print(f"clip share        {clipped:.3f} beyond 0.2; ratio {ratio.min():.3g} to {ratio.max():.3g}")
    print(f"|rollout - old|   mean {drift.mean():.2g}, max {drift.max():.2g}")
    print(f"entropy           mean {entropy:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("rollouts.safetensors"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=30)
    parser.add_argument("--responses", type=int, default=8, help="per prompt")
    parser.add_argument("--minutes", type=float, default=2.0, help="training, counted in steps of about that length")
    parser.add_argument("--limit", type=int, default=128, help="longest response, in tokens")
    parser.add_argument("--temperature", type=float, default=1.0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the sums of another thread count would give another file
    lesson = Lesson(args.seed, args.temperature, args.limit)
    lesson.warm_up(max(1, round(args.minutes * WARMUP_PER_MINUTE)))
    entries = [lesson.draw(i, TRAINING_ENTRIES, ENTRIES) for i in range(args.prompts)]
    reference = copy.deepcopy(lesson.policy)
    before = float(np.mean([e.score >= 1 for e in lesson.sample(entries, args.responses)]))
    for step in range(round(args.minutes * RL_PER_MINUTE)):
        rows = lesson.sample([lesson.draw(i, 0, TRAINING_ENTRIES) for i in range(12)], 8)
        lesson.update(rows, 8, parts=2, epochs=2, rate=3e-4)
        print(f"policy gradient {step:3d}  reward {np.mean([e.score for e in rows]):.3f}", flush=True)
    rows = lesson.sample(entries, args.responses)
    uids = [str(uuid.UUID(int=lesson.rng.getrandbits(128), version=4)) for _ in entries]
    batch = record(lesson, reference, rows, uids, args.responses)
    save_batch(args.out, batch)
    summarize(batch, rows, args.responses, before)
    print(f"file              {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
