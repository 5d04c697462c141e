# SPDX-License-Identifier: Apache-2.0
"""rlkern.testing's own parts: what stands in, on a GPU, for the count that a kernel on the CPU gives."""

import pytest
import torch

import rlkern
from rlkern import advantages, backends, library
from rlkern.testing import judged

pytestmark = pytest.mark.skipif(backends.native is None, reason=str(backends.native_error))
X, MASK = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([[1.0, 0, 0.5, 1, 0, 0]]).expand(4, 6)
CALLS = {
    "masked_var": lambda: rlkern.masked_var(X, MASK),
    "masked_whiten": lambda: rlkern.masked_whiten(X, MASK),
    "masked_whiten without a mask": lambda: rlkern.masked_whiten(X, None),
    "whiten_apply": lambda: rlkern.whiten_apply(X, rlkern.masked_moments(X, MASK), MASK),
    "gae": lambda: advantages.gae(X, X, MASK, 0.9, 0.9),
    "reinforce_plus_plus": lambda: advantages.reinforce_plus_plus(X, MASK, 0.9),
    "reinforce_plus_plus_baseline": lambda: advantages.reinforce_plus_plus_baseline(X, MASK, [0, 0, 1, 1]),
    "grpo_passk": lambda: advantages.grpo_passk(X, MASK, [0, 0, 1, 1]),
    "rollout_correction": lambda: rlkern.rollout_correction(X, X, MASK, rollout_is="token"),
}


@pytest.mark.parametrize("name", CALLS)
def test_judged_as_the_cpu_counts(name, monkeypatch):
    """Where the count decides: a call that judges none of it has none to compare."""
    seen = []
    for op, known in library.OPS.items():
        if known.judge is not None:

            def judge(count, *args, op=op, real=known.judge):
                if count != 0:
                    seen.append((op, count, judged(op, args)))
                real(count, *args)

            monkeypatch.setitem(library.OPS, op, known._replace(judge=judge))
    with rlkern.use_backend("cpp"):
        CALLS[name]()
    assert seen or name == "grpo_passk"
    for op, count, ours in seen:
        assert ours == count, op


def test_judged_refuses_as_the_cpu_does():
    index = rlkern.group_index([0, 1, 1, 2])
    rest = (index.ids, index.order, index.offsets, None, "second_best")
    assert judged("_group_advantage_fwd", (X, MASK, *rest)) == 2
    assert judged("_masked_whiten_fwd", (X, torch.zeros(4, 6))) == 0
