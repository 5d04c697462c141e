# SPDX-License-Identifier: Apache-2.0
"""How often kernels compile while T changes at every step: twice, aligned and not, for each choice of options.

Triton's own binder makes the keys; a stand-in driver names the GPU; the hook sees each key that is not in the cache and keeps
Triton from compiling it. No GPU is needed.
"""

import os
import subprocess
import sys
import tempfile

import pytest

pytest.importorskip("triton")
START = """
import collections, math, torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from rlkern import kernels

class Machine:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

driver.set_active(Machine())
keys = collections.defaultdict(set)
triton.knobs.runtime.jit_cache_hook = lambda **seen: keys[seen["fn"].name.rpartition(".")[2]].add(seen["key"]) or True
SMALL, nan = (1, 2, 15, 16, 17, *range(1000, 1020), 4096), float("nan")

def launch(op, *args):
    kernels.launcher(op)(*args)

def every(step, lengths=SMALL, longest=5000):
    for T in lengths:
        step(T, lambda T: torch.empty(8, T))
        step(T, lambda T: torch.empty(8, longest)[:, :T])
        step(T, lambda T: torch.empty(8, longest + 1)[:, 1 : T + 1])
"""
END = "print(sorted((name, len(found)) for name, found in keys.items()))"

KL = """
def step(T, make):
    lp, ref, mask, out = (make(T) for _ in range(4))
    wide, score = [-20.0, 20.0, -10.0, 10.0], torch.empty(8)
    launch("_kl_penalty_fwd", lp, ref, None, "k3", wide, math.inf, out)
    launch("_kl_penalty_bwd", out, lp, ref, None, "k3", wide, math.inf, [True, False], torch.empty_like(lp), None)
    launch("_shape_rewards_fwd", lp, None, lp, ref, mask, None, T / 1000, "k3", wide, [-1.0, 1.0], out)
    launch("_shape_rewards_fwd", None, score, lp, ref, mask, None, T / 1000, "k3", wide, [-1.0, 1.0], out)
    launch("_shape_rewards_bwd", out, score, mask, None, [-1.0, 1.0], torch.empty(8))

every(step)
"""
# The merges of 8 rows and of 20: what a program leaves, and what merging programs do.
LOSS = """
def step(T, make):
    x = make(T)
    wide = torch.empty(11, dtype=torch.float64)
    rest = ("seq-mean-token-mean", [1.0, nan, nan, nan])
    results, grad = (x.new_empty(()), wide[:9], wide[9:]), torch.empty_like(x)
    policy = (x, x, None, x[:, 0], x, None, None, x, None, None, None, [0.2, 0.2, 3.0, 20.0], *rest, "k3", [-20.0, 20.0, -10.0, 10.0])
    launch("_policy_loss_fwd", *policy, [0.1, 0.0], x.dtype, [], *results, grad, None)
    launch("_value_loss_fwd", x, x, x, x, None, None, 0.5, math.inf, *rest, x.dtype, [], results[0], wide[:6], wide[6:7], grad)
    launch("_scale_fwd", x, results[0], x, grad)

every(step)
step(32, lambda T: torch.empty(20, T))
"""
SCAN = """
def step(T, make):
    r, v, mask, a, b = (make(T) for _ in range(5))
    row, wide, white, all_three = torch.empty(8), [0.0] * 4, [True, False, True, True, True], [True] * 3
    launch("_gae_fwd", r, v, mask, None, None, None, None, None, "skip", 0.9, T / 1000, 0.0, "none", wide, None, 0.0, a, b)
    launch("_gae_bwd", a, b, mask, None, None, "skip", 0.9, T / 1000, all_three, r, v, row)
    launch("_discounted_returns_fwd", r, mask, row, None, None, None, "skip", 0.9, 0.0, "none", wide, white, 1e-8, a, b)
    launch("_discounted_returns_bwd", a, mask, None, "skip", 0.9, [True] * 2, r, row)
    launch("_affine_scan_fwd", v, None, r, row, None, 0.0, True, a)
    launch("_affine_scan_bwd", a, v, None, b, row, None, 0.0, True, all_three, r, mask, row)

every(step, (1, 2, 15, 16, 17, *range(1000, 1010), 4096, 9000, 9008, 131072), 131072)  # the last three are cut into parts
"""
WHITEN = """
def step(T, make):
    v, mask, out = (make(T) for _ in range(3))
    flags, one, rows = [True, False, True, True, True], torch.empty(3, dtype=torch.float64), torch.empty(8, 3, dtype=torch.float64)
    launch("_masked_sum_fwd", v, mask, None, False, False, False, torch.empty(()), None)
    launch("_masked_sum_fwd", v, mask, None, True, False, False, torch.empty(8), None)
    launch("_masked_sum_bwd", torch.empty(()), v, mask, None, None, False, False, out)
    launch("_masked_sum_bwd", torch.empty(8), v, mask, None, None, True, False, out)
    launch("_masked_whiten_fwd", v, mask, None, flags, 1e-8, True, out, one)
    launch("_masked_whiten_bwd", v, v, mask, None, one, flags, 1e-8, out)
    launch("_masked_normalize_fwd", v, mask, None, flags, 1e-8, True, out, rows)
    launch("_masked_normalize_bwd", v, v, mask, None, rows, flags, 1e-8, out)
    launch("_whiten_apply_fwd", v, mask, None, rows, flags, 1e-8, True, out)
    index, options = (torch.arange(8), torch.arange(8), torch.tensor([0, 3, 8])), ("mean", True, 1e-6, "raw")
    launch("_group_advantage_fwd", v, mask, *index, None, *options, flags, 1e-8, None, None, 0.0, out)

every(step)
"""
GROUP = """
def step(T, make):
    r, mask, old, out = (make(T) for _ in range(4))
    index, scores = (torch.arange(8), torch.arange(8), torch.tensor([0, 3, 8])), torch.empty(8, 2)
    for baseline, parts in (("second_best", (None, None, 0.0)), ("mean", (None, None, T / 1000)), ("mean", (scores, scores[0], 0.0))):
        launch("_group_advantage_fwd", r, mask, *index, None, baseline, True, T / 1000, "raw", None, 1e-8, *parts, out)
    for by_token in (False, True):
        launch("_optimal_token_baseline_fwd", r, mask, old, old, None, *index, None, by_token, True, T / 1000, out, torch.empty_like(r))

every(step)
"""
TWICE = {
    "kl": (KL, ["kl_penalty_bwd", "kl_penalty_fwd", "placed_rewards_fwd", "shape_rewards_bwd", "shape_rewards_fwd"]),
    "loss": (
        LOSS,
        ["count_mask", "local_counts", "policy_loss_fwd", "policy_results", "scale_fwd", "value_loss_fwd", "value_results"],
    ),
    "scan": (
        SCAN,
        [f"{op}_{way}" for op in ("affine_scan", "discounted_returns") for way in ("fwd", "local", "bwd", "bwd_local")]
        + ["gae_fwd", "gae_local", "gae_bwd", "whiten"],
    ),
    "whiten": (
        WHITEN,
        [f"masked_{name}" for name in ("normalize_fwd", "reduce_bwd", "reduce_rows_bwd", "reduce_rows_fwd", "sum_parts")]
        + [f"whiten_{name}" for name in ("apply_rows_fwd", "bwd", "rows_bwd", "sums")]
        + ["group_advantage_fwd", "group_scores"],
    ),
    "group": (
        GROUP,
        [
            *("group_advantage_fwd", "group_scores", "path_variance", "affine_scan_fwd", "discounted_returns_fwd", "count_mask"),
            *("pack_tokens", "unpack_tokens", "group_normalize_fwd"),  # the last: of row sums, and of component scores
        ],
    ),
}
# Kernels of no tokens, and those that a step calls with more than one choice of options.
OTHERWISE = {
    "group": {"group_lead": 1, "group_weigh": 1, "group_stretch": 1, "group_merge": 1}
    | {"token_baseline": 4},  # of rows, and of their valid tokens
    "kl": {},
    "loss": {"merge_rows": 3},  # of the mask's counts, of a policy loss and of a value loss
    "scan": {"carries": 4, "gae_carries": 1, "merge": 1},  # carries: two directions, cuts or none
    "whiten": {"group_merge": 1, "group_normalize_fwd": 1, "masked_reduce_merge": 1, "whiten_factors": 1, "whiten_scale": 1}
    | {"masked_moments_parts": 3, "whiten_apply_fwd": 3},  # of tokens, and of rows, in float64
}


def counts(code):
    """Compiled variants by kernel, in a fresh interpreter in which Triton compiles."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", START + code + END]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False, cwd=tempfile.gettempdir())
    assert done.returncode == 0, done.stderr
    return {name.removesuffix("_kernel"): n for name, n in eval(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize("family", TWICE)
def test_kernels_compile_at_most_twice_while_T_changes(family):
    code, names = TWICE[family]
    assert counts(code) == dict.fromkeys(names, 2) | OTHERWISE[family]


def test_kernels_compiles_are_counted():
    """The count sees it where a kernel is specialised on T."""
    code = """
from rlkern.kernels import kl
plain = triton.jit(kl.kl_penalty_fwd_kernel.fn)
for T in (1, 16, 17):
    numbers = (T, T, T, T, T, 1, -20.0, 20.0, -10.0, 10.0, math.inf)
    lp, ref, out = (torch.empty(8, T) for _ in range(3))
    plain[(1,)](lp, ref, None, out, *numbers, "k3", True, 0, (1, 1, 1, 1), False, 1024)
"""
    assert counts(code) == {"kl_penalty_fwd": 3}
