"""The inverse problems example: what is hidden, how it is judged, and what its training follows."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

import implicitopt
import inverse_problems
from generators import Architecture, Search
from inverse_problems import Restoration, adam_codes, corrupt, psnr, windows

TINY = Architecture(4, (1, 8), (4, 4), 2)


def test_windows_are_squares_of_20_in_64_anywhere_within_the_image():
    visible = windows(400, 64, torch.Generator().manual_seed(0))
    corners = set()
    for mask in visible[:, 0].numpy():
        rows, columns = (np.flatnonzero((mask == 0).any(axis=axis)) for axis in (1, 0))
        assert len(rows) == len(columns) == 20
        assert np.array_equal(rows, np.arange(rows[0], rows[0] + 20))
        assert np.array_equal(columns, np.arange(columns[0], columns[0] + 20))
        assert (mask == 0).sum() == 400
        corners.add((rows[0], columns[0]))
    first = np.array(sorted(corners))
    assert first.min() == 0
    assert first.max() == 44
    assert len(corners) > 300


def test_windows_scale_with_the_image():
    assert (windows(3, 32, torch.Generator()) == 0).sum().item() == 3 * 10**2


def test_noise_is_half_of_the_papers_in_pixels_from_0_to_1():
    images = torch.full((50, 3, 16, 16), 0.5)
    for task, sigma in (("denoise-0.2", 0.1), ("denoise-0.4", 0.2)):
        given, visible = corrupt(images, task, seed=0)
        assert (given - images).std().item() == pytest.approx(sigma, rel=0.02)
        assert (visible == 1).all()
        assert torch.equal(given, corrupt(images, task, seed=0)[0])
    assert (images == 0.5).all()


def test_psnr_is_the_median_in_both_conventions():
    torch.manual_seed(0)
    images, shown = torch.rand(2, 5, 3, 4, 4)
    each, papers = [], []
    for a, b in zip(images.numpy(), shown.numpy(), strict=True):
        each.append(20 * np.log10(1 / np.sqrt(((a - b) ** 2).mean())))
        # Pixels in [−1, 1], and a peak of 1 all the same.
        papers.append(20 * np.log10(1 / np.sqrt(((2 * a - 2 * b) ** 2).mean())))
    found = psnr(shown, images)
    assert found["psnr"] == pytest.approx(np.median(each), rel=1e-5)
    assert found["psnr_paper"] == pytest.approx(np.median(papers), rel=1e-5)


class Linear(torch.nn.Module):
    """A decoder whose best code has a closed form."""

    latent = 3

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(3, 16, generator=torch.manual_seed(0)))

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return (codes @ self.weight).reshape(-1, 1, 4, 4)


def test_adam_finds_the_ridge_solution_of_the_visible_pixels():
    decoder, given = Linear(), torch.rand(1, 1, 4, 4, generator=torch.manual_seed(1))
    visible = torch.ones(1, 1, 4, 4)
    visible[..., :2] = 0
    options = {"decay": 0.5, "rate": 0.02, "seconds": 1.0}
    found = adam_codes(decoder, given, visible, **options)
    seen = visible.flatten().bool().numpy()
    a, b = decoder.weight.T.numpy()[seen], given.flatten().numpy()[seen]
    expected = np.linalg.solve(a.T @ a + 0.25 * np.eye(3), a.T @ b)
    assert np.allclose(found[0].numpy(), expected, atol=1e-2)


@pytest.mark.parametrize("task", ["inpaint", "denoise-0.4"])
@pytest.mark.parametrize("kind", [implicitopt.FrozenInput, implicitopt.Implicit])
@pytest.mark.filterwarnings("ignore::implicitopt.AdjointWarning")
def test_training_follows_the_clean_image_and_leaves_the_data_alone(task, kind):
    torch.manual_seed(0)
    decoder = TINY.equilibrium()
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    before = images.clone()
    adjoint = kind(tol=3e-2, max_steps=20)
    objective = Restoration(decoder, images, task, adjoint, Search(10, 0.1), penalty=1.0)
    loss, logged = objective(torch.arange(3))
    loss.backward()
    assert torch.equal(images, before)
    assert logged["mse"] > 0
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("options", [{"tasks": ("blur",)}, {"adjoints": ("frozen", "frozen")}])
def test_settings_are_checked(options):
    with pytest.raises(ValueError, match="must be different ones of"):
        inverse_problems.Settings(**options)


def test_a_missing_generator_is_named(tmp_path):
    arguments = [f"--generator={tmp_path}", f"--out={tmp_path / 'out'}", "--quiet"]
    with pytest.raises(FileNotFoundError, match=r"decoder-jiio\.json is not there"):
        inverse_problems.main(arguments)


@pytest.mark.slow
def test_smoke_on_real_faces(tmp_path, data_folder):
    out = tmp_path / "out"
    inverse_problems.main(["--preset=smoke", f"--data={data_folder}", f"--out={out}", "--quiet"])
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))["results"]
    for task, found in results.items():
        assert (out / f"{task}.png").stat().st_size > 1000
        for row in found.values():
            assert row["psnr"] - row["psnr_paper"] == pytest.approx(6.0206, abs=1e-3)
    # Noise of σ = 0.4 on [−1, 1] leaves 13.98 dB; a window's loss depends on the pictures.
    assert results["denoise-0.4"]["given"]["psnr"] == pytest.approx(13.98, abs=0.2)
    assert results["denoise-0.4"]["jiio"]["psnr"] > 12
