# SPDX-License-Identifier: Apache-2.0
"""What holds for every C++ kernel: the same bits for any thread count and address, any ISA within the budget, inputs never
written, and a forked child that does not hang. One table of calls; an op joins by a line."""

import os
import select

import numpy as np
import pytest
import torch

import rlkern
from rlkern import advantages, backends
from rlkern.testing import error, ragged_mask

pytestmark = pytest.mark.skipif(backends.native is None, reason=backends.native_error)

B, T = 70, 2500  # past the size where threads are used; T is no multiple of a vector


def _data(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = {name: torch.randn(B, T, generator=g) for name in ("rewards", "values", "log_prob", "old", "ref", "advantages")}
    x["log_prob"] = x["old"] + 0.1 * x["log_prob"]
    x["mask"] = ragged_mask(B, T, 0.1, seed)
    return x


LABELS = [f"prompt-{i // 7}" for i in range(B)]
CALLS = {
    "gae": lambda x: rlkern.gae(x["rewards"], x["values"], x["mask"], gamma=0.99, lam=0.95),
    "gae_zero": lambda x: rlkern.gae(x["rewards"], x["values"], x["mask"], gamma=0.99, lam=0.95, masked="zero"),
    "discounted_returns": lambda x: rlkern.discounted_returns(x["rewards"], x["mask"], gamma=0.99),
    "returns_reset": lambda x: rlkern.discounted_returns(x["rewards"], x["mask"], gamma=0.99, masked="reset"),
    "returns_turn": lambda x: rlkern.discounted_returns(x["rewards"], x["mask"], gamma=0.99, masked="turn"),
    "affine_scan": lambda x: rlkern.affine_scan(0.9, x["rewards"]),
    "masked_mean": lambda x: rlkern.masked_mean(x["values"], x["mask"]),
    "masked_var": lambda x: rlkern.masked_var(x["values"], x["mask"]),
    "masked_whiten": lambda x: rlkern.masked_whiten(x["values"], x["mask"]),
    "masked_normalize": lambda x: rlkern.masked_normalize(x["values"], x["mask"]),
    "kl_penalty": lambda x: rlkern.kl_penalty(x["log_prob"], x["ref"], "k3"),
    "shape_rewards": lambda x: rlkern.shape_rewards(x["rewards"], x["old"], x["ref"], x["mask"], kl_coef=0.1),
    "policy_loss": lambda x: tuple(
        v for v in rlkern.policy_loss_and_grad(x["old"], x["log_prob"], x["advantages"], x["mask"]) if isinstance(v, torch.Tensor)
    ),
    "value_loss": lambda x: rlkern.value_loss(x["values"], x["rewards"], x["old"], x["mask"]).loss,
    "gae_whiten": lambda x: advantages.gae(x["rewards"], x["values"], x["mask"], 0.99, 0.95),
    "reinforce_plus_plus": lambda x: advantages.reinforce_plus_plus(x["rewards"], x["mask"], 0.99),
    "grpo": lambda x: advantages.grpo(x["rewards"], x["mask"], LABELS),
    "reinforce_plus_plus_baseline": lambda x: advantages.reinforce_plus_plus_baseline(x["rewards"], x["mask"], LABELS),
}


def _flat(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CALLS)
def test_native_same_bits_for_every_thread_count(name, threads):
    x, found = _data(), []
    for n in (1, 2, 2, 3):
        threads(n)
        found.append(_flat(CALLS[name](x)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_native_same_bits_at_every_address(name):
    """A loop peeled for alignment would sum in another order."""
    x = _data()
    expected = _flat(CALLS[name](x))
    for shift in (1, 5, 13):
        moved = {k: torch.zeros(B, T + 40, dtype=v.dtype)[:, shift : shift + T].copy_(v) for k, v in x.items()}
        assert all(torch.equal(a, b) for a, b in zip(expected, _flat(CALLS[name](moved)), strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_native_isas_agree(name):
    x = _data()
    exact = _flat(CALLS[name]({k: v.double() if v.is_floating_point() else v for k, v in x.items()}))
    for isa, there in backends.native.isas().items():
        if not there:
            continue
        with rlkern.use_backend(f"cpp:{isa}"):
            for got, want in zip(_flat(CALLS[name](x)), exact, strict=True):
                scale = float(want.double().abs().max()) + 1.0
                assert error(got, want) <= 300 * torch.finfo(torch.float32).eps * scale, isa  # a scan sums some hundred terms


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("name", CALLS)
def test_native_reads_only(name):
    """Inputs from shared memory (Ray) are read-only: a write would be a fault."""
    x = _data()
    frozen = {}
    for key, value in x.items():
        array = value.numpy().copy()
        array.flags.writeable = False
        frozen[key] = torch.from_numpy(array)
    before = {k: v.clone() for k, v in frozen.items()}
    expected = _flat(CALLS[name](x))
    got = _flat(CALLS[name](frozen))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert all(torch.equal(before[k], v) for k, v in frozen.items())


def test_native_after_fork(threads):
    """The pool's threads do not exist in a forked child: waiting for them would be for ever."""
    threads(2)
    x = _data()
    expected = rlkern.gae(x["rewards"], x["values"], x["mask"], gamma=0.99, lam=0.95).advantages
    out = (torch.zeros(B, T), torch.zeros(B, T))  # made here: torch's own fill would hang in the child
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        rlkern.gae(x["rewards"], x["values"], x["mask"], gamma=0.99, lam=0.95, out=out)
        os.write(write, b"same" if np.array_equal(out[0].numpy(), expected.numpy()) else b"differ")
        os._exit(0)
    os.close(write)
    ready, _, _ = select.select([read], [], [], 60)
    if not ready:
        os.kill(child, 9)
    os.waitpid(child, 0)
    assert ready, "the child hangs"
    assert os.read(read, 10) == b"same"


def test_native_refuses_an_isa_that_is_not_there():
    with pytest.raises(rlkern.BackendError, match="isa must be one of"):
        rlkern.backends.set_backend("cpp:sse9")
    assert rlkern.backends.current_backend() == "auto"
