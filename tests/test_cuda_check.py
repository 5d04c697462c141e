# SPDX-License-Identifier: Apache-2.0
"""tools/cuda_check.py: every CUDA kernel states its budget, and code that leaves one is a breach. tools/gpu.py: what it can
show without a GPU."""

import collections
import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(f"rlkern_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


check = load("cuda_check")
BUDGET = check.Budget("kl_kernel", ("S", "false"), 40, 2, 1)


def code(**other):
    wide = {"loads": collections.Counter({128: 2, 32: 8}), "stores": collections.Counter({128: 1})}
    return check.Code(
        **{"arch": "sm_90", "name": "kl_kernel", "arguments": ("float", "false"), "registers": 40, "stack": 0, "local": 0} | wide | other
    )


def test_cuda_check_every_kernel_has_a_budget_and_a_plan():
    for path in (ROOT / "csrc" / "cuda").glob("*.cu"):
        text = path.read_text()
        kernels = set(re.findall(r"(\w+_kernel)\(const", text))
        assert kernels == {b[0] for b in check.BUDGET.findall(text)} == set(re.findall(r"// plan (\w+):", text)), path


def test_cuda_check_fits():
    assert BUDGET.fits("kl_kernel", ("__half", "false"))
    assert not BUDGET.fits("kl_kernel", ("__half", "true"))
    assert not BUDGET.fits("kl_kernel", ("__half",))


def test_cuda_check_catches():
    assert check.breaches(code(), BUDGET) == []
    assert check.breaches(code(arguments=("Mixed_float", "false"), loads=collections.Counter()), BUDGET) == []
    assert check.breaches(code(registers=41), BUDGET) == ["41 registers, planned 40"]
    assert check.breaches(code(stack=8, local=2), BUDGET) == ["8 bytes of stack", "2 accesses to local memory"]
    assert check.breaches(code(stores=collections.Counter({32: 4})), BUDGET) == ["0 stores of 128 bits, planned 1"]
    assert check.breaches(code(), None) == ["no budget beside the kernel"]


WAITS = """
        /*b5b0*/                   LDG.E.STRONG.SYS R49, desc[UR8][R26.64] ;   /* 0x00 */
        /*b5c0*/                   YIELD ;                                     /* 0x00 */
        /*b5d0*/              @!P3 PLOP3.LUT P0, PT, P2, PT, PT, 0x80, 0x0 ;   /* 0x00 */
        /*b5e0*/                   ISETP.NE.AND P2, PT, R14, RZ, PT ;          /* 0x00 */
        /*b5f0*/              @!P0 BRA {to}                  {more};           /* 0xfffffffc00ac0947 */
        /*b600*/                   BRA 0xb600;                                 /* 0x00 */
"""


@pytest.mark.parametrize("more", ["", "&req={2}        ?trans5"])  # as sm_90 is written, and sm_120
def test_cuda_check_loops_that_never_end(more):
    """A load that the assembler has taken out of the loop that waits for it."""
    assert check.idle_loops(WAITS.format(to="0xb5c0", more=more)) == 1
    assert check.idle_loops(WAITS.format(to="0xb5b0", more=more)) == 0
    assert check.breaches(code(idle=1), BUDGET) == ["1 loops that wait for what they do not ask"]


@pytest.mark.parametrize(
    ("status", "text", "said"),
    [
        (0, "done\n========= ERROR SUMMARY: 0 errors\n", {"ran": True, "clean": True, "summary": "0 errors"}),
        (9, "done\n========= ERROR SUMMARY: 3 errors\n", {"ran": True, "clean": False, "summary": "3 errors"}),
        (9, "RuntimeError\n========= ERROR SUMMARY: 1 error\n", {"ran": True, "clean": False, "summary": "1 error"}),  # it died of it
        (0, "done\n========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n", {"ran": True, "clean": False}),
        (1, "Device not supported\n========= ERROR SUMMARY: 0 errors\n", {"ran": False, "why": "exit 1"}),
        (124, "", {"ran": False, "why": "exit 124"}),
    ],
)
def test_gpu_script_reads_sanitizers(status, text, said):
    assert said.items() <= load("gpu").verdict(status, text).items()


def test_gpu_script_sanitizes_calls_that_run(monkeypatch, capsys):
    """A call that raises would leave the sanitizers without a program, which their report takes for a machine that refuses."""
    monkeypatch.setattr(sys, "argv", ["-c", "torch", "cpu"])
    exec(load("gpu").TINY, {})
    assert capsys.readouterr().out == "done\n"
