# SPDX-License-Identifier: Apache-2.0
"""The ops of the speed table: rlkern's call, the bytes it must move, its peers, and the targets it is held to."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

import rlkern
from rlkern.bench import algorithms, peers_chunked, peers_compiled, peers_eager
from rlkern.bench.inputs import GAMMA, LAM, Inputs
from rlkern.bench.peers_eager import Call, Outputs
from rlkern.cli import losses, rollout
from rlkern.cli.against import Formulas

FRAMEWORK = "framework"


class Target(NamedTuple):
    """Times the floor at (256, 2048) and (1024, 8192), and times faster than the framework and the best rival."""

    middle: float | None
    large: float | None
    framework: float | None
    rival: float | None
    only: str = ""  # the rival that the last number is about; empty: the best one


@dataclass(frozen=True)
class Case:
    """`bytes` per element: each input once, each output once. `compared` says what of the outputs is compared: "mask" the
    tokens inside it (padding differs by design), "partition" which rows share a group, "" everything."""

    name: str
    title: str
    bytes: int
    moved: str
    ours: Callable[[Inputs], Any]
    target: Target
    compared: str = "mask"


def pair(result: Any) -> Outputs:
    return result[0], result[1]


def _out(x: Inputs, count: int = 1) -> Any:
    if x.out is None:
        return None
    return x.out[0] if count == 1 else x.out[:count]


def _loss_and_grad(x: Inputs) -> Outputs:
    found = rlkern.policy_loss_and_grad(x.old, x.new, x.advantages, x.mask, batch_num_tokens=x.tokens, out=_out(x))
    return found.loss, found.d_log_prob


def _loss_by_autograd(x: Inputs) -> Outputs:
    leaf = x.leaf
    leaf.grad = None
    loss = rlkern.policy_loss(x.old, leaf, x.advantages, x.mask, batch_num_tokens=x.tokens).loss
    loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
    return loss.detach(), leaf.grad  # type: ignore[return-value]


def _rollout_correction(x: Inputs) -> Outputs:
    found = rlkern.rollout_correction(x.new, x.old, x.mask, **rollout.CONFIG)
    return rollout.outputs(found.weights, found.metrics.as_dict())  # type: ignore[arg-type]


def _one(call: Callable[[Inputs], Tensor]) -> Call:
    return lambda x: (call(x),)


def _by_prompt(name: str) -> Call:
    """Labels included: the raw uuid strings go in."""
    return lambda x: (getattr(rlkern.advantages, name)(x.rewards, x.mask, x.uid, out=_out(x))[0],)


R, V, M, A = "rewards 4", "values 4", "mask 8", "advantages 4"
CASES = [
    Case(
        "gae_whiten",
        "GAE + whiten",
        24,
        f"{R}, {V}, {M}, {A}, returns 4",
        lambda x: pair(rlkern.advantages.gae(x.rewards, x.values, x.mask, GAMMA, LAM, out=_out(x, 2))),
        Target(2.2, 1.6, 100, 2.5),
    ),
    Case(
        "gae",
        "GAE",
        24,
        f"{R}, {V}, {M}, {A}, returns 4",
        lambda x: pair(rlkern.gae(x.rewards, x.values, x.mask, gamma=GAMMA, lam=LAM, out=_out(x, 2))),
        Target(1.8, 1.25, None, 2.5),
    ),
    Case(
        "discounted_returns",
        "discounted returns",
        16,
        f"{R}, {M}, returns 4",
        _one(lambda x: rlkern.discounted_returns(x.rewards, x.mask, gamma=GAMMA, out=_out(x))),
        Target(2.0, 1.3, None, 4),
    ),
    Case(
        "reinforce_plus_plus",
        "REINFORCE++",
        20,
        f"{R}, {M}, {A}, returns 4",
        lambda x: pair(rlkern.advantages.reinforce_plus_plus(x.rewards, x.mask, GAMMA, out=_out(x, 2))),
        Target(2.2, 1.6, 60, 2.5),
    ),
    Case(
        "masked_whiten",
        "masked_whiten",
        16,
        f"{V}, {M}, whitened 4",
        _one(lambda x: rlkern.masked_whiten(x.values, x.mask, out=_out(x))),
        Target(1.7, 1.6, 12, 1.9),
    ),
    Case(
        "policy_loss_and_grad",
        "policy_loss_and_grad",
        24,
        f"old 4, log_prob 4, {A}, {M}, gradient 4",
        _loss_and_grad,
        Target(2.0, 1.35, 60, 3.3),
    ),
    Case(
        "policy_loss",
        "policy_loss, forward + backward by autograd",
        24,
        f"old 4, log_prob 4, {A}, {M}, gradient 4",
        _loss_by_autograd,
        Target(3.5, 2.2, 35, 2),
    ),
    Case(
        "rollout_correction",
        "rollout correction: token weights, one rejection, all metrics",
        28,
        f"log_prob 4, rollout 4, {M}, weights 4, modified mask 8",
        _rollout_correction,
        Target(None, None, 40, None),
    ),
    Case(
        "kl_k3",
        "k3 KL",
        12,
        "log_prob 4, ref 4, KL 4",
        _one(lambda x: rlkern.kl_penalty(x.old, x.ref, "k3", out=_out(x))),
        Target(1.4, 1.15, 6.5, 1.8),
        compared="",
    ),
    Case("grpo", "GRPO", 16, f"{R}, {M}, {A}", _by_prompt("grpo"), Target(1.6, 1.25, 4.2, 1.35)),
    Case("rloo", "RLOO", 16, f"{R}, {M}, {A}", _by_prompt("rloo"), Target(1.6, 1.25, 5.5, 1.35)),
    Case(
        "reinforce_plus_plus_baseline",
        "REINFORCE++-baseline",
        16,
        f"{R}, {M}, {A}",
        _by_prompt("reinforce_plus_plus_baseline"),
        Target(2.0, 1.5, 17, 2.5),
    ),
    Case(
        "group_index",
        "group_index",
        0,
        "uuid strings",
        _one(lambda x: rlkern.group_index(x.uid).ids),
        Target(None, None, 12, 2.5, "pandas.factorize"),
        compared="partition",
    ),
]


def _variant(name: str) -> Case:
    size, what = algorithms.moved(name)
    aim = 5.0 if name in algorithms.TWICE + algorithms.SELECTS else 3.5
    return Case(f"loss_{name}", f"policy loss, {name}", size, what, algorithms.ours(name), Target(aim, None, 1, None))


SUITES = {
    "core": [case.name for case in CASES],
    "algorithms": [f"loss_{name}" for name in losses.LOSSES] + [*algorithms.ESTIMATORS, "rloo", "rollout_correction"],
}
CASES += [_variant(name) for name in losses.LOSSES]
CASES += [Case(name, name, size, what, call, Target(None, None, 10, None)) for name, (size, what, call) in algorithms.ESTIMATORS.items()]


# ---- peers ----------------------------------------------------------------------------------------------------------
def _whitened(scan: Call, whiten: Callable[[Tensor, Tensor], Tensor]) -> Call:
    """A rival composed from the fastest pieces: a scan, then a whitening."""

    def call(x: Inputs) -> Outputs:
        found = scan(x)
        return whiten(found[0], x.mask), found[-1]

    return call


def _with_numba(found: dict[str, dict[str, Call]]) -> None:
    from rlkern.bench import peers_numba as numba

    found["gae_whiten"]["numba"] = _whitened(numba.gae, numba.whiten_in_place)
    found["gae_whiten"]["numba + compiled whiten"] = _whitened(numba.gae, peers_compiled.whiten)
    found["reinforce_plus_plus"]["numba + compiled whiten"] = _whitened(numba.discounted_returns, peers_compiled.whiten_masked)
    found["gae"]["numba"] = numba.gae
    found["discounted_returns"]["numba"] = numba.discounted_returns
    found["masked_whiten"]["numba"] = numba.masked_whiten
    found["kl_k3"]["numba"] = numba.kl
    found["policy_loss_and_grad"]["numba"] = numba.policy_loss


def _with_groups(found: dict[str, dict[str, Call]], formulas: Formulas) -> None:
    ways = peers_eager.numberings()
    for label, way in ways.items():
        found["group_index"][label] = lambda x, way=way: (way(x.uid)[0],)  # type: ignore[misc]
    fast = "pandas.factorize" if "pandas.factorize" in ways else "dict"
    for name in ("grpo", "rloo", "reinforce_plus_plus_baseline"):
        found[name][f"{fast} + compiled"] = peers_compiled.estimator(name, ways[fast])
        found[name]["dict + index_add"] = peers_compiled.estimator(name, ways["dict"], eager=True)
    for name in ("grpo", "rloo"):
        if f"{name}_vectorized" in formulas:
            vectorized = formulas[f"{name}_vectorized"]
            found[name]["verl's vectorized"] = lambda x, f=vectorized: (f(x.rewards, x.mask, x.uid),)  # type: ignore[misc]


def calls(formulas: Formulas) -> dict[str, Call]:
    """The framework's side of every op."""
    return peers_eager.calls(formulas) | algorithms.calls(formulas)


def peers() -> tuple[dict[str, dict[str, Call]], dict[str, str]]:
    """For each op its peers by name, the framework's path first; and what is absent, with the reason."""
    label, formulas = peers_eager.framework()
    found: dict[str, dict[str, Call]] = {name: {FRAMEWORK: call} for name, call in calls(formulas).items()}
    notes = {FRAMEWORK: label}
    chunked = peers_chunked
    found["gae_whiten"]["chunked matmul + compiled whiten"] = _whitened(chunked.gae, peers_compiled.whiten)
    found["reinforce_plus_plus"]["chunked matmul + compiled whiten"] = _whitened(chunked.discounted_returns, peers_compiled.whiten_masked)
    for name, scan in (("gae", chunked.gae), ("discounted_returns", chunked.discounted_returns)):
        found[name]["chunked matmul"] = scan
    found["masked_whiten"]["compiled"] = peers_compiled.masked_whiten
    found["kl_k3"]["compiled"] = peers_compiled.kl
    for name in ("policy_loss", "policy_loss_and_grad"):
        found[name]["compiled"] = peers_compiled.policy_loss
    _with_groups(found, formulas)
    for package in ("numba", "pandas"):
        if importlib.util.find_spec(package) is None:
            notes[package] = f"{package} is not installed: its peers are left out (pip install 'rlkern[bench]')"
    if "numba" not in notes:
        _with_numba(found)
    return found, notes
