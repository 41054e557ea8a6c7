"""What `implicitopt.check` returns."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Finding", "Report"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    name: str
    ok: bool | None  #: None: could not be told, or does not apply
    detail: str  #: what was found
    remedy: str = ""  #: what to do about it
    value: Any = None  #: the number found, where there is one


@dataclass(frozen=True)
class Report:
    """What :func:`implicitopt.check` found; ``print(report)`` to read it.

    >>> import torch, implicitopt
    >>> report = implicitopt.check(
    ...     lambda z, x: 2 * z + x, lambda z, x: (z**2).sum(-1), torch.ones(2, 3), quiet=True
    ... )
    >>> report.ok, [finding.name for finding in report.findings if finding.ok is False]
    (False, ['plain iteration', 'contraction'])
    >>> report.contraction
    tensor([2., 2.])
    """

    findings: tuple[Finding, ...]  #: in the order in which they were made

    def __getitem__(self, name: str) -> Finding:
        """The finding of that name."""
        for finding in self.findings:
            if finding.name == name:
                return finding
        names = ", ".join(finding.name for finding in self.findings)
        raise KeyError(f"no finding {name!r}; this report has {names}")

    @property
    def ok(self) -> bool:
        """Nothing was found to be wrong."""
        return all(finding.ok is not False for finding in self.findings)

    @property
    def contraction(self) -> Tensor | None:
        """Spectral radius of ∂f/∂z per problem, ``(B,)``."""
        value: Tensor | None = self._value("contraction")
        return value

    @property
    def rate(self) -> Tensor | None:
        """Factor by which a plain step z ← f(z, x) shrinks the residual, per problem, ``(B,)``."""
        value: Tensor | None = self._value("plain iteration")
        return value

    @property
    def coupled(self) -> bool | None:
        """Whether a problem's f, loss or projection depends on the other problems."""
        ok = self._of("coupling")
        return None if ok is None or ok.ok is None else not ok.ok

    @property
    def gradient_error(self) -> float | None:
        """Largest relative difference of derivatives of f and the loss from finite differences."""
        found = [self._value(name) for name in ("derivatives of f", "derivatives of loss")]
        return max((value for value in found if value is not None), default=None)

    @property
    def reduced_gradient_error(self) -> float | None:
        """The same of the gradient of ℓ(z(x), x) in x, z(x) being the fixed point."""
        value: float | None = self._value("reduced gradient")
        return value

    def _of(self, name: str) -> Finding | None:
        return next((found for found in self.findings if found.name == name), None)

    def _value(self, name: str) -> Any:
        found = self._of(name)
        return None if found is None else found.value

    def __str__(self) -> str:
        width = max(len(finding.name) for finding in self.findings)
        lines = []
        for finding in self.findings:
            mark = {True: "ok", False: "FAIL", None: "--"}[finding.ok]
            indent = " " * (width + 8)
            text = textwrap.fill(finding.detail, 100 - len(indent), break_on_hyphens=False)
            first, *more = text.split("\n")
            lines.append(f"{mark:<4}  {finding.name:<{width}}  {first}")
            lines += [indent + line for line in more]
            if finding.remedy:
                remedy = textwrap.wrap(finding.remedy, 98 - len(indent), break_on_hyphens=False)
                lines += [f"{indent}{'  ' if k else '→ '}{line}" for k, line in enumerate(remedy)]
        failed = sum(finding.ok is False for finding in self.findings)
        lines.append(
            f"{failed} of {len(self.findings)} checks failed." if failed else "All is well."
        )
        return "\n".join(line.rstrip() for line in lines)
