# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: device tensors end to end, no host sync, CUDA graphs, the same bits again, 64-bit offsets.

The family tests run there too: `pytest --backend triton` sends their CPU tensors to the GPU where there is one.
"""

import math

import pytest
import torch

import rlkern
from rlkern import advantages, backends
from rlkern.testing import assert_within, ragged_mask

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

GROUPS = 7  # rows a prompt
WIDE = ("rewards", "values", "old", "new", "ref", "advantages")
CALLS = {
    "gae": lambda x: rlkern.gae(x["rewards"], x["values"], x["mask"], gamma=0.99, lam=0.95),
    "gae kl": lambda x: rlkern.gae(
        x["rewards"], x["values"], x["mask"], gamma=0.99, lam=0.95, old_log_prob=x["old"], ref_log_prob=x["ref"], kl_coef=0.1
    ),
    "gae zero": lambda x: rlkern.gae(x["rewards"], x["values"], x["mask"], gamma=0.99, lam=0.95, masked="zero"),
    "discounted_returns": lambda x: rlkern.discounted_returns(x["rewards"], x["mask"], gamma=0.99),
    "discounted_returns reset": lambda x: rlkern.discounted_returns(x["rewards"], x["mask"], gamma=0.99, masked="reset"),
    "discounted_returns turn": lambda x: rlkern.discounted_returns(x["rewards"], x["mask"], gamma=0.99, masked="turn"),
    "affine_scan": lambda x: rlkern.affine_scan(torch.sigmoid(x["values"]), x["rewards"]),
    "masked_mean": lambda x: rlkern.masked_mean(x["values"], x["mask"]),
    "masked_var": lambda x: rlkern.masked_var(x["values"], x["mask"]),
    "masked_whiten": lambda x: rlkern.masked_whiten(x["values"], x["mask"]),
    "masked_normalize": lambda x: rlkern.masked_normalize(x["values"], x["mask"]),
    "kl_penalty": lambda x: rlkern.kl_penalty(x["old"], x["ref"], "k3"),
    "kl_penalty weighted": lambda x: rlkern.kl_penalty(x["old"], x["ref"], "k3", old_log_prob=x["new"]),
    "shape_rewards": lambda x: rlkern.shape_rewards(x["rewards"], x["old"], x["ref"], x["mask"], kl_coef=0.1),
    "policy_loss": lambda x: loss_and_grad(x),
    "policy_loss seq-mean": lambda x: loss_and_grad(x, loss_agg_mode="seq-mean-token-mean"),
    "value_loss": lambda x: rlkern.value_loss(x["values"], x["rewards"], x["old"], x["mask"]).loss,
    "value_loss huber": lambda x: rlkern.value_loss(x["values"], x["rewards"], x["old"], x["mask"], huber_delta=0.5).loss,
    "gae whiten": lambda x: advantages.gae(x["rewards"], x["values"], x["mask"], 0.99, 0.95),
    "reinforce_plus_plus": lambda x: advantages.reinforce_plus_plus(x["rewards"], x["mask"], 0.99),
    "grpo": lambda x: advantages.grpo(x["rewards"], x["mask"], x["group"]),
    "rloo": lambda x: advantages.rloo(x["rewards"], x["mask"], x["group"]),
    "reinforce_plus_plus_baseline": lambda x: advantages.reinforce_plus_plus_baseline(x["rewards"], x["mask"], x["group"]),
}
calls = pytest.mark.parametrize("name", CALLS)


@pytest.fixture(autouse=True, params=["triton", "cuda"])
def side(request):
    """Both kinds of kernels; of `--backend`, that one."""
    why = backends.why_not(request.param, "_gae_fwd", "cuda")
    if why or request.config.getoption("backend") not in (None, request.param):
        pytest.skip("; ".join(why) or "another backend is asked for")
    with rlkern.use_backend(request.param):
        yield request.param


def loss_and_grad(x, **kw):
    found = rlkern.policy_loss_and_grad(x["old"], x["new"], x["advantages"], x["mask"], **kw)
    return found.loss, found.d_log_prob, found.metrics.sums


def batch(rows=70, tokens=2500, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = {name: torch.randn(rows, tokens, generator=g) for name in WIDE}
    x["new"] = x["old"] + 0.1 * x["new"]
    x = {name: v.to(dtype) for name, v in x.items()}
    x["mask"] = ragged_mask(rows, tokens, 0.1, seed)
    x["group"] = rlkern.group_index([i // GROUPS for i in range(rows)])
    return x


def moved(x):
    """On the GPU, strides and group index too."""
    found = {k: v.cuda() for k, v in x.items() if isinstance(v, torch.Tensor)}
    return found | {"group": rlkern.group_index(torch.arange(found["rewards"].shape[0], device="cuda") // GROUPS)}


def flat(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


@calls
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gpu_matches_reference(name, dtype):
    x = batch(dtype=dtype)
    exact = {k: v.double() if k in WIDE else v for k, v in x.items()}
    with rlkern.use_backend("torch"):
        own, want = flat(CALLS[name](x)), flat(CALLS[name](exact))
    for got, mine, best in zip(flat(CALLS[name](moved(x))), own, want, strict=True):
        assert got.device.type == "cuda"
        assert_within(got, mine, best, scale=best.abs().max(), what=name)


def test_gpu_auto_takes_no_reference(caplog):
    x = moved(batch())
    with rlkern.use_backend("auto"):
        for name in CALLS:
            CALLS[name](x)
        assert not [r for r in caplog.records if "torch backend" in r.message]
        first = backends._order("_gae_fwd", x["rewards"].device)[0]
        assert f"gae_fwd on cuda, torch.float32: {first}" in rlkern.explain("gae", x["rewards"])


@calls
def test_gpu_never_syncs(name):
    x = moved(batch())
    CALLS[name](x)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        CALLS[name](x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@calls
def test_gpu_same_bits_again(name):
    x = moved(batch(seed=1))
    first = [y.clone() for y in flat(CALLS[name](x))]
    for _ in range(3):
        for a, b in zip(flat(CALLS[name](x)), first, strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


@calls
def test_gpu_graph_capture_and_replay(name):
    x, other = moved(batch()), moved(batch(seed=2))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        CALLS[name](x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = flat(CALLS[name](x))
    want = [y.clone() for y in flat(CALLS[name](other))]
    for k, v in x.items():
        if isinstance(v, torch.Tensor):
            v.copy_(other[k])
    graph.replay()
    for a, b in zip(captured, want, strict=True):
        assert torch.equal(a, b)


def test_gpu_graph_with_gradients():
    """A training step's loss, backward and all, in a graph."""
    x = moved(batch())
    leaf = x["new"].clone().requires_grad_()

    def step():
        leaf.grad = None
        loss = rlkern.policy_loss(x["old"], leaf, x["advantages"], x["mask"]).loss
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    graph.replay()
    torch.cuda.synchronize()
    found = rlkern.policy_loss_and_grad(x["old"], x["new"], x["advantages"], x["mask"])
    assert torch.equal(loss.detach(), found.loss)
    assert torch.allclose(leaf.grad, found.d_log_prob)


def test_gpu_side_stream():
    x, stream = moved(batch()), torch.cuda.Stream()
    want = rlkern.gae(x["rewards"], x["values"], x["mask"], gamma=0.99, lam=0.95)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        delayed = x["rewards"] * 1
        got = rlkern.gae(delayed, x["values"], x["mask"], gamma=0.99, lam=0.95)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got.advantages, want.advantages)


@pytest.mark.parametrize("shape", [(8, 131072), (100_000, 3), (2, 131071)])
def test_gpu_long_and_many_rows(shape):
    x = batch(*shape)
    there = moved(x)
    for name in ("gae", "gae whiten", "discounted_returns", "policy_loss", "masked_normalize", "grpo", "shape_rewards"):
        exact = {k: v.double() if k in WIDE else v for k, v in x.items()}
        with rlkern.use_backend("torch"):
            own, want = flat(CALLS[name](x)), flat(CALLS[name](exact))
        for got, mine, best in zip(flat(CALLS[name](there)), own, want, strict=True):
            assert_within(got, mine, best, scale=best.abs().max(), what=name)


def test_gpu_offsets_past_32_bits():
    """Two rows whose addresses differ by more than 2^31 elements."""
    rows, tokens, stride = 2, 300, 2**31 + 64
    if torch.cuda.mem_get_info()[0] < 5 * 4 * (stride + tokens):
        pytest.skip("not enough memory")
    x = batch(rows, tokens)

    def apart(v):
        whole = torch.empty(stride + tokens, dtype=v.dtype, device="cuda")
        view = whole.as_strided((rows, tokens), (stride, 1))
        return view.copy_(v)

    r, v, m = apart(x["rewards"]), apart(x["values"]), apart(x["mask"].bool())
    there = moved(x)
    for a, b in zip(
        rlkern.gae(r, v, m, gamma=0.99, lam=0.95),
        rlkern.gae(there["rewards"], there["values"], there["mask"], gamma=0.99, lam=0.95),
        strict=True,
    ):
        assert torch.equal(a, b)
    assert torch.equal(rlkern.masked_whiten(v, m), rlkern.masked_whiten(there["values"], there["mask"]))
    got = rlkern.policy_loss_and_grad(r, v, r, m).d_log_prob
    assert torch.equal(got, rlkern.policy_loss_and_grad(there["rewards"], there["values"], there["rewards"], there["mask"]).d_log_prob)


def test_gpu_empty_mask_is_nan_not_an_error():
    """What only the device knows is not asked for: the count says it."""
    x = moved(batch())
    x["mask"] = torch.zeros_like(x["mask"])
    assert rlkern.masked_whiten(x["values"], x["mask"]).isnan().all()
    loss, metrics = rlkern.policy_loss(x["old"], x["new"], x["advantages"], x["mask"])
    assert math.isnan(float(loss))
    assert metrics.as_dict()["actor/ppo_kl"] == 0


def test_gpu_compiles_fullgraph():
    x = moved(batch())

    def step(new, old, advantages, mask):
        return rlkern.policy_loss(old, new, advantages, mask).loss

    leaves = [x["new"].clone().requires_grad_() for _ in range(2)]
    rest = (x["old"], x["advantages"], x["mask"])
    losses = [f(leaf, *rest) for f, leaf in zip((step, torch.compile(step, fullgraph=True)), leaves, strict=True)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert torch.equal(leaves[0].grad, leaves[1].grad)
