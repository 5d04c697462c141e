# SPDX-License-Identifier: Apache-2.0
"""One function of a framework and what stands in its place: the dispatch, and what shadow mode compares.

A site is chosen by behaviour, not by version: the framework's own function answers a few small calls, and the first of our
choices that gives the same answers replaces it. One that matches none of them is left alone.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlkern import backends
from rlkern.testing import budget, error

logger = logging.getLogger("rlkern.integrations")
Call = tuple[tuple[Any, ...], dict[str, Any]]
_CLOSE = 2e-5  # of the largest value: two float32 orders of summation agree, two formulas do not
_SAYS = 4096  # shadow mode says where it stands after 1, 2, 4, ... calls, up to so many at a time
_TEXTS = 20  # a function says so many things at most: a long run must not fill its log


def _never(*args: Any, **kwargs: Any) -> bool:
    return False


class Uncovered(Exception):
    """A call, by its options or its tensors, that rlkern leaves to the framework's own function."""


class _Inside(threading.local):
    """Set while shadow mode runs: what the original calls are originals too."""

    shadow = False


_inside = _Inside()


@contextlib.contextmanager
def in_shadow() -> Iterator[None]:
    before, _inside.shadow = _inside.shadow, True
    try:
        yield
    finally:
        _inside.shadow = before


@dataclass
class Worst:
    """What shadow mode found of one function: errors are against the original in float64, as shares of the budget."""

    calls: int = 0
    left: int = 0
    share: float = 0.0
    error: float = 0.0
    where: str = ""

    @property
    def seen(self) -> bool:
        return bool(self.calls or self.left)

    def line(self) -> str:
        left = f", {self.left} not compared" if self.left else ""
        if not self.calls:
            return f"no call compared{left}"
        inside = "inside" if self.share <= 1 else "OVER"
        return f"{self.calls} calls, worst error {self.error:.2e} in {self.where}, {self.share:.0%} of the budget: {inside}{left}"

    def see(self, share: float, found: float, where: str) -> None:
        if share > self.share or not self.where:
            self.share, self.error, self.where = share, found, where


@dataclass
class Site:
    """`module` and `name`: the function, "Class.method" for a method. `choices`: callables with the original's signature.
    `probes`: the calls that decide among them, made only when asked. `op`: the raw op whose backend decides on an accelerator.
    `stays`: calls that are the framework's, told from the arguments at the cost of a comparison.

    For shadow mode. `grads`: the arguments that carry gradients. `exact`: the formula in float64, where the original itself
    rounds to float32. The scale of an error is what the absolute terms of a sum add up to. `terms`: the argument whose size,
    under this sign, makes the terms positive; `scale`: or of what stands at the same place in the result and below it, from the
    arguments in float64. `dice`: it draws random numbers on the host; all that are compared draw the same."""

    module: str
    name: str
    choices: Sequence[Callable[..., Any]]
    probes: Callable[[Any], Sequence[Call]]
    op: str
    grads: tuple[str, ...] = ()
    exact: Callable[..., Any] | None = None
    terms: tuple[str, float] | None = None
    stays: Callable[..., bool] | None = None
    scale: Callable[..., Any] | None = None
    dice: bool = False
    original: Any = None
    probed: Any = None
    replacement: Any = None
    chosen: Callable[..., Any] | None = None
    why_left: str = "its module is not imported yet"
    mode: str = "on"
    worst: Worst = field(default_factory=Worst)
    said: set[str] = field(default_factory=set)

    @property
    def target(self) -> str:
        return f"{self.module}.{self.name}"

    # ---- choosing ---------------------------------------------------------------------------------------------------
    def choose(self, original: Callable[..., Any]) -> bool:
        """Find the choice that answers as `original` does."""
        self.probed = original
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                calls = list(self.probes(original))
                for choice in self.choices:
                    if all(_same(original, choice, call) for call in calls):
                        self.chosen, self.why_left = choice, ""
                        return True
        except Exception as problem:  # a framework that cannot be asked is left alone
            self.why_left = f"it could not be probed: {type(problem).__name__}: {problem}"
            return False
        self.why_left = "it answers the probes as no version that rlkern knows"
        return False

    def replace(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A function under the original's own name, by which it is pickled."""
        self.original, stays = original, self.stays or _never

        @functools.wraps(original)
        def patched(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs) if stays(*args, **kwargs) else self.call(args, kwargs)

        patched.__rlkern__ = self  # type: ignore[attr-defined]
        self.replacement = patched
        return patched

    def of_framework(self, *args: Any, **kwargs: Any) -> Any:
        """The original, for a choice that does a part of it alone."""
        return (self.original if self.original is not None else self.probed)(*args, **kwargs)

    # ---- calling ----------------------------------------------------------------------------------------------------
    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _inside.shadow or self.chosen is None or torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        if self.mode == "shadow":
            return self.shadow(args, kwargs)
        try:
            self.refuse_foreign((*args, *kwargs.values()))
            return self.chosen(*args, **kwargs)
        except Uncovered as reason:
            self.say(f"{self.target}: stays with the framework: {reason}")
        except (ValueError, TypeError, AttributeError, AssertionError) as reason:
            self.say(f"{self.target}: rlkern refuses what the framework is left to judge: {reason}")
        return self.original(*args, **kwargs)  # raises what the framework raises

    def refuse_foreign(self, values: Sequence[Any]) -> None:
        """Tensor subclasses, and accelerators on which rlkern has nothing but plain torch."""
        device = None
        for x in values:
            if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
                if isinstance(x, Tensor):
                    raise Uncovered(f"a tensor is a {type(x).__name__}")
            elif device is None:
                device = x.device.type
                if device != "cpu" and backends.pick(self.op, x) == backends.TORCH:
                    raise Uncovered(f"rlkern has no kernel for {device} here")

    def say(self, text: str, level: int = logging.WARNING) -> None:
        """Once per text."""
        if text not in self.said and len(self.said) < _TEXTS:
            self.said.add(text)
            logger.log(level, "rlkern: %s", text)

    # ---- shadow mode ------------------------------------------------------------------------------------------------
    def shadow(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The framework's result; rlkern runs beside it and the error is noted."""
        with in_shadow():
            spare = _map((args, kwargs), lambda x: x.detach().clone())  # the original may write what it is given
            dice = torch.get_rng_state() if self.dice else None
            found = self.original(*args, **kwargs)
            try:
                self.judge(spare[0], spare[1], dice)
            except Exception as problem:  # a comparison must not stop a run
                self.missed(problem)
        return found

    def choice(self) -> Callable[..., Any]:
        if self.chosen is None:
            raise Uncovered("it is not patched")
        return self.chosen

    def missed(self, problem: Exception) -> None:
        self.worst.left += 1
        level = logging.INFO if isinstance(problem, Uncovered) else logging.WARNING
        self.say(f"{self.target}: not compared: {type(problem).__name__}: {problem}", level)

    def judge(self, args: tuple[Any, ...], kwargs: dict[str, Any], dice: Tensor | None = None) -> None:
        self.refuse_foreign((*args, *kwargs.values()))
        names = list(inspect.signature(self.original).parameters)
        wide_args, wide_kwargs = double((args, kwargs))
        if self.dice and dice is None:
            dice = torch.get_rng_state()
        ours = _run(self.choice(), args, kwargs, names, self.grads, dice)
        theirs = _run(self.original, args, kwargs, names, self.grads, dice)
        wide = dict(zip(names, wide_args, strict=False)) | wide_kwargs
        true = self.exact or self.original
        exact, sizes = _run(true, (), wide, names, self.grads, dice), {}
        if self.terms is not None:
            name, sign = self.terms
            sizes = _run(true, (), wide | {name: sign * wide[name].abs()}, names, self.grads, dice)
        if self.scale is not None:
            found = self.scale(**wide)
            sizes |= found if isinstance(found, dict) else dict(leaves(found))
        self.compare(ours, theirs, exact, sizes, args, kwargs)

    def compare(
        self, ours: dict[str, Tensor], theirs: dict[str, Tensor], exact: dict[str, Tensor], sizes: dict[str, Tensor], *given: Any
    ) -> None:
        """Errors against the original in float64, by the budget of every test, in the coarsest dtype that is `given`."""
        seen: list[torch.dtype] = []
        _map(given, lambda x: seen.append(x.dtype) or x)  # type: ignore[func-returns-value]
        coarsest = max(seen, key=_eps, default=torch.float32)
        worst = self.worst
        worst.calls += 1
        for where, true in exact.items():
            scale = max([_largest(true), *(_largest(x) for of, x in sizes.items() if where.startswith(of))])
            dtype = max(coarsest, theirs[where].dtype, key=_eps)
            room = budget(theirs[where], true, dtype, scale)
            off = error(ours[where], true)
            share = 0.0 if off == 0 else off / room if room else float("inf")
            worst.see(share, off, where)
            if share > 1:
                self.say(f"{self.target}: {where} is off by {off:.2e}, the budget is {room:.2e} (the framework's is used)")
        if worst.calls & (worst.calls - 1) == 0 or worst.calls % _SAYS == 0:
            logger.info("rlkern: %s: %s", self.target, worst.line())


# ---- trees of tensors ------------------------------------------------------------------------------------------------
def _map(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(x, Tensor):
        return change(x) if type(x) in (Tensor, torch.nn.Parameter) else x
    if isinstance(x, tuple) and not hasattr(x, "_fields"):
        return tuple(_map(y, change) for y in x)
    if type(x) is list:
        return [_map(y, change) for y in x]
    if type(x) is dict:
        return {k: _map(y, change) for k, y in x.items()}
    if isinstance(x, Mapping) and hasattr(x, "apply"):  # a TensorDict
        return x.apply(change)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        same = copy.copy(x)
        same.__dict__.update({k: _map(y, change) for k, y in vars(x).items()})
        return same
    return x


def double(x: Any) -> Any:
    """The same in float64."""
    return _map(x, lambda t: t.double() if t.is_floating_point() else t)


def leaves(x: Any, where: str = "result") -> Iterator[tuple[str, Tensor]]:
    """Tensors and numbers of a result, by where they stand."""
    if isinstance(x, Tensor):
        yield where, x
    elif isinstance(x, (int, float)):
        yield where, torch.tensor(float(x))  # a metric: float32 before it was a number
    elif isinstance(x, Mapping):
        for k, y in x.items():
            yield from leaves(y, f"{where}[{k!r}]")
    elif isinstance(x, (tuple, list)):
        for i, y in enumerate(x):
            yield from leaves(y, f"{where}[{i}]")
    elif dataclasses.is_dataclass(x) and not isinstance(x, type):
        for k, y in vars(x).items():
            yield from leaves(y, f"{where}.{k}")


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _largest(x: Tensor) -> float:
    x = x.detach().double().abs()
    x = x[x.isfinite()]
    return float(x.max()) if x.numel() else 0.0


def _run(
    function: Callable[..., Any], args: Any, kwargs: Any, names: list[str], grads: tuple[str, ...], dice: Tensor | None = None
) -> dict[str, Tensor]:
    """Results, and the gradients of their sum; the dice lie afterwards as they lay before."""
    if dice is not None:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(dice)
            return _run(function, args, kwargs, names, grads)
    args, kwargs = _map((args, kwargs), lambda x: x.detach())
    given = {names[i]: x for i, x in enumerate(args) if i < len(names)} | kwargs
    inputs = {n: given[n].requires_grad_() for n in grads if isinstance(given.get(n), Tensor) and given[n].is_floating_point()}
    with torch.enable_grad():
        found = dict(leaves(function(*args, **kwargs)))
        live = [x.sum() for x in found.values() if x.requires_grad]
        if live and inputs:
            derived = torch.autograd.grad(sum(live[1:], live[0]), list(inputs.values()), allow_unused=True)
            found |= {f"gradient of {n}": g for n, g in zip(inputs, derived, strict=True) if g is not None}
    return {k: x.detach() for k, x in found.items()}


def _outcome(function: Callable[..., Any], call: Call) -> list[tuple[str, Tensor]] | type[Exception]:
    try:
        args, kwargs = _map(call, lambda x: x.clone())
        torch.default_generator.manual_seed(0)  # whose state `choose` keeps
        return list(leaves(function(*args, **kwargs)))
    except Exception as refusal:
        return type(refusal)


def _same(original: Callable[..., Any], choice: Callable[..., Any], call: Call) -> bool:
    theirs, ours = _outcome(original, call), _outcome(choice, call)
    if ours is Uncovered:
        return True
    if isinstance(theirs, type) or isinstance(ours, type):
        return isinstance(theirs, type) and isinstance(ours, type)
    if [w for w, _ in theirs] != [w for w, _ in ours]:
        return False
    for (_, a), (_, b) in zip(theirs, ours, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if error(b, a) > _CLOSE * max(_largest(a), 1e-6):
            return False
    return True
