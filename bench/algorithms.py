# SPDX-License-Identifier: Apache-2.0
"""The suite "algorithms": every variant of the policy loss, forward and backward by autograd, and the estimators and corrections that
are loops in their frameworks. The floor of a loss is one read of its inputs and one write of its gradient, whatever it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import rlkern
from rlkern.bench.inputs import Inputs
from rlkern.bench.peers_eager import Call, Outputs
from rlkern.cli import losses
from rlkern.cli.against import Formulas

TWICE = ("gspo", "gspo_token", "luspo", "rloo", "geo_mean", "vespo")  # a row is swept twice, or three times
SELECTS = ("clip_cov", "kl_cov")  # tokens are chosen before the loss


def moved(name: str) -> tuple[int, str]:
    """Bytes per element, and what they are."""
    third = name == "decoupled"
    return 28 if third else 24, f"old 4, log_prob 4, {'sampler 4, ' if third else ''}advantages 4, mask 8, gradient 4"


def _outputs(name: str, loss: Any, leaf: Any) -> Outputs:
    return (loss.detach(),) if name in losses.CHOOSING else (loss.detach(), leaf.grad)


def ours(name: str) -> Call:
    options = dict(losses.OPTIONS[name])

    def call(x: Inputs) -> Outputs:
        leaf = x.leaf
        leaf.grad = None
        more: dict[str, Any] = {"rollout_log_prob": x.ref} if name == "decoupled" else {}
        if rlkern.policy.VARIANTS[name].mode == "token-mean":
            more["batch_num_tokens"] = x.tokens
        loss = rlkern.policy_loss(x.old, leaf, x.advantages, x.mask, variant=name, **options, **more).loss  # type: ignore[arg-type]
        loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
        return _outputs(name, loss, leaf)

    return call


def framework(name: str, formulas: Formulas) -> Call:
    formula = formulas[f"loss_{name}"]

    def call(x: Inputs) -> Outputs:
        leaf = x.leaf
        leaf.grad = None
        loss = formula(x.old, leaf, x.advantages, x.mask, x.ref)
        loss.backward()
        return _outputs(name, loss, leaf)

    return call


def _components(x: Inputs) -> Any:
    return x.values[:, :2]


ESTIMATORS: dict[str, tuple[int, str, Callable[[Inputs], Outputs]]] = {
    "gpg": (16, "rewards 4, mask 8, advantages 4", lambda x: (rlkern.advantages.gpg(x.rewards, x.mask, x.uid)[0],)),
    "opo": (16, "rewards 4, mask 8, advantages 4", lambda x: (rlkern.advantages.opo(x.rewards, x.mask, x.uid)[0],)),
    "gdpo": (
        12,
        "mask 8, advantages 4",
        lambda x: (rlkern.advantages.gdpo(x.rewards, x.mask, x.uid, component_scores=_components(x))[0],),
    ),
    "optimal_token_baseline": (
        28,
        "rewards 4, mask 8, log_prob 4, squares 4, advantages 4, returns 4",
        lambda x: (rlkern.advantages.optimal_token_baseline(x.rewards, x.mask, x.uid, x.old, x.squares)[0],),
    ),
    "tir_optimal_token_baseline": (
        28,
        "rewards 4, mask 8, log_prob 4, squares 4, advantages 4, returns 4",
        lambda x: (rlkern.advantages.tir_optimal_token_baseline(x.rewards, x.mask, x.uid, x.old, x.squares)[0],),
    ),
}


def calls(f: Formulas) -> dict[str, Call]:
    """The framework's side, one call per op of the suite."""
    found: dict[str, Call] = {f"loss_{name}": framework(name, f) for name in losses.LOSSES}
    found["gpg"] = lambda x: (f["gpg"](x.rewards, x.mask, x.uid),)
    found["opo"] = lambda x: (f["opo"](x.rewards, x.mask, x.uid),)
    found["gdpo"] = lambda x: (f["gdpo"](x.rewards, x.mask, x.uid, _components(x)),)
    for name in ("optimal_token_baseline", "tir_optimal_token_baseline"):
        found[name] = lambda x, name=name: (f[name](x.rewards, x.mask, x.uid, x.old, x.squares),)  # type: ignore[misc]
    return found
