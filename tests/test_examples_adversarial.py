"""The adversarial example: its loss and attacks against closed forms, and the script itself."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("accelerate")
pytest.importorskip("einops")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import adversarial
import implicitopt
from adversarial import PRESETS, training_attack
from attacks import (
    Attack,
    Robust,
    evaluate,
    judge,
    log_cross_entropy,
    mirrored,
    race,
    referee,
)
from data.images import Images
from experiment import parse

SCRIPT = Path(adversarial.__file__)


class Tiny(nn.Module):
    """A classifier with the interface of ``mdeq.Classifier`` whose equilibrium can be unrolled."""

    def __init__(self, linear: bool = False, classes: int = 3) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.inside = nn.Parameter(0.3 * torch.eye(5, dtype=torch.float64))
        outside = torch.randn(4, 5, generator=draw, dtype=torch.float64)
        self.outside = nn.Parameter(outside)
        self.head = nn.Module()
        self.head.linear = nn.Linear(5, classes, dtype=torch.float64)
        with torch.no_grad():
            for p in self.head.parameters():
                p.copy_(torch.randn(p.shape, generator=draw, dtype=p.dtype))
        self.linear = linear

    def inject(self, image: Tensor) -> tuple[Tensor]:
        return (image.flatten(1) @ self.outside.to(image.dtype),)

    def cell(self, z: tuple[Tensor], injection: tuple[Tensor]) -> tuple[Tensor]:
        inner = z[0] @ self.inside.to(z[0].dtype) + injection[0]
        return (inner if self.linear else inner.tanh(),)

    def f(self, z: tuple[Tensor], image: Tensor) -> tuple[Tensor]:
        return self.cell(z, self.inject(image))

    def start(self, image: Tensor) -> tuple[Tensor]:
        return (image.new_zeros(len(image), 5),)

    def logits(self, z: tuple[Tensor]) -> Tensor:
        linear = self.head.linear
        return z[0] @ linear.weight.to(z[0].dtype).T + linear.bias.to(z[0].dtype)

    def unrolled(self, image: Tensor) -> Tensor:
        """Logits after as many plain iterations as anyone needs."""
        z = self.start(image)
        for _ in range(40):
            z = self.f(z, image)
        return self.logits(z)


@pytest.fixture
def images() -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.rand(6, 1, 2, 2, generator=draw, dtype=torch.float64)


LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def worst_by_trial(model: Tiny, images: Tensor, labels: Tensor, radius: float) -> Tensor:
    """The largest cross-entropy over many points of the sphere, by unrolling."""
    draw = torch.Generator().manual_seed(2)
    delta = torch.randn(1000, *images.shape[1:], generator=draw, dtype=images.dtype)
    delta = radius * delta / delta.flatten(1).norm(dim=1)[:, None, None, None]
    worst = []
    with torch.no_grad():
        for image, label in zip(images, labels, strict=True):
            logits = model.unrolled(image + delta)
            worst.append(
                nn.functional.cross_entropy(
                    logits, label.expand(len(delta)), reduction="none"
                ).max()
            )
    return torch.stack(worst)


def test_log_cross_entropy_is_the_logarithm_of_torchs():
    logits = 5 * torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 7
    exact = logits.double().requires_grad_()
    expected = nn.functional.cross_entropy(exact, labels, reduction="none").log()
    (slopes,) = torch.autograd.grad(expected.sum(), exact)
    logits.requires_grad_()
    found = log_cross_entropy(logits, labels)
    (found_slopes,) = torch.autograd.grad(found.sum(), logits)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found_slopes, slopes.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("margin", [15.0, 19.9, 20.1, 60.0, 300.0])
def test_log_cross_entropy_keeps_its_gradient_where_the_classifier_is_sure(margin):
    logits = torch.tensor([[margin, 0.0]], requires_grad=True)
    value = log_cross_entropy(logits, torch.tensor([0]))
    (slopes,) = torch.autograd.grad(value.sum(), logits)
    assert value.item() == pytest.approx(-margin, rel=1e-5)
    torch.testing.assert_close(slopes, torch.tensor([[-1.0, 1.0]]), rtol=1e-4, atol=1e-4)


def test_log_cross_entropy_of_a_hopeless_image_is_finite():
    value = log_cross_entropy(torch.tensor([[-500.0, 0.0]]), torch.tensor([0]))
    assert value.exp().item() == pytest.approx(500.0, rel=1e-5)


ATTACKS = {
    "joint": Attack(0.5, 40),
    "one-shot": Attack(0.5, 60, implicitopt.OneShot()),
    "pgd": Attack.pgd(0.5, 30, rate=0.05),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_attacks_find_the_closed_form_of_a_linear_classifier(attack, images):
    """Two classes, z linear in the image: δ = ∓ε g/‖g‖, g the slope of the logits' difference."""
    model = Tiny(linear=True, classes=2)
    labels = LABELS % 2
    with torch.no_grad():
        gain = torch.linalg.inv(torch.eye(5, dtype=torch.float64) - model.inside)
        weight = model.head.linear.weight
        g = model.outside @ gain @ (weight[1] - weight[0])
        toward = torch.where(labels == 0, 1.0, -1.0)[:, None]
        expected = (0.5 * toward * g / g.norm()).reshape(images.shape)
    sol = attack(model, images, labels)
    torch.testing.assert_close(sol.x, expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_attacks_stay_in_the_ball_and_are_as_bad_as_any_trial(attack, images):
    model = Tiny()
    changed = attack.change(model, images, LABELS)
    assert (changed - images).flatten(1).norm(dim=1).max() <= 0.5 + 1e-9
    loss = nn.functional.cross_entropy(model.unrolled(changed), LABELS, reduction="none")
    # An attack may end in a local maximum: here at most one of six does, and it is an attack.
    worst = worst_by_trial(model, images, LABELS, 0.5)
    assert (loss >= 0.99 * worst).sum() >= 5
    assert (loss >= 0.75 * worst).all()


def test_training_gradient_is_that_of_the_cross_entropy_at_the_attacked_images(images):
    """Danskin's theorem, by backpropagation through an unrolled loop."""
    model = Tiny()
    sol = Attack(0.5, 200, tol=1e-8)(model, images, LABELS)
    assert sol.converged.all()
    found = torch.autograd.grad(sol.value.exp().mean(), list(model.parameters()))
    unrolled = nn.functional.cross_entropy(model.unrolled(images + sol.x.detach()), LABELS)
    expected = torch.autograd.grad(unrolled, list(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_radius_zero_trains_on_the_images_themselves(images):
    model = Tiny()
    sol = Attack(0.0, 40)(model, images, LABELS)
    assert not sol.x.any()
    expected = nn.functional.cross_entropy(model.unrolled(images), LABELS, reduction="none")
    torch.testing.assert_close(sol.value.exp(), expected, rtol=1e-5, atol=1e-6)


def test_clipped_attacks_keep_pixels_in_range_and_in_the_ball(images):
    changed = Attack(0.9, 15, clip=True).change(Tiny(), images, LABELS)
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert (changed - images).flatten(1).norm(dim=1).max() <= 0.9 + 1e-9


def test_judge_tells_class_loss_and_residual(images):
    model = Tiny()
    verdict = judge(model, images, LABELS)
    logits = model.unrolled(images)
    assert torch.equal(verdict.answer, logits.argmax(dim=1))
    assert torch.equal(verdict.right, verdict.answer == LABELS)
    expected = nn.functional.cross_entropy(logits, LABELS, reduction="none")
    torch.testing.assert_close(verdict.loss, expected, rtol=1e-3, atol=1e-3)
    assert verdict.residual.max() <= 1e-4


def test_evaluate_counts_over_batches_of_unequal_size(images):
    model = Tiny()
    answers = model.unrolled(images).argmax(dim=1)
    labels = answers.clone()
    labels[-1] = (labels[-1] + 1) % 3  # one wrong, in the smaller batch
    pairs = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    told = evaluate(model, lambda model, images, labels: images + 0.1, pairs)
    assert told["images"] == 6
    assert told["length"] == pytest.approx(0.2)
    told = evaluate(model, lambda model, images, labels: images, pairs)
    assert told["accuracy"] == pytest.approx(5 / 6)


def test_race_ends_at_the_first_attack_that_is_as_hard_as_pgd(images):
    pgd = Attack.pgd(0.5, 10, rate=0.1)
    others = {
        "enough": [Attack(0.5, sweeps) for sweeps in (1, 5, 50)],
        "small": [Attack(0.1, 5), Attack(0.2, 5)],
    }
    # One of six ends in a local maximum, which PGD does not: five are as hard for both.
    easy = LABELS.new_tensor([0, 1, 2, 4, 5])
    rows = race(Tiny(), pgd, others, images[easy], LABELS[easy], bar=lambda items, desc: items)
    assert rows["enough"]["reached"]
    *early, final = rows["enough"]["tried"]
    assert final["loss"] >= 0.999 * rows["pgd"]["loss"]
    assert all(row["loss"] < 0.999 * rows["pgd"]["loss"] for row in early)
    assert not rows["small"]["reached"]
    assert len(rows["small"]["tried"]) == 2


def test_referee_attacks_the_equilibrium_itself(images):
    pytest.importorskip("art")
    model, images = Tiny().float(), images.float()
    with torch.no_grad():
        labels = model.unrolled(images).argmax(dim=1)
    labels[0] = (labels[0] + 1) % 3
    changed = referee(model, images, labels, 0.5, iterations=8)
    assert (changed - images).flatten(1).norm(dim=1).max() <= 0.5 + 1e-4
    # The Toolbox leaves images alone that are wrong to begin with.
    assert torch.equal(changed[0], images[0])
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model.unrolled(changed), labels, reduction="none")
        before = nn.functional.cross_entropy(model.unrolled(images), labels, reduction="none")
    worst = worst_by_trial(model, images, labels, 0.5)
    assert (loss[1:] - before[1:] >= 0.9 * (worst[1:] - before[1:])).all()


def test_methods_differ_in_the_attack_they_train_on():
    run = parse(None, PRESETS, ["--train-pgd-steps", "5", "--radius", "0.5"], name="adversarial")
    clean, joint, pgd = (training_attack(name, run) for name in ("clean", "joint", "pgd"))
    assert (clean.radius, joint.radius, pgd.radius) == (0.0, 0.5, 0.5)
    assert isinstance(pgd.solver, implicitopt.Nested)
    (parameter,) = [torch.zeros(1, requires_grad=True)]
    rate = pgd.solver.optimizer([parameter]).param_groups[0]["lr"]
    assert 5 * rate == pytest.approx(2.5 * 0.5)


def test_objective_is_the_cross_entropy_plus_the_weighted_penalty(images):
    model = Tiny().float()
    pixels = (255 * images).to(torch.uint8)
    data = Images(pixels, LABELS)
    options = {"jacobian": 0.3, "penalized": 3, "flips": False}
    objective = Robust(model, Attack(0.5, 5), data, **options)
    loss, logged = objective(torch.tensor([5, 0, 3, 1]))
    total = logged["cross_entropy"] + 0.3 * logged["penalty"]
    torch.testing.assert_close(loss, total)
    # J = diag(1 − tanh²) (0.3 I)ᵀ, so that ‖J‖²/n is at most 0.09 on average.
    assert 0 < logged["penalty"].item() < 0.5
    assert not [name for name, _ in objective.named_buffers() if name in objective.state_dict()]


def test_mirrored_images_are_the_images_or_their_mirror_images():
    torch.manual_seed(0)
    images = torch.rand(64, 3, 4, 4)
    flipped = (mirrored(images) == images.flip(3)).flatten(1).all(dim=1)
    same = (mirrored(images) == images).flatten(1).all(dim=1)
    assert 16 < flipped.sum() < 48
    assert 16 < same.sum() < 48


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"methods": ("clean", "fgsm")}, "clean, joint, pgd"), ({"radius": 0.0}, "positive")],
)
def test_settings_refuse_what_they_do_not_know(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(PRESETS["smoke"], **wrong)


@pytest.mark.slow
def test_smoke(tmp_path, data_folder):
    """Trained on attacked images, the classifier survives attacks that fell the other."""
    options = ["--preset", "smoke", "--data", data_folder, "--out", tmp_path / "out", "--quiet"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *options], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    found = record["results"]
    start = found["training"]["start"]
    assert start["last_loss"] < start["first_loss"] - 0.5
    for trained in ("joint", "pgd"):
        facts = found["training"][trained]
        assert facts["last_loss"] < facts["first_loss"]
    accuracy = found["accuracy"]
    assert accuracy["clean"]["clean"]["accuracy"] > 0.6  # chance is 0.1
    for trained in ("joint", "pgd"):
        row = accuracy[trained]
        assert row["clean"]["accuracy"] > 0.5
        assert row["pgd"]["accuracy"] > accuracy["clean"]["pgd"]["accuracy"] + 0.25
        assert all(cell["length"] <= 1.0 + 1e-4 for cell in row.values())
        assert all(cell["residual"] < 1e-2 for cell in row.values())
    assert found["times"]["default"]["reached"]
    assert {"attacks.png", "curve.png", "training.png"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
