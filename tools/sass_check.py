# SPDX-License-Identifier: Apache-2.0
"""Reads the machine code of every Triton kernel without a GPU: `python tools/sass_check.py [family ...]`, exit 1 on a breach.

Each family's VARIANTS are compiled for the targets below, in parallel. Against the plan beside the kernel stand: no
spills, no local memory, registers within the budget, the accesses to global memory (their widths and how many) as planned.
The plans hold for Triton 3.6; other versions' compilers take other registers, and 3.4 has no linker for gfx942.
"""

import argparse
import collections
import concurrent.futures
import importlib
import itertools
import multiprocessing
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rlkern import kernels
from rlkern.kernels.launch import Variant

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)} | {"gfx942": GPUTarget("hip", "gfx942", 64)}
MAIN = ("sm_90", "gfx942")
SIZES = {"i1": 1, "u8": 1, "fp16": 2, "bf16": 2, "fp32": 4, "i32": 4, "fp64": 8, "i64": 8}
AMD_SIZES = {
    "ubyte": 1,
    "sbyte": 1,
    "byte": 1,
    "ushort": 2,
    "sshort": 2,
    "short": 2,
    "dword": 4,
    "dwordx2": 8,
    "dwordx3": 12,
    "dwordx4": 16,
}


Widths = collections.Counter[int]  # accesses to global memory by their width in bytes


class Code(NamedTuple):
    """What was read from machine code."""

    registers: int
    spills: int  # on NVIDIA, bytes of stack
    local: int
    loads: Widths
    stores: Widths


# ---- compile and read -----------------------------------------------------------------------------------------------
def compiled(variant: Variant, target: GPUTarget, aligned: bool) -> Any:
    types = variant.types()
    unknown = (types.keys() | variant.constexprs) - {p.name for p in variant.kernel.params}
    if unknown:
        raise ValueError(f"{variant.kernel.__name__} has no argument {', '.join(sorted(unknown))}")
    given = {"A": tl.float32, "ALIGNED": aligned, "BLOCK": variant.block.size, "INNER": (1,) * 16, **variant.constexprs}
    signature, constants = {}, {}
    for parameter in variant.kernel.params:
        name = parameter.name
        if name in types:
            signature[name] = "*" + types[name]
        elif parameter.annotation_type:
            signature[name] = parameter.annotation_type
        else:
            signature[name], constants[name] = "constexpr", given.get(name)
    options = {"num_warps": variant.block.num_warps, "enable_fp_fusion": False}
    return triton.compile(ASTSource(variant.kernel, signature, constants), target=target, options=options)


def tool(name: str, *arguments: object) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def read_nvidia(cubin: bytes) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, text = tool("cuobjdump", "--dump-resource-usage", file.name), tool("nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    found: dict[str, Widths] = collections.defaultdict(collections.Counter)
    for kind, suffixes in re.findall(r"\b(LDG|STG|LDL|STL)((?:\.\w+)*)", text):
        width = re.search(r"\.[US]?(8|16|64|128|256)\b", suffixes)
        found[kind][int(width[1]) // 8 if width else 4] += 1
    return Code(registers, stack, found["LDL"].total() + found["STL"].total(), found["LDG"], found["STG"])


def read_amd(text: str) -> Code:
    def number(word: str) -> int:
        return int(re.search(rf"\.{word}:\s+(\d+)", text)[1])

    found: dict[str, Widths] = {"load": collections.Counter(), "store": collections.Counter()}
    for kind, width in re.findall(r"\b(?:global|buffer|flat)_(load|store)_(\w+)", text):
        found[kind][AMD_SIZES[width.replace("_d16_hi", "").replace("_d16", "")]] += 1
    local = len(re.findall(r"\bscratch_(?:load|store)", text)) + number("private_segment_fixed_size")
    return Code(number("vgpr_count"), number("vgpr_spill_count") + number("sgpr_spill_count"), local, found["load"], found["store"])


# ---- against the plan -----------------------------------------------------------------------------------------------
def planned(sizes: list[int], share: int, aligned: bool) -> Widths:
    """The accesses by width, for a thread that has `share` elements of tensors of these element sizes."""
    found: Widths = collections.Counter()
    for size in sizes:
        width = min(16, share * size) if aligned else size
        found[width] += share * size // width
    return found


def breaches(variant: Variant, target: GPUTarget, aligned: bool, code: Code) -> list[str]:
    plan, types = variant.plan, variant.types()
    share = variant.block.size // (variant.block.num_warps * target.warp_size)
    found = [f"{n} {what}" for n, what in ((code.spills, "spilled"), (code.local, "of local memory")) if n]
    budget = plan.registers[0 if aligned else 1]
    if code.registers > budget:
        found.append(f"{code.registers} registers, planned {budget}")
    accesses = (("loads", code.loads, plan.loads, plan.row_loads), ("stores", code.stores, plan.stores, plan.row_stores))
    for what, seen, tensors, per_row in accesses:
        of_tokens = planned([SIZES[types[x]] for x in tensors], share, aligned)
        of_rows: Widths = collections.Counter(SIZES[types[x]] for x in per_row)
        spare = seen - of_tokens
        joined = target.backend == "hip" and size(spare) <= size(of_rows)  # AMD's compiler joins neighbouring values of a row
        if not of_tokens <= seen or not (spare <= of_rows or joined):  # AMD's scalar unit may load what a row shares
            found.append(f"{what} {show(seen)}, planned {show(of_tokens)} and a row's {show(of_rows)}")
    return found


def size(accesses: Widths) -> int:
    return sum(n * width for width, n in accesses.items())


def show(accesses: Widths) -> str:
    return " + ".join(f"{n} x {8 * width} bit" for width, n in sorted(accesses.items(), reverse=True)) or "none"


class Job(NamedTuple):
    """A compilation; variants are found again by their place, as a process pool cannot take them."""

    family: str
    index: int
    target: str
    aligned: bool

    def variant(self) -> Variant:
        found: Variant = importlib.import_module(f"rlkern.kernels.{self.family}").VARIANTS[self.index]
        return found


def jobs(families: list[str], every: bool) -> list[Job]:
    """float32 and aligned for each target; bfloat16 and not aligned for one of each maker, unless `every` is asked for."""
    found, seen = [], set()
    for family in families:
        for i, v in enumerate(importlib.import_module(f"rlkern.kernels.{family}").VARIANTS):
            names = {p.name for p in v.kernel.params}
            key = (v.kernel.__name__, str(sorted(v.types().items())), str(v.constexprs))
            if key in seen:
                continue
            seen.add(key)
            for name, aligned in itertools.product(TARGETS, (True, False) if "ALIGNED" in names else (True,)):
                if every or name in MAIN or (aligned and v.dtype == "fp32"):
                    found.append(Job(family, i, name, aligned))
    return found


def measured(variant: Variant, target: GPUTarget, aligned: bool) -> tuple[Code, list[str]]:
    """The machine code, and where it leaves the plan."""
    asm = compiled(variant, target, aligned).asm
    code = read_nvidia(asm["cubin"]) if "cubin" in asm else read_amd(asm["amdgcn"])
    return code, breaches(variant, target, aligned, code)


def result(job: Job) -> tuple[Code, list[str]]:
    return measured(job.variant(), TARGETS[job.target], job.aligned)


def check(todo: list[Job]) -> int:
    """Print a line per variant and target; the number of breaches."""
    bad, last = 0, None
    with concurrent.futures.ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for job, (code, wrong) in zip(todo, pool.map(result, todo), strict=True):
            variant = job.variant()
            if variant is not last:
                types, plan, last = variant.types(), variant.plan, variant
                moved = sum(SIZES[types[x]] for x in plan.loads + plan.stores)
                choice = ", ".join(f"{k}={v}" for k, v in variant.constexprs.items())
                name = f"{variant.kernel.__name__} {variant.dtype} {choice}"
                print(f"{name}: {moved} bytes per element, at most {plan.registers} registers")
            bad += bool(wrong)
            line = f"  {job.target:7}{'aligned' if job.aligned else 'any':8}{code.registers:4} registers"
            print(f"{line}  {show(code.loads)} -> {show(code.stores)}", *wrong, sep="  BREACH: ", flush=True)
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(kernels.FAMILIES))
    parser.add_argument("--every", action="store_true", help="every variant for every target")
    given = parser.parse_args()
    todo = jobs(given.families, given.every)
    bad = check(todo)
    print(f"triton {triton.__version__}: {len(todo)} compiled, {bad} breaches of a plan")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
