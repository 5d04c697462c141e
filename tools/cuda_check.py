# SPDX-License-Identifier: Apache-2.0
"""Reads the machine code of the CUDA kernels without a GPU: `python tools/cuda_check.py build/cuda/_C_cuda*.so`, exit 1 on a breach.

Beside each kernel in csrc/cuda stands its budget, `// budget name<arguments>: R registers, loads L, stores S`. Every variant
of it, for every GPU that was compiled for, takes at most R registers, spills nothing and keeps nothing in local memory; those
whose operands share a dtype load at least L and store at least S times 128 bits. The rest of the accesses are those of a
row's ends. A kernel without a budget is a breach, and so is a loop that waits but asks no memory: the assembler may take a load
out of a loop, and then it never ends.
"""

import argparse
import collections
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
BUDGET = re.compile(r"// budget (\w+)(<[^:]*>)?: (\d+) registers, loads (\d+), stores (\d+)$", re.MULTILINE)
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_]+)([^;]*);")
# Neither an access nor a sum: what a loop of these alone looks at never changes.
IDLE = {
    "YIELD",
    "LOP3",
    "PLOP3",
    "ISETP",
    "P2R",
    "R2P",
    "R2UR",
    "UISETP",
    "ULOP3",
    "UPLOP3",
    "MOV",
    "SEL",
    "NOP",
    "BSSY",
    "BSYNC",
    "BREAK",
    "WARPSYNC",
    "BRA",
    "NANOSLEEP",
}
STORED = ("float", "double", "__half", "__nv_bfloat16")  # S where operands share a dtype


class Budget(NamedTuple):
    name: str
    arguments: tuple[str, ...]  # S and A stand for any type
    registers: int
    loads: int
    stores: int

    def fits(self, name: str, arguments: tuple[str, ...]) -> bool:
        given = zip(self.arguments, arguments, strict=False)
        return self.name == name and len(self.arguments) == len(arguments) and all(x == y or x in ("S", "A") for x, y in given)


class Code(NamedTuple):
    arch: str
    name: str
    arguments: tuple[str, ...]
    registers: int
    stack: int
    local: int
    loads: collections.Counter[int]  # by bits
    stores: collections.Counter[int]
    idle: int = 0  # loops that wait for what they do not ask


def budgets(folder: Path = CSRC) -> list[Budget]:
    found = []
    for path in sorted(folder.glob("*.cu")):
        for name, arguments, *numbers in BUDGET.findall(path.read_text()):
            found.append(Budget(name, split(arguments), *map(int, numbers)))
    return found


def split(arguments: str) -> tuple[str, ...]:
    return tuple(x.strip() for x in arguments.strip("<>").split(",")) if arguments else ()


def tool(name: str) -> str:
    """From the toolkit, or the one that Triton brings."""
    found = shutil.which(name)
    if found is None:
        import triton

        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
    return found


def output(*command: object) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


def demangled(symbol: str) -> tuple[str, tuple[str, ...]]:
    """The kernel's own name and its template arguments, without namespaces."""
    text = re.sub(r"rlkern::cuda::|\(anonymous namespace\)::|rlkern::|\(bool\)(?=[01])", "", output("c++filt", symbol).strip())
    text = text.removeprefix("void ")
    depth, end = 0, len(text)
    for i, c in enumerate(text):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            end = i
            break
    name, _, arguments = text[:end].partition("<")
    return name, split(re.sub(r"<(\w+)>", r"_\1", arguments.removesuffix(">").replace(" >", ">")))


def idle_loops(text: str) -> int:
    """Loops of SASS, from a branch's target to the branch, whose instructions are all IDLE. A kernel's end, which branches to
    itself, is none."""
    code = [(int(at, 16), name, rest) for at, name, rest in INSTRUCTION.findall(text)]
    branches = [(int(to[1], 16), at) for at, name, rest in code if name == "BRA" and (to := re.search(r"0x([0-9a-f]+)", rest))]
    return sum(all(name in IDLE for at, name, _ in code if first <= at <= last) for first, last in branches if first < last)


def codes(module: Path) -> list[Code]:
    usage: dict[tuple[str, str], tuple[int, int]] = {}
    arch = ""
    for line in output(tool("cuobjdump"), "--dump-resource-usage", module).splitlines():
        if line.startswith("arch ="):
            arch = line.split()[-1]
        elif line.strip().startswith("Function "):
            name = line.strip().removeprefix("Function ").removesuffix(":")
        elif "REG:" in line:
            usage[arch, name] = tuple(int(re.search(rf"{word}:(\d+)", line)[1]) for word in ("REG", "STACK"))  # type: ignore[index,assignment]
    found = []
    for image in re.split(r"^Fatbin elf code:", output(tool("cuobjdump"), "-sass", module), flags=re.MULTILINE)[1:]:
        arch = re.search(r"arch = (\w+)", image)[1]  # type: ignore[index]
        for text in re.split(r"^\s*Function : ", image, flags=re.MULTILINE)[1:]:
            symbol = text.split()[0]
            widths: dict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)
            for kind, suffixes in re.findall(r"\b(LDG|STG|LDL|STL)((?:\.\w+)*)", text):
                width = re.search(r"\.[US]?(8|16|64|128|256)\b", suffixes)
                widths[kind][int(width[1]) if width else 32] += 1
            local = widths["LDL"].total() + widths["STL"].total()
            found.append(Code(arch, *demangled(symbol), *usage[arch, symbol], local, widths["LDG"], widths["STG"], idle_loops(text)))
    return found


def breaches(code: Code, budget: Budget | None) -> list[str]:
    found = [
        f"{n} {what}"
        for n, what in (
            (code.stack, "bytes of stack"),
            (code.local, "accesses to local memory"),
            (code.idle, "loops that wait for what they do not ask"),
        )
        if n
    ]
    if budget is None:
        return [*found, "no budget beside the kernel"]
    if code.registers > budget.registers:
        found.append(f"{code.registers} registers, planned {budget.registers}")
    if any(x in STORED for x, planned in zip(code.arguments, budget.arguments, strict=True) if planned == "S"):
        for what, seen, least in (("loads", code.loads, budget.loads), ("stores", code.stores, budget.stores)):
            if seen[128] < least:
                found.append(f"{seen[128]} {what} of 128 bits, planned {least}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", type=Path)
    module = parser.parse_args().module
    known, bad, used = budgets(), 0, set()
    found = sorted(codes(module), key=lambda c: (c.name, c.arguments, c.arch))
    for code in found:
        budget = next((b for b in known if b.fits(code.name, code.arguments)), None)
        used.add(budget)
        wrong = breaches(code, budget)
        bad += bool(wrong)
        name = f"{code.name}<{', '.join(code.arguments)}>"
        line = f"{code.arch:7}{code.registers:4} registers, 128 bit: {code.loads[128]} loads, {code.stores[128]} stores  {name}"
        print(line, *wrong, sep="\n    BREACH: ")
    idle = [b.name for b in known if b not in used]
    print(f"{len(found)} kernels, {bad} breaches of a budget" + (f"; budgets without a kernel: {', '.join(idle)}" if idle else ""))
    return int(bad > 0 or bool(idle) or not found)


if __name__ == "__main__":
    sys.exit(main())
