"""Faults put into a copy of the adjoint code: the suite has to see each of them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUITE = ["tests/test_gradients.py", "tests/test_linear_quadratic.py"]

#: name -> (file, what it says, what it says with the fault)
FAULTS = {
    "the sign of the first derivative": (
        "adjoint/implicit.py", "        return -w, None, None, None",
        "        return w, None, None, None",
    ),
    "the sign of the root that second derivatives go through": (
        "adjoint/implicit.py", "return -ctx.system.solve(v, grads[0], transpose=True), None, None",
        "return ctx.system.solve(v, grads[0], transpose=True), None, None",
    ),
    "a term of the second derivative is missing": (
        "adjoint/implicit.py", "return None, -w, grads[0], None", "return None, -w, None, None",
    ),
    "the linear root solves with J for its transpose": (
        "adjoint/implicit.py", "transpose=not ctx.transpose", "transpose=ctx.transpose",
    ),
    "the sign of the linear root": (
        "adjoint/implicit.py", "solved = -ctx.system.solve(v, grads[0]",
        "solved = ctx.system.solve(v, grads[0]",
    ),
    "the constraint does not move with its parameters": (
        "adjoint/envelope.py",
        "return lagrangian + (grad * kkt.project(point.x - grad)).sum(dim=1)", "return lagrangian",
    ),
    "a constrained system is taken for symmetric": (
        "adjoint/implicit.py", "symmetric=kkt.project is None", "symmetric=True",
    ),
    "the frozen input's state does not answer to itself": (
        "adjoint/implicit.py", "return kkt.state_map(z, point.x) - z",
        "return kkt.state_map(point.z, point.x) - z",
    ),
    "second derivatives of the value by the envelope": (
        "adjoint/implicit.py", "(None, grads[0], None) if recorded else (grads[0], None, None)",
        "(grads[0], None, None)",
    ),
    "the third derivative is 0": (
        "adjoint/implicit.py", "solved = _NoThird.apply(solved, v, grads[0])", "pass",
    ),
    "the adjoint's failure is not reported": (
        "adjoint/implicit.py", "solved = result.converged & sound", "solved = sound",
    ),
    "the Lagrangian leaves out the multiplier": (
        "kkt.py", "(mu * (self.state_map(z, x) - z)).sum(dim=1)",
        "(0.5 * mu * (self.state_map(z, x) - z)).sum(dim=1)",
    ),
    "the multiplier of a maximum has the sign of a minimum's": (
        "solve.py", "mu=z_of(kkt.sign * mu)", "mu=z_of(mu)",
    ),
    "a failed problem's derivatives reach the parameters": (
        "solve.py", "donor = sound.to(torch.uint8).argmax()", "return point",
    ),
}  # fmt: skip


def run_suite(folder):
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-n0", "-x", "-q", "-p", "no:cacheprovider", *SUITE]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800
    )


@pytest.fixture
def copy(tmp_path):
    for name in ("implicitopt", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "examples").mkdir()
    # Proof that it is the copy that is tested: the suite fails to import otherwise.
    for name in SUITE:
        path = tmp_path / name
        check = f"\nimport implicitopt as _tested\nassert {str(tmp_path)!r} in _tested.__file__\n"
        path.write_text(path.read_text(encoding="utf-8") + check, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_fits_the_code(name):
    file, before, after = FAULTS[name]
    assert (ROOT / "implicitopt" / file).read_text(encoding="utf-8").count(before) == 1
    assert before != after


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_the_suite_sees(copy, name):
    file, before, after = FAULTS[name]
    path = copy / "implicitopt" / file
    path.write_text(path.read_text(encoding="utf-8").replace(before, after), encoding="utf-8")
    done = run_suite(copy)
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    assert "1 failed" in done.stdout


@pytest.mark.slow
def test_without_a_fault_the_suite_passes(copy):
    done = run_suite(copy)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
