# SPDX-License-Identifier: Apache-2.0
"""A small decoder with a value head, its tokenizer, and the loop in which it talks with two tools, in plain torch."""

import copy
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PAD, EOS = 0, 1


class Tokenizer:
    """One token per character; one per tool call and per word that every prompt of a task has."""

    def __init__(self, prompts: Sequence[Sequence[str]]) -> None:
        words: set[str] = set()
        for task in prompts:
            seen = Counter(word for text in task for word in set(re.findall(r"[A-Za-z]{2,}", text)))
            words |= {word for word, count in seen.items() if count > 0.9 * len(task)}
        chars = {char for task in prompts for text in task for char in text if not char.isspace()}
        chars |= set(string.digits + string.ascii_letters + string.punctuation)
        self.pieces = ["<pad>", "<eos>", "calc(", "submit(", *sorted(chars), *sorted(words)]
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}

    def encode(self, text: str) -> list[int]:
        out: list[int] = []
        for piece in re.findall(r"calc\(|submit\(|<eos>|[A-Za-z]+|\S", text):
            out += [self.ids[piece]] if piece in self.ids else [self.ids[char] for char in piece]
        return out


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos().to(x.dtype)[:, None], angle.sin().to(x.dtype)[:, None]
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, angle: Tensor, mask: Tensor | None, cache: Tensor | None, at: int) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, angle), rotate(k, angle)
        if cache is not None:
            cache[0, :, :, at : at + t], cache[1, :, :, at : at + t] = k, v
            k, v = cache[:, :, :, : at + t]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
        return x + cast(Tensor, self.down(F.gelu(self.up(self.norm2(x)))))


class Policy(nn.Module):
    """A decoder with rotary positions, a token head and a value head."""

    def __init__(self, vocab: int, width: int = 64, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(vocab, width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, vocab, bias=False)
        self.value = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, 1))
        nn.init.normal_(self.embed.weight, std=0.5)
        self.heads, self.side = heads, width // heads

    def forward(self, ids: Tensor, position: Tensor, mask: Tensor | None = None, caches: Sequence[Tensor] = (), at: int = 0) -> Tensor:
        rate = 1000.0 ** (-torch.arange(0, 1, 2 / self.side))
        x, angle = self.embed(ids), position[..., None] * rate
        for i, block in enumerate(self.blocks):
            x = block(x, angle, mask, caches[i] if caches else None, at)
        return cast(Tensor, self.norm(x))


def pad(rows: Sequence[Sequence[float]]) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def calc(expression: str) -> str:
    """The environment's answer to a call of the calculator."""
    found = re.fullmatch(r"(-?\d{1,4})([-+%])(-?\d{1,4})", expression)
    if found is None or (found[2] == "%" and int(found[3]) == 0):
        return "[err]"
    a, b = int(found[1]), int(found[3])
    return f"[{a + b if found[2] == '+' else a - b if found[2] == '-' else a % b}]"


@dataclass
class Episode:
    """One response while it grows: the policy's tokens and the environment's."""

    tokenizer: Tokenizer
    judge: Any
    task: str
    entry: dict[str, Any]
    prompt: list[int]
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    log_prob: list[float] = field(default_factory=list)
    queue: list[int] = field(default_factory=list)
    text: str = ""
    answer: str | None = None
    done: bool = False

    def step(self, token: int, log_prob: float) -> None:
        forced = bool(self.queue)
        token = self.queue.pop(0) if forced else token
        self.ids.append(token)
        self.mask.append(int(not forced))
        # The sampler drew none of the environment's tokens, so it has no probability for them.
        self.log_prob.append(0.0 if forced else log_prob)
        self.text += self.tokenizer.pieces[token]
        call = re.search(r"(calc|submit)\(([^()]*)\)$", self.text)
        if token == EOS:
            self.done, self.answer = True, self.text[: -len("<eos>")].rpartition("#")[2]
        elif forced:
            self.done = self.answer is not None and not self.queue
        elif call is not None:
            self.answer = call[2] if call[1] == "submit" else None
            self.queue = self.tokenizer.encode("[ok]" if call[1] == "submit" else calc(call[2]))

    @property
    def score(self) -> float:
        return float(self.judge(self.answer, self.entry)) if self.done and self.answer else 0.0


@torch.no_grad()
def generate(policy: Policy, episodes: list[Episode], limit: int, temperature: float, rng: torch.Generator | None) -> list[Episode]:
    """Grow all episodes in bfloat16 with a key-value cache; without a generator take the likeliest token."""
    sampler = copy.deepcopy(policy).to(torch.bfloat16)
    width, count = max(len(e.prompt) for e in episodes), len(episodes)
    lead = torch.tensor([width - len(e.prompt) for e in episodes])
    ids = torch.tensor([[PAD] * (width - len(e.prompt)) + e.prompt for e in episodes])
    caches = [torch.zeros(2, count, policy.heads, width + limit, policy.side, dtype=torch.bfloat16) for _ in policy.blocks]
    place = torch.arange(width + limit)
    keep = place >= lead[:, None]
    # Padding attends to itself: a row of scores without a single key would be NaN.
    mask = (keep[:, None, :width] & (place[:width, None] >= place[:width])) | torch.eye(width, dtype=torch.bool)
    hidden = sampler(ids, (place[:width] - lead[:, None]).clamp(min=0), mask[:, None], caches)
    for at in range(width, width + limit):
        log_probs = F.log_softmax(sampler.head(hidden[:, -1]).float() / temperature, dim=-1)
        pick = log_probs.argmax(-1) if rng is None else torch.multinomial(log_probs.exp(), 1, generator=rng)[:, 0]
        chosen = log_probs.gather(-1, pick[:, None])[:, 0].tolist()
        for episode, token, log_prob in zip(episodes, pick.tolist(), chosen, strict=True):
            if not episode.done:
                episode.step(token, log_prob)
        if all(e.done for e in episodes):
            break
        last = torch.tensor([[PAD] if e.done else e.ids[-1:] for e in episodes])
        hidden = sampler(last, (at - lead)[:, None], keep[:, None, None, : at + 1], caches, at)
    return episodes
