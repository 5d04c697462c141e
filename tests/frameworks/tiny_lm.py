# SPDX-License-Identifier: Apache-2.0
"""A language model of a hundred thousand weights that adds digits, made here: no download."""

import random

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", *"0123456789+="]
PAD, BOS, EOS = range(3)


def tokenizer():
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def model(seed=0):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=64, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, tie_word_embeddings=False,
    )  # fmt: skip
    made = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    made.generation_config.pad_token_id, made.generation_config.eos_token_id = PAD, EOS
    return made


def sums(count, seed=0):
    draw = random.Random(seed)
    return [(draw.randint(0, 9), draw.randint(0, 9)) for _ in range(count)]


def reward(a, b, text):
    """1 for the sum, an eighth for another number, 0 for none: means of eight are exact."""
    text = "".join(text.replace("<eos>", "").replace("<pad>", "").split())
    return 1.0 if text == str(a + b) else 0.125 if text.isdigit() else 0.0


def encoded(texts, tok):
    rows = [tok(text, add_special_tokens=False)["input_ids"] for text in texts]
    width = max(map(len, rows))
    return torch.tensor([[PAD] * (width - len(row)) + row for row in rows])


def warmed(made, tok, steps=200, seed=0):
    """Taught a little, a third of it wrong: rewards then differ within a prompt."""
    draw, adam = random.Random(seed), torch.optim.AdamW(made.parameters(), lr=3e-3)
    for _ in range(steps):
        texts = [f"{a}+{b}={a + b if draw.random() < 0.7 else draw.randint(0, 18)}" for a, b in sums(64, draw.random())]
        rows = [[*tok(text, add_special_tokens=False)["input_ids"], EOS] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
        labels = torch.where(torch.arange(width) < 4, -100, ids.masked_fill(ids == PAD, -100))
        loss = made(input_ids=ids, attention_mask=(ids != PAD).long(), labels=labels).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
    return made
