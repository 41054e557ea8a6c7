"""The tutorials run, and what each shows is so: with the data of IMPLICITOPT_DATA, and without.

The docs build runs them too, for their pages; here their results are looked at.
"""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
import matplotlib.pyplot  # noqa: E402

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "tutorials"
CONFIG = FOLDER.parent.parent / "mkdocs.yml"
SCRIPTS = sorted(FOLDER.glob("*.py"))
CLAIMS: dict[str, Callable[[dict[str, Any]], None]] = {}


def claims(name: str) -> Callable:
    """Register what must hold after the tutorial of that name, given its variables."""

    def register(check: Callable[[dict[str, Any]], None]) -> Callable:
        CLAIMS[name] = check
        return check

    return register


@claims("1_invert_a_generator")
def the_generator_is_inverted(found: dict[str, Any]) -> None:
    psnr, held_out, average = found["psnr"], found["held_out"], found["average"]
    assert psnr(found["reconstructed"], held_out) > psnr(average, held_out) + 3
    hidden, inpainted = found["hidden"], found["inpainted"]
    assert psnr(inpainted, held_out, hidden) > psnr(average, held_out, hidden)
    assert psnr(inpainted, held_out, 1 - hidden) > psnr(average, held_out, 1 - hidden) + 3


@claims("2_adversarial_training")
def robust_training_withstands_the_referee(found: dict[str, Any]) -> None:
    (plain_clean, *_, plain), (clean, _, referee, _) = (
        found["table"][name] for name in ("plain", "robust")
    )
    assert plain_clean > 0.85
    assert clean > plain_clean - 0.08
    assert referee > plain + 0.2


@claims("3_meta_learning")
def tasks_of_new_alphabets_are_learned(found: dict[str, Any]) -> None:
    assert found["after"] > found["before"] + 0.1
    assert found["after"] > 0.6


@claims("4_hyperparameters")
def the_hypergradients_are_those_of_the_closed_forms(found: dict[str, Any]) -> None:
    for name in ("weights_apart", "gradients_apart"):
        assert found[name] < 1e-6
        assert found[f"{name}_logistic"] < 1e-6
    assert min(found["tuned"]) < found["on_grid"].min()
    assert min(found["errors"]) < 0.7 * found["errors"][0]


@claims("5_your_own_model")
def a_plain_module_is_fit(found: dict[str, Any]) -> None:
    assert found["losses"][-1] < 0.4 * found["losses"][0]
    assert found["apart"] < 1e-2
    assert found["ddp_apart"] < 1e-6
    full = found["precisions"]["float32"].value.mean()
    for sol in found["precisions"].values():
        assert abs(sol.value.float().mean() - full) < 0.05 * full


@claims("6_accelerator")
def the_accelerator_saves_half_of_the_calls(found: dict[str, Any]) -> None:
    counts, solutions = found["counts"], found["solutions"]
    assert counts["Barzilai–Borwein"] < 0.6 * counts["Picard"]
    for name in ("Broyden", "Anderson"):
        assert solutions[name].converged.all()
    for name in ("Picard", "Barzilai–Borwein"):
        assert not solutions[name].converged.any()


@claims("7_inverse_problems")
def implicit_is_the_finite_difference_and_learns_the_decay(found: dict[str, Any]) -> None:
    slopes, psnr, shown = found["slopes"], found["psnr"], found["shown"]
    assert abs(slopes["Implicit"] - slopes["finite differences"]) < 1e-6
    assert abs(slopes["FrozenInput"] - slopes["finite differences"]) > 1e-3
    decay = {name: p["log_decay"].item() for name, (p, _) in found["trained"].items()}
    assert decay["FrozenInput"] == 0
    assert decay["Implicit"] > 0.1
    for name in decay:
        assert psnr(shown[name]) > psnr(shown["average"]) + 0.5
    assert abs(psnr(shown["Implicit"]) - psnr(shown["FrozenInput"])) < 0.5


@claims("8_coming_from")
def the_peers_agree_and_the_joint_solve_calls_the_layer_less(found: dict[str, Any]) -> None:
    assert all(apart < 1e-6 for apart in found["apart"].values())
    assert len(found["apart"]) >= sum(found["present"].values())
    calls, value = found["nested"][-1]
    assert found["joint"].value.mean() < 1.001 * value
    assert found["joint"].sweeps.f < calls / 10


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_each_is_a_page_that_ends_with_what_to_try_next(script):
    text = script.read_text(encoding="utf-8")
    assert re.match(r'"""\n# \S', text)
    assert re.findall(r"^# ## (.+)$", text, re.MULTILINE)[-1] == "What to try next"
    assert "plt.show()" in text
    assert script.stem in CLAIMS


@pytest.mark.slow
@pytest.mark.parametrize("code", ["print(1 + 1)", "print(1 / 0)"])
def test_code_that_fails_fails_the_build(code, tmp_path):
    pytest.importorskip("mkdocs_gallery")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Home\n", encoding="utf-8")
    scripts = tmp_path / "examples" / "tutorials"
    scripts.mkdir(parents=True)
    (scripts / "README.md").write_text("# Tutorials\n", encoding="utf-8")
    (scripts / "1_one.py").write_text(f'"""\n# One\n\nText.\n"""\n\n{code}\n')
    options = re.search(
        r"^  - gallery:.*\n(?:      .*\n)+", CONFIG.read_text("utf-8"), re.MULTILINE
    )
    (tmp_path / "mkdocs.yml").write_text(
        f"site_name: one\ntheme: material\nnav:\n  - index.md\n  - Tutorials: tutorials\n"
        f"plugins:\n{options[0]}",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "mkdocs", "build"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == ("0" not in code), done.stderr
    assert ("ZeroDivisionError" in done.stderr) == ("0" in code)


@pytest.mark.slow
@pytest.mark.parametrize("data", ["with data", "without"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_its_claims_hold(script, data, monkeypatch, request):
    reads = "IMPLICITOPT_DATA" in script.read_text(encoding="utf-8")
    if data == "with data" and reads:
        request.getfixturevalue("data_folder")
    elif data == "with data":
        pytest.skip("it reads no files: one run is enough")
    monkeypatch.setattr(matplotlib.pyplot, "show", lambda: matplotlib.pyplot.close("all"))
    if data == "without":
        monkeypatch.delenv("IMPLICITOPT_DATA", raising=False)
    with torch.random.fork_rng(devices=[]):
        CLAIMS[script.stem](runpy.run_path(str(script), run_name="__main__"))
