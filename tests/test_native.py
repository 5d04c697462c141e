# SPDX-License-Identifier: Apache-2.0
"""What holds for every C++ kernel: the same bits for any thread count and address, any ISA within the budget, inputs never
written, and a forked child that does not hang. One table of calls; an op joins by a line."""

import functools
import os
import select

import numpy as np
import pytest
import torch

import rlkern
from rlkern import advantages, backends
from rlkern.testing import assert_within, ragged_mask

pytestmark = pytest.mark.skipif(backends.native is None, reason=backends.native_error)

B, T = 70, 2500  # past the size where threads are used; T is no multiple of a vector


def _data(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = {name: torch.randn(B, T, generator=g) for name in ("rewards", "values", "log_prob", "old", "ref", "advantages")}
    x["log_prob"] = x["old"] + 0.1 * x["log_prob"]
    x["mask"] = ragged_mask(B, T, 0.1, seed)
    return x


def kl_grads(x: dict[str, torch.Tensor], name: str, **options) -> tuple[torch.Tensor, ...]:
    lp, ref = x["log_prob"].clone().requires_grad_(), x["ref"].clone().requires_grad_()
    value = rlkern.kl_penalty(lp, ref, name, **options)
    return value.detach(), *torch.autograd.grad(value, (lp, ref), x["rewards"])


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
    "kl_penalty weighted": lambda x: kl_grads(x, "k3", old_log_prob=x["old"]),
    "kl_penalty straight": lambda x: kl_grads(x, "k1+", old_log_prob=x["old"], weight_max=2.0),
    "shape_rewards": lambda x: rlkern.shape_rewards(x["rewards"], x["old"], x["ref"], x["mask"], kl_coef=0.1),
    "policy_loss": lambda x: tuple(
        v for v in rlkern.policy_loss_and_grad(x["old"], x["log_prob"], x["advantages"], x["mask"]) if isinstance(v, torch.Tensor)
    ),
    "value_loss": lambda x: rlkern.value_loss(x["values"], x["rewards"], x["old"], x["mask"]).loss,
    "value_loss huber": lambda x: rlkern.value_loss(x["values"], x["rewards"], x["old"], x["mask"], huber_delta=0.5, scale=2.0).loss,
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
    with rlkern.use_backend("torch"):
        reference = _flat(CALLS[name](x))
    for isa, there in backends.native.isas().items():
        if not there:
            continue
        with rlkern.use_backend(f"cpp:{isa}"):
            for got, own, want in zip(_flat(CALLS[name](x)), reference, exact, strict=True):
                assert_within(got, own, want, scale=want.abs().max(), what=isa)


@pytest.fixture
def by_attributes():
    """As on a torch without DLPack's C interface: tensors are read by their Python attributes."""
    register = functools.partial(backends.native.register_torch, backends._DTYPES, torch.Tensor, torch.nn.Parameter)
    register(None)
    yield
    register(getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.bfloat16, torch.float16, torch.float64])
def test_native_reads_tensors_by_attributes_too(dtype, request):
    x = _data()
    x["values"] = x["values"].to(dtype if dtype.is_floating_point else torch.float32)
    x["mask"] = x["mask"].to(dtype)
    calls = [CALLS[name] for name in ("gae", "masked_normalize", "kl_penalty", "grpo")] + [
        lambda x: rlkern.gae(x["rewards"].T, x["values"].T, x["mask"].T, gamma=0.9, lam=torch.ones(T)),
        lambda x: rlkern.gae(x["rewards"][:, ::2], x["values"][:, ::2], x["mask"][:, ::2], gamma=0.9, lam=0.9),
        lambda x: rlkern.masked_whiten(x["values"][0, 0], None, unbiased=False),
        lambda x: rlkern.policy_loss(x["old"], x["log_prob"], x["values"][:, 0].float(), x["mask"]).loss,
    ]
    expected = [_flat(call(x)) for call in calls]
    request.getfixturevalue("by_attributes")
    for call, want in zip(calls, expected, strict=True):
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(want, _flat(call(x)), strict=True))


def test_native_alike_knows_plain_tensors_only():
    x = torch.zeros(3, 4)
    plain = {"rewards": x, "mask": torch.zeros(3, 4, dtype=torch.int64), "none": None, "parameter": torch.nn.Parameter(x)}
    if not backends.native.alike(x, plain):
        pytest.skip("this torch has no C interface for DLPack: the checks run in Python")
    others = [
        torch.zeros(3, 5), torch.zeros(3), torch.zeros(4, 3).T, x[:, ::2], x.to("meta"), x.to(torch.int64), x.to(torch.cfloat),
        x.numpy(), 1.0, torch.zeros(3, 1).expand(3, 4), torch.zeros(3, 8)[:, :4],
        torch.nested.nested_tensor([x[0], x[0]], layout=torch.jagged),
    ]  # fmt: skip
    for other in others:
        assert not backends.native.alike(x, plain | {"other": other})


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


def test_native_refuses_offsets_that_are_no_addresses():
    """Also from the raw op, which no check in Python guards."""
    rest = ("none", 0.9, 0.0, "none", [0.0] * 4, None, 0.0, backends.CPP)
    for cu in ([0, 11], [1, 10], [0, 12, 10], [0, -5, 10], []):
        with pytest.raises(ValueError, match="cu_seqlens must"):
            torch.ops.rlkern._discounted_returns_fwd(torch.zeros(10), None, None, None, None, torch.tensor(cu, dtype=torch.int64), *rest)
