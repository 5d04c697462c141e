# SPDX-License-Identifier: Apache-2.0
"""`rlkern verify`: every op, dtype, mask kind and backend against float64 and against the framework's formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import Tensor

import rlkern
from rlkern import backends, testing
from rlkern.cli import against as formulas
from rlkern.cli.checks import Check, Outputs
from rlkern.cli.checks_loss import CHECKS, slack
from rlkern.cli.fields import Data, data_of

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MASKS = (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32)


class Cell(NamedTuple):
    """One op in one dtype with one mask kind on one backend: its worst output. `problem` says why it has no error."""

    op: str
    backend: str
    dtype: torch.dtype
    mask: torch.dtype
    output: str = ""
    error: float = math.nan
    budget: float = math.nan
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem and self.error <= self.budget

    @property
    def used(self) -> float:
        """Share of the budget: what makes one cell worse than another."""
        if self.problem or math.isnan(self.error):
            return math.inf
        return self.error / self.budget if self.budget > 0 else (math.inf if self.error > 0 else 0.0)


class _Ruler(NamedTuple):
    """The exact answers of one check in one dtype and mask kind, and what each element may be off by."""

    exact: Outputs
    near: Tensor | None
    allowed: dict[str, Tensor]


def _away(x: Tensor, near: Tensor | None) -> Tensor:
    """Without the tokens so near a clip bound that rounding decides their side."""
    x = x.detach().double()
    return x if near is None or x.shape != near.shape else torch.where(near, 0.0, x)


def _ruler(check: Check, data: Data, theirs: formulas.Formulas) -> _Ruler:
    # the exact answer is that of the rounded inputs; float masks keep their weights
    wide = data.to(torch.float64, torch.float64 if data.mask.is_floating_point() else torch.int64)
    exact = check.theirs(formulas.plain(), wide)
    framework = check.theirs(theirs, data)
    scale, dtype = check.scale(wide), data.old.dtype
    eps = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
    near = check.near(wide, eps) if check.near else None
    allowed = {}
    for name, value in exact.items():
        terms = torch.as_tensor(scale[name] if isinstance(scale, dict) else scale, dtype=torch.float64)
        # the framework's own largest error, and some roundings of the row's largest sum of terms
        largest = terms.abs().amax(-1, keepdim=True) if terms.dim() == 2 else terms.abs()
        own = testing.budget(_away(framework[name], near), _away(value, near), dtype, 0.0)
        room = own + 4 * torch.finfo(dtype).eps * largest
        allowed[name] = (room + (slack(check, name, near, wide) if near is not None else 0.0)).expand(value.shape)
    return _Ruler(exact, near, allowed)


def _worst(value: Tensor, exact: Tensor, allowed: Tensor) -> tuple[float, float]:
    """(error, budget) of the element that uses most of its budget."""
    if value.numel() == 0:
        return 0.0, 0.0
    same = (value == exact) | (value.isnan() & exact.isnan())
    gap = torch.where(same, 0.0, (value - exact).abs()).nan_to_num(nan=math.inf)
    used = torch.where(gap > 0, gap / allowed, 0.0)
    at = int(used.argmax())
    return float(gap.flatten()[at]), float(allowed.flatten()[at])


def _measure(check: Check, data: Data, backend: str, device: str, ruler: _Ruler) -> Cell:
    cell = Cell(check.op, backend, data.old.dtype, data.mask.dtype)
    try:
        with backends.use_backend(backend):
            found = {name: x.cpu() for name, x in check.ours(data.on(device)).items()}
    except AttributeError as error:
        return cell._replace(problem=f"missing: {error}")
    except Exception as error:  # a refusal and a crash are both a row of the table
        return cell._replace(problem=f"{type(error).__name__}: {error}")
    worst = cell
    for name, exact in ruler.exact.items():
        value = found[name]
        if value.shape != exact.shape:
            problem = f"{name} has shape {tuple(value.shape)}, not {tuple(exact.shape)}"
            return cell._replace(output=name, problem=problem)
        gap, budget = _worst(_away(value, ruler.near), _away(exact, ruler.near), ruler.allowed[name])
        new = cell._replace(output=name, error=gap, budget=budget)
        if not worst.output or new.used > worst.used:
            worst = new
    return worst


def measure(
    batch: rlkern.RolloutBatch,
    names: Sequence[str],
    against: str = "plain",
    step: Callable[[Sequence[Check]], Any] = lambda checks: checks,
    device: str = "cpu",
) -> tuple[list[Cell], list[str]]:
    """Every cell, and a line for each op that the batch lacks the fields for."""
    theirs = formulas.verl() if against == "verl" else formulas.plain()
    data, cells, skipped = data_of(batch), [], []
    for check in step(CHECKS):
        lacking = [field for field in check.needs if getattr(data, field) is None]
        if lacking:
            skipped.append(f"{check.op}: the batch has no {', '.join(lacking)}")
            continue
        for dtype in DTYPES:
            for mask in MASKS:
                here = data.to(dtype, mask)
                ruler = _ruler(check, here, theirs)
                cells += [_measure(check, here, name, device, ruler) for name in names]
    return cells, skipped


def default_backends(device: str) -> list[str]:
    """The backends that run on tensors of that device."""
    return [name for name in backends.NAMES if not backends.why_not(name, "_gae_fwd", device.partition(":")[0])]


def table(cells: Sequence[Cell], every: bool, against: str) -> Table:
    """One row per op and backend with its worst dtype and mask kind, or one per cell."""
    shown: dict[Any, Cell] = {}
    for cell in cells:
        key = cell if every else (cell.op, cell.backend)
        if key not in shown or cell.used > shown[key].used:
            shown[key] = cell
    title = f"|rlkern - float64| against the budget: 2 max |{against} - float64| + 4 eps (the row's largest sum of |terms|)"
    found = Table(title=title, title_justify="left", title_style="")
    columns = ("op", "backend", "dtype", "mask", "worst output", "error", "budget", "used", "")
    for name in columns:
        found.add_column(name, justify="right" if name in ("error", "budget", "used") else "left", overflow="fold")
    last = ""
    for cell in shown.values():
        numbers = [f"{cell.error:.1e}", f"{cell.budget:.1e}", f"{cell.used:.0%}"] if not cell.problem else ["", "", ""]
        kinds = [str(x).removeprefix("torch.") for x in (cell.dtype, cell.mask)]
        verdict = "[green]ok[/]" if cell.ok else "[red]BREACH[/]"
        name = cell.op if cell.op != last else ""
        last = cell.op
        found.add_row(name, cell.backend, *kinds, escape(cell.problem or cell.output), *numbers, verdict)
    return found


def verify(
    batch: rlkern.RolloutBatch, names: Sequence[str] | None, against: str, every: bool, console: Console, device: str = "cpu"
) -> bool:
    """Run the comparison and print it; True if every cell is inside its budget."""
    chosen = list(names or default_backends(device))
    tokens = int((batch.response_mask != 0).sum())
    console.print(
        f"{batch.shape[0]} responses of up to {batch.shape[1]} tokens, {tokens} trainable; on {device}, backends {', '.join(chosen)}; "
        f"{len(DTYPES)} dtypes x {len(MASKS)} mask kinds."
    )
    label = "the formula" if against == "plain" else f"verl {formulas.verl_version()}"

    def progress(checks: Sequence[Check]) -> Any:
        return track(checks, "checking", console=console, transient=True)

    cells, skipped = measure(batch, chosen, against, progress, device)
    console.print(table(cells, every, label))
    for line in skipped:
        console.print(f"not checked: {line}")
    bad = [cell for cell in cells if not cell.ok]
    console.print(
        f"{len(cells)} comparisons, {len(bad)} outside the budget." if bad else f"{len(cells)} comparisons, every error inside its budget."
    )
    return not bad
