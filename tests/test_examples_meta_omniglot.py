"""Few-shot tasks and their learners, against closed forms, SGD, finite differences, sklearn."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("accelerate")
pytest.importorskip("einops")

from scipy.optimize import minimize
from sklearn.neighbors import NearestCentroid
from torch.func import functional_call, vmap

import episodes
import meta_omniglot
from data import Characters
from episodes import Equilibrium, Imaml, Inner, Maml, Prototypes, Reptile, TaskClassifier, Tasks
from episodes.imaml import conjugate_gradients
from experiment import parse

CLASSES, DRAWERS = 12, 20


def coded(size: int = 2) -> Characters:
    """Characters whose pixels say their class and their drawer."""
    code = 100 * torch.arange(CLASSES)[:, None] + torch.arange(DRAWERS)
    pixels = code.float()[:, :, None, None, None].expand(-1, -1, 1, size, size)
    return Characters(pixels.contiguous(), tuple(f"A/{k}" for k in range(CLASSES)))


def noisy(size: int = 8, seed: int = 0) -> Characters:
    """Classes that are a pattern each, and drawings of it with noise."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(CLASSES, 1, 1, size, size, generator=generator, dtype=torch.float64)
    noise = torch.randn(CLASSES, DRAWERS, 1, size, size, generator=generator, dtype=torch.float64)
    return Characters(patterns + 0.5 * noise, tuple(f"A/{k}" for k in range(CLASSES)))


# Tasks


def test_a_task_asks_for_the_classes_that_it_showed_in_drawings_it_did_not_show():
    episode = Tasks(coded(), ways=5, shots=2, queries=3, seed=0)(torch.arange(40))
    assert episode.support.shape == (40, 10, 1, 2, 2)
    assert episode.query.shape == (40, 15, 1, 2, 2)
    for task in range(40):
        shown, asked = (part[task, :, 0, 0, 0].int() for part in (episode.support, episode.query))
        assert len({*shown.tolist(), *asked.tolist()}) == 25  # no drawing comes twice
        class_of = dict(
            zip(episode.support_labels[task].tolist(), (shown // 100).tolist(), strict=True)
        )
        assert len(set(class_of.values())) == 5
        right = [class_of[label] for label in episode.query_labels[task].tolist()]
        assert right == (asked // 100).tolist()


def test_a_task_depends_on_its_number_and_the_seed_alone():
    def pixels(seed: int, *numbers: int) -> Tensor:
        return Tasks(coded(), 5, 1, 1, seed)(torch.tensor(numbers)).images

    assert torch.equal(pixels(3, 7, 8, 9)[1], pixels(3, 8)[0])
    assert not torch.equal(pixels(3, 7)[0], pixels(3, 8)[0])
    assert not torch.equal(pixels(3, 7)[0], pixels(4, 7)[0])


def test_every_class_gets_every_label_equally_often():
    episode = Tasks(coded(), 3, 1, 1, seed=0)(torch.arange(3000))
    first = episode.support[:, 0, 0, 0, 0].int() // 100  # the class with label 0
    counts = torch.bincount(first, minlength=CLASSES)
    assert (counts - 250).abs().max() < 5 * 250**0.5


@pytest.mark.parametrize(
    ("ways", "shots", "queries"), [(13, 1, 1), (1, 1, 1), (5, 0, 1), (5, 9, 12)]
)
def test_impossible_tasks_are_refused(ways, shots, queries):
    with pytest.raises(ValueError, match="must"):
        Tasks(coded(), ways, shots, queries, seed=0)


def test_the_interval_covers_the_mean_about_95_times_in_100():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        mean, half = episodes.interval((torch.rand(60, generator=generator) < 0.7).double())
        covered += abs(mean - 0.7) <= half
    assert 0.91 < covered / 400 < 0.98


# The learners to compare with


def linear(inputs: int, outputs: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, outputs)
    ).double()


def by_sgd(network: nn.Module, images: Tensor, labels: Tensor, steps: int, rate: float) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()


def test_maml_answers_with_the_weights_that_sgd_finds():
    learner = Maml(Tasks(noisy(4), 3, 1, 2, seed=0), linear(16, 3), steps=3, rate=0.5)
    episode = learner.tasks(torch.arange(2))
    with torch.no_grad():  # as when it is tested
        found = learner.logits(episode)
    for task in range(2):
        network = linear(16, 3)
        by_sgd(network, episode.support[task], episode.support_labels[task], 3, 0.5)
        torch.testing.assert_close(found[task], network(episode.query[task]))


def directional(learner: nn.Module, loss, eps: float = 1e-5) -> tuple[float, float]:
    """The derivative of ``loss()`` along a random direction: by backward, and by differences."""
    torch.manual_seed(1)
    parameters = [p for p in learner.parameters() if p.requires_grad]
    direction = [torch.randn_like(p) for p in parameters]
    learner.zero_grad()
    loss().backward()
    slope = sum(
        (p.grad * d).sum().item()
        for p, d in zip(parameters, direction, strict=True)
        if p.grad is not None
    )
    values = []
    for sign in (1, -2, 1):  # there, to the other side, and back
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p += sign * eps * d
        values.append(loss().item())
    return slope, (values[0] - values[1]) / (2 * eps)


def test_maml_differentiates_through_its_steps():
    learner = Maml(Tasks(noisy(4), 3, 1, 2, seed=0), linear(16, 3), steps=2, rate=0.5)
    slope, difference = directional(learner, lambda: learner(torch.arange(2))[0])
    assert slope == pytest.approx(difference, rel=1e-6)


def softmax(steps: int = 200, rate: float = 0.3, decay: float = 0.5, cg_steps: int = 80) -> Imaml:
    """Of a linear network, for which a task's problem is convex."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    return Imaml(Tasks(noisy(4), 3, 1, 2, seed=0), network, steps, rate, decay, cg_steps)


def test_imamls_gradient_is_a_dense_solve_at_scipys_minimum():
    learner = softmax()
    names, start = zip(*learner.constant().items(), strict=True)
    flat = torch.cat([w.flatten() for w in start])

    def cross_entropy(weights: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        parts = weights.split([w.numel() for w in start])
        shaped = {name: p.view_as(w) for name, p, w in zip(names, parts, start, strict=True)}
        logits = functional_call(learner.network, shaped, (images,))
        return nn.functional.cross_entropy(logits, labels)

    episode = learner.tasks(torch.arange(2))
    loss, _ = learner.loss(episode)
    loss.backward()
    expected, values = torch.zeros_like(flat), []
    for task in range(2):
        support = (episode.support[task], episode.support_labels[task])
        query = (episode.query[task], episode.query_labels[task])

        def inner(weights, support=support):
            weights = torch.tensor(weights, requires_grad=True)
            value = cross_entropy(weights, *support) + 0.25 * (weights - flat).square().sum()
            (slope,) = torch.autograd.grad(value, weights)
            return value.item(), slope.numpy()

        options = {"gtol": 1e-10, "ftol": 0, "maxiter": 1000}
        found = minimize(inner, flat.numpy(), jac=True, method="L-BFGS-B", options=options)
        own = torch.tensor(found.x, requires_grad=True)
        values.append(cross_entropy(own, *query))
        (slope,) = torch.autograd.grad(values[-1], own)
        hessian = torch.autograd.functional.hessian(
            lambda w, support=support: cross_entropy(w, *support), own
        )
        system = torch.eye(len(flat)).double() + hessian / 0.5
        expected += torch.linalg.solve(system, slope) / 2
    gradient = torch.cat([p.grad.flatten() for p in learner.network.parameters()])
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)
    assert loss.item() == pytest.approx(sum(values).item() / 2, rel=1e-6)


def test_imamls_gradient_is_that_of_the_whole_way():
    learner = softmax()
    slope, difference = directional(learner, lambda: learner(torch.arange(2))[0])
    assert slope == pytest.approx(difference, rel=1e-5)


def test_imaml_is_biased_where_its_steps_do_not_reach_the_minimum():
    learner = softmax(steps=2)
    slope, difference = directional(learner, lambda: learner(torch.arange(2))[0])
    assert slope != pytest.approx(difference, rel=1e-2)


def test_conjugate_gradients_solve_each_task_and_end_where_the_hessian_is_negative():
    torch.manual_seed(0)
    root = torch.randn(5, 5).double()
    matrices = torch.stack(
        [root @ root.T + torch.eye(5), 0.8 * torch.eye(5), torch.eye(5)]
    ).double()
    right = torch.randn(3, 5).double()
    right[2] = 0

    def solved(matrix: Tensor, right: Tensor) -> Tensor:
        found = conjugate_gradients(lambda v: {"a": matrix @ v["a"]}, {"a": right}, 9)
        return found["a"]

    found = vmap(solved)(matrices, right)
    torch.testing.assert_close(found[0], torch.linalg.solve(matrices[0], right[0]))
    assert torch.equal(found[1:], right[1:])


@pytest.mark.parametrize(("decay", "cg_steps"), [(0.0, 5), (-1.0, 5), (2.0, 0)])
def test_imaml_needs_decay_and_steps(decay, cg_steps):
    with pytest.raises(ValueError, match="decay and cg_steps must be positive"):
        softmax(decay=decay, cg_steps=cg_steps)


def test_imaml_learns():
    tasks = Tasks(noisy(4), 3, 1, 2, seed=0)
    learner = Imaml(tasks, linear(16, 3), 16, 0.3, decay=0.5, cg_steps=5)
    new = Tasks(noisy(4), 3, 1, 2, seed=1)(torch.arange(60))
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.02)
    before = learner.loss(new)[0].item()
    for step in range(40):
        optimizer.zero_grad()
        learner(torch.arange(8 * step, 8 * step + 8))[0].backward()
        optimizer.step()
    after = learner.loss(new)[0].item()
    assert after < 0.7 * before


def test_reptiles_gradient_is_the_way_back_from_where_sgd_leads():
    learner = Reptile(Tasks(noisy(4), 3, 1, 2, seed=0), linear(16, 3), steps=3, rate=0.5)
    episode = learner.tasks(torch.arange(2))
    loss, _ = learner.loss(episode)
    loss.backward()
    away, queries = [torch.zeros_like(p) for p in learner.network.parameters()], []
    for task in range(2):
        network = linear(16, 3)
        by_sgd(network, episode.images[task], episode.labels[task], 3, 0.5)
        for total, before, after in zip(
            away, learner.network.parameters(), network.parameters(), strict=True
        ):
            total += (before - after).detach() / 2
        logits = network(episode.query[task])
        queries.append(nn.functional.cross_entropy(logits, episode.query_labels[task]))
    for p, expected in zip(learner.network.parameters(), away, strict=True):
        torch.testing.assert_close(p.grad, expected)
    assert loss.item() == pytest.approx(torch.stack(queries).mean().item())


def test_prototypes_are_sklearns_nearest_centroids():
    learner = Prototypes(Tasks(noisy(4), 4, 3, 5, seed=0), linear(16, 7))
    episode = learner.tasks(torch.arange(3))
    with torch.no_grad():
        found = learner.logits(episode).argmax(-1)
        for task in range(3):
            support, query = (
                learner.network(part[task]).numpy() for part in (episode.support, episode.query)
            )
            labels = episode.support_labels[task].numpy()
            expected = NearestCentroid().fit(support, labels).predict(query)
            assert found[task].tolist() == expected.tolist()


# The equilibrium


def equilibrium(head: str = "task", **options) -> Equilibrium:
    torch.manual_seed(0)
    shape = {"image": (1, 8), "channels": (4, 4), "ways": 3, "task": 6, "stride": 2, "pool": 2}
    model = TaskClassifier(head, sharpness=4.0, expansion=2, groups=2, **shape).double()
    for end in model.cell.fusion.joined:  # a contraction, which some random small cells are not
        nn.init.constant_(end[-1].weight, 0.15)
    exact = {"sweeps": 300, "tol": 1e-9, "query_steps": 300, "query_tol": 1e-10, "decay": 0.3}
    linear = {"adjoint_steps": 400, "adjoint_tol": 1e-8, "penalty": 0.0}
    return Equilibrium(Tasks(noisy(), 3, 1, 2, seed=0), model, Inner(**exact | linear | options))


@pytest.mark.parametrize(("stem", "stride"), [(1, 1), (1, 2), (3, 4), (4, 2)])
def test_any_stem_injects_what_the_cell_takes(stem, stride):
    shape = {"image": (1, 28), "channels": (4, 8), "ways": 3, "task": 6, "stride": stride}
    model = TaskClassifier("task", stem, **shape)
    images = torch.rand(2, 3, 1, 28, 28)
    z, x = model.start(images), model.blank(images)
    found = model.map(images)(z, x)
    assert [part.shape for part in found] == [part.shape for part in z]
    assert model.read(found, x).shape == (2, 3, 3)


@pytest.mark.parametrize("head", ["task", "shared"])
def test_the_loss_of_a_task_is_that_of_the_paper(head):
    learner = equilibrium(head)
    episode = learner.tasks(torch.arange(2))
    images, labels = episode.support, episode.support_labels
    z = tuple(torch.randn_like(part) for part in learner.model.start(images))
    x = {name: torch.randn_like(part) for name, part in learner.model.blank(images).items()}
    found = learner.task_loss(labels)(z, x)
    share = learner.model.read(z, x).softmax(-1)
    for task in range(2):
        right = [share[task, image, label].log() for image, label in enumerate(labels[task])]
        film = sum(entry**2 for entry in x["film"][task]) / 6
        rows = x["head"][task] if "head" in x else ()
        expected = -sum(right) / 3 + 0.3 * film + 0.3 * sum(row @ row for row in rows) / 3
        assert found[task].item() == pytest.approx(expected.item())


def test_what_a_task_learns_does_not_depend_on_the_order_of_its_classes():
    learner = equilibrium()
    episode = learner.tasks(torch.arange(2))
    turned = (episode.support_labels + 1) % 3
    with torch.no_grad():
        one = learner.learn(episode.support, episode.support_labels)
        other = learner.learn(episode.support, turned)
    torch.testing.assert_close(other.x["head"].roll(-1, dims=1), one.x["head"], atol=1e-6, rtol=0)
    torch.testing.assert_close(other.x["film"], one.x["film"], atol=1e-6, rtol=0)


def test_a_task_may_have_more_classes_than_the_model_was_made_for():
    learner = equilibrium()
    episode = Tasks(noisy(), 4, 1, 2, seed=0)(torch.arange(2))
    with torch.no_grad():
        assert learner.logits(episode).shape == (2, 8, 4)


@pytest.mark.parametrize("gradient", ["implicit", "envelope"])
def test_the_gradient_is_that_of_solving_again_with_other_weights(gradient):
    learner = equilibrium(gradient=gradient)
    slope, difference = directional(learner, lambda: learner(torch.arange(1))[0])
    assert slope == pytest.approx(difference, rel=1e-3)


def test_the_frozen_gradient_is_that_of_the_queries_loss_at_one_vector():
    learner = equilibrium(gradient="frozen")
    episode = learner.tasks(torch.arange(1))
    with torch.no_grad():
        x = learner.learn(episode.support, episode.support_labels).x
    learner(torch.arange(1))[0].backward()
    found = [p.grad for p in learner.model.parameters() if p.grad is not None]
    learner.zero_grad()
    f, z = learner.model.map(episode.query), learner.model.start(episode.query)
    for _ in range(150):  # unrolled
        z = f(z, x)
    logits = learner.model.read(z, x)[0]
    nn.functional.cross_entropy(logits, episode.query_labels[0]).backward()
    expected = [p.grad for p in learner.model.parameters() if p.grad is not None]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_more_decay_makes_the_adjoint_easier():
    learner = equilibrium()
    rows = episodes.conditioning(learner, learner.tasks(torch.arange(1)), (0.1, 3.0), 200)
    assert [row.decay for row in rows] == [0.1, 3.0]
    assert rows[1].solved == 1
    assert rows[1].steps < rows[0].steps
    assert learner.inner.decay == 0.3
    assert all(p.grad is None for p in learner.parameters())


def test_a_gradient_agrees_with_the_exact_one_where_the_solve_has_converged():
    learner = equilibrium()
    episode = learner.tasks(torch.arange(1))
    rows = episodes.agreement(learner, episode, (3, 400), (100,))
    few, many = rows[:2], rows[2:]
    assert [(row.gradient, row.sweeps) for row in few] == [("frozen", 3), ("implicit, 100", 3)]
    assert many[1].cosine > 0.999  # the system is solved to 1e-2
    assert many[1].length == pytest.approx(1, abs=0.02)
    assert many[0].cosine < 0.99  # x* is not a constant
    assert few[1].cosine < many[1].cosine
    assert all(p.grad is None for p in learner.parameters())


# The script


def run_script(out: Path, *options: str) -> dict:
    arguments = ["--preset=smoke", "--quiet", f"--out={out}", *options]
    with warnings.catch_warnings():
        # Few sweeps are a budget here, and torch warns of its own affairs.
        warnings.simplefilter("ignore")
        meta_omniglot.main(arguments)
    return json.loads((out / "results.json").read_text())["results"]


def test_presets_are_in_order_and_a_bad_setting_is_refused(capsys):
    assert list(meta_omniglot.PRESETS) == ["cpu", "smoke", "paper"]
    with pytest.raises(SystemExit):
        parse(None, meta_omniglot.PRESETS, ["--minutes", "0"], name="meta")
    assert "minutes must be positive" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(None, meta_omniglot.PRESETS, ["--head=shared"], name="meta")
    assert "ways 5 and train_ways 20" in capsys.readouterr().err


def test_a_resumed_run_has_the_steps_that_it_began_with_for_every_method(tmp_path, monkeypatch):
    learner = Prototypes(Tasks(noisy(4), 3, 1, 2, seed=0), linear(16, 3))

    def planned(name, *more):
        arguments = [f"--out={tmp_path}", "--minutes=0.001", *more]
        run = parse(None, meta_omniglot.PRESETS, arguments, name="meta")
        return meta_omniglot.planned(learner, run, name)

    first = {name: planned(name) for name in ("prototypes", "maml")}
    (tmp_path / "prototypes" / "steps.json").write_text("77")
    assert planned("prototypes", "--resume") == 77
    assert planned("maml", "--resume") == first["maml"]
    assert planned("prototypes", "--steps=5") == 5
    assert all(p.grad is None for p in learner.parameters())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--steps"):
        planned("reptile")


@pytest.mark.slow
def test_it_learns_printed_letters_without_files(tmp_path):
    results = run_script(tmp_path, "--dataset=glyphs")
    assert set(results["methods"]) == set(meta_omniglot.METHODS)
    for method in ("equilibrium", "prototypes"):  # gradient steps take longer to be of use
        assert results["methods"][method]["accuracy"] > 0.35  # chance is 0.2
    assert {"curves.png", "task.png"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_it_learns_handwriting(tmp_path, data_folder):
    results = run_script(tmp_path, f"--data={data_folder}")
    row = results["methods"]["equilibrium"]
    half = len(row["losses"]) // 2
    assert sum(row["losses"][half:]) < 0.95 * sum(row["losses"][:half])
    assert row["accuracy"] > 0.35  # chance is 0.2
    assert [entry["decay"] for entry in results["adjoint"]] == list(meta_omniglot.DECAYS)
