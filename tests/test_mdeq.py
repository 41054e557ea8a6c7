"""The examples' model: its layout, and all that a solver asks of a map."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("einops")

import implicitopt
from mdeq import Cell, Classifier, Decoder, FilmClassifier


def decoder(**options):
    return Decoder(6, (1, 8), (8, 8), **options)


def problem(kind, seed=0, batch=3, shots=2, dtype=torch.float64):
    """A small model of a kind: the model, its map, a state and an input, not at rest."""
    torch.manual_seed(seed)
    if kind == "decoder":
        model = decoder(groups=2).to(dtype)
        f, x = model.f, torch.randn(batch, 6, dtype=dtype)
        start = model.start(x)
    elif kind == "classifier":
        model = Classifier((1, 8), (8, 8), classes=3, groups=2).to(dtype)
        f, x = model.f, torch.rand(batch, 1, 8, 8, dtype=dtype)
        start = model.start(x)
    else:
        model = FilmClassifier((1, 8), (8, 8), ways=3, task=6, groups=2).to(dtype)
        images = torch.rand(batch, shots, 1, 8, 8, dtype=dtype)
        f, x, start = model.bind(images), torch.randn(batch, 6, dtype=dtype), model.start(images)
    return model, f, tuple(0.35 * torch.randn_like(branch) for branch in start), x


KINDS = pytest.mark.parametrize("kind", ["decoder", "classifier", "film"])


def flat(z):
    """A row per problem."""
    return torch.cat([branch.flatten(1) for branch in z], dim=1)


def at_rest(f, z, x, steps):
    """Plain iteration, as a long loop."""
    with torch.no_grad():
        for _ in range(steps):
            z = f(z, x)
    return z


# Layout


@pytest.mark.parametrize(
    ("channels", "sizes", "film"),
    [((4,), (8,), None), ((4, 8), (7, 4), None), ((4, 8, 12, 16), (16, 8, 4, 2), 8)],
)
def test_a_cell_maps_states_to_states_of_their_shapes(channels, sizes, film):
    cell = Cell(channels, sizes, film=film)
    shapes = [(2, c, s, s) for c, s in zip(channels, sizes, strict=True)]
    z, injection = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    out = cell(tuple(z), tuple(injection), None if film is None else torch.randn(2, film))
    assert isinstance(out, tuple)
    assert [tuple(branch.shape) for branch in out] == shapes


@pytest.mark.parametrize(
    ("image", "options", "sizes"),
    [
        ((1, 28), {}, [28, 14]),
        ((3, 32), {"stride": 2, "grid": 4}, [16, 8]),
        ((1, 25), {"grid": 7}, [25, 13]),
        ((3, 28), {"stride": 4}, [7, 4]),
    ],
)
def test_a_decoder_gives_images_of_the_size_asked_for(image, options, sizes):
    torch.manual_seed(0)
    model = Decoder(6, image, (4, 8), **options)
    x = torch.randn(2, 6)
    z = model.f(model.start(x), x)
    assert [tuple(branch.shape) for branch in z] == [
        (2, c, s, s) for c, s in zip((4, 8), sizes, strict=True)
    ]
    pixels = model.image(z)
    assert pixels.shape == (2, image[0], image[1], image[1])
    assert 0 <= pixels.min() < pixels.max() <= 1


@pytest.mark.parametrize(("side", "stride", "pool"), [(28, 1, 4), (9, 2, 1), (32, 1, 8)])
def test_a_classifier_gives_a_logit_a_class(side, stride, pool):
    model = Classifier((3, side), (4, 8), classes=7, stride=stride, pool=pool)
    images = torch.rand(2, 3, side, side)
    z = model.f(model.start(images), images)
    assert [len(branch) for branch in z] == [2, 2]
    assert model.logits(z).shape == (2, 7)


def test_a_film_classifier_keeps_tasks_and_their_images_apart_in_shape():
    model = FilmClassifier((1, 28), (4, 8), ways=5, task=10, stride=2)
    images = torch.rand(2, 3, 1, 28, 28)
    z = model.bind(images)(model.start(images), torch.randn(2, 10))
    assert [tuple(branch.shape) for branch in z] == [(2, 3, 4, 14, 14), (2, 3, 8, 7, 7)]
    assert model.logits(z).shape == (2, 3, 5)


def test_images_of_a_task_are_what_a_batch_of_them_alone_would_be():
    model, _, z, v = problem("film")
    torch.manual_seed(0)
    images = torch.rand(3, 2, 1, 8, 8, dtype=torch.float64)
    together = model.bind(images)(z, v)
    for task in range(3):
        for shot in range(2):
            one = tuple(branch[task : task + 1, shot : shot + 1] for branch in z)
            alone = model.bind(images[task : task + 1, shot : shot + 1])(one, v[task : task + 1])
            for a, b in zip(alone, together, strict=True):
                torch.testing.assert_close(a[0, 0], b[task, shot])


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_every_pixel_is_heard_of_at_any_stride(stride):
    torch.manual_seed(0)
    model = Classifier((1, 16), (8, 8), stride=stride)
    image = torch.rand(1, 1, 16, 16, requires_grad=True)
    finest = model.inject(image)[0]
    assert finest.shape[-1] == 16 // stride
    finest.square().sum().backward()
    assert (image.grad != 0).all()


def test_a_state_as_a_matrix_and_back():
    cell = Cell((4, 8), (7, 4), groups=2)
    z = tuple(torch.randn(3, *shape) for shape in cell.shapes)
    rows = cell.flatten(z)
    assert rows.shape == (3, cell.width)
    assert all(torch.equal(a, b) for a, b in zip(cell.unflatten(rows), z, strict=True))


def test_big_images_do_not_make_the_map_of_codes_big():
    count = sum(p.numel() for p in Decoder(128).inject.parameters())
    assert count < 6e6  # dense: 128 × (32·64² + 64·32² + 128·16² + 256·8²) = 31 million


def test_there_is_no_batch_norm_and_weight_norm_is_where_it_belongs():
    cell = Decoder(8, (3, 16), (4, 8, 12)).cell
    assert not [m for m in cell.modules() if "BatchNorm" in type(m).__name__]
    normed = {name.rsplit(".parametrizations")[0] for name, _ in cell.named_parameters()
              if name.endswith("original0")}  # fmt: skip
    expected = {f"blocks.{i}.{conv}" for i in range(3) for conv in ("widen", "narrow")}
    assert normed == expected | {f"fusion.joined.{i}.1" for i in range(3)}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Cell((4, 6), (8, 4)), "channels must be multiples of groups=4"),
        (lambda: Cell((), ()), "channels must be multiples of groups=4"),
        (lambda: Cell((4, 8), (8, 5)), r"one a branch: \(8, 4\); got \(8, 5\)"),
        (lambda: Cell((4, 8), (8,)), r"one a branch: \(8, 4\); got \(8,\)"),
        (lambda: Cell((4, 8), (8, 4), film=7), "film must be a multiple of the number of branches"),
        (lambda: decoder(stride=3), "stride must divide the image's side, 8; got 3"),
    ],
)
def test_what_no_model_can_be_made_of_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# The map


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("kind", "scale"), [("decoder", 0), ("decoder", 1), ("classifier", 1), ("film", 1)]
)
def test_an_untrained_map_is_a_contraction(kind, scale, seed):
    _, f, z, x = problem(kind, seed, batch=1, shots=1, dtype=torch.float32)
    x = scale * x
    z = at_rest(f, z, x, 40)
    jacobian = torch.func.jacrev(lambda z: flat(f(z, x))[0])(z)
    matrix = torch.cat([part.flatten(1) for part in jacobian], dim=1)
    assert matrix.shape[0] == matrix.shape[1]
    assert torch.linalg.eigvals(matrix).abs().max() < 1


@pytest.mark.parametrize(("channels", "options"), [((16, 32), {}), ((16, 24, 32), {"stride": 2})])
def test_an_untrained_decoder_of_useful_size_is_a_contraction(channels, options):
    torch.manual_seed(1)
    model = Decoder(32, (1, 28), channels, **options).requires_grad_(False)
    x = torch.zeros(1, 32)
    z = at_rest(model.f, model.start(x), x, 30)
    v, growth = tuple(map(torch.randn_like, z)), []
    for _ in range(24):
        size = flat(v).norm(dim=1)[:, None, None, None]
        v = tuple(part / size for part in v)
        v = torch.func.jvp(lambda z: model.f(z, x), (z,), (v,))[1]
        growth.append(flat(v).norm(dim=1).log())
    # The mean over steps: a pair of complex eigenvalues makes single steps swing.
    assert torch.stack(growth[12:]).mean(dim=0).exp().max() < 1


@KINDS
@pytest.mark.parametrize("training", [True, False])
def test_no_problem_changes_when_another_does(kind, training):
    model, f, z, x = problem(kind)
    model.train(training)
    before = flat(f(z, x))
    z, x = tuple(branch.clone() for branch in z), x.clone()
    for part in (*z, x):
        part[1] = 5 * torch.randn_like(part[1])
    after = flat(f(z, x))
    assert not torch.allclose(before[1], after[1])
    for other in (0, 2):
        torch.testing.assert_close(after[other], before[other], rtol=0, atol=1e-12)


def test_the_library_s_check_finds_nothing_wrong():
    model, f, _, x = problem("decoder")
    target = torch.rand(3, 1, 8, 8, dtype=torch.float64)

    def loss(z, x):
        return ((model.image(z) - target) ** 2).sum(dim=(1, 2, 3)) + 0.1 * (x**2).sum(dim=1)

    report = implicitopt.check(f, loss, x, model.start, quiet=True)
    assert report.ok, str(report)


@KINDS
def test_the_fixed_point_is_where_plain_iteration_ends(kind):
    _, f, z, x = problem(kind)
    found = implicitopt.fixed_point(f, x, z, tol=1e-10)
    for a, b in zip(found, at_rest(f, z, x, 200), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


@KINDS
def test_gradients_through_the_fixed_point_are_those_of_a_long_loop(kind):
    model, f, z, x = problem(kind, batch=2)
    x.requires_grad_()
    names, parameters = zip(*model.cell.named_parameters(), strict=True)
    weights = [torch.randn_like(branch) for branch in z]

    def gradients(state):
        outer = sum((w * branch).sum() for w, branch in zip(weights, state, strict=True))
        return torch.autograd.grad(outer, (x, *parameters))

    start = at_rest(f, z, x, 100)
    implicit = gradients(implicitopt.fixed_point(f, x, start, tol=1e-11))
    unrolled = start
    for _ in range(60):
        unrolled = f(unrolled, x)
    for name, a, b in zip(("x", *names), implicit, gradients(unrolled), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_the_jacobian_penalty_s_gradient_agrees_with_differences():
    model, f, z, x = problem("decoder", batch=1)
    gains = [p for name, p in model.cell.named_parameters() if name.endswith("original0")]

    def penalty():
        torch.manual_seed(3)
        return implicitopt.jacobian_penalty(f, z, x)[0]

    directions = [torch.randn_like(p) for p in gains]
    slope = sum(
        (g * d).sum()
        for g, d in zip(torch.autograd.grad(penalty(), gains), directions, strict=True)
    )
    values = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for p, d in zip(gains, directions, strict=True):
                p.add_(step * d)
            values.append(penalty().detach())
    torch.testing.assert_close(slope, (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=1e-7)


@KINDS
def test_derivatives_of_the_map_agree_with_differences(kind):
    _, f, z, x = problem(kind, batch=1)
    dz, dx = tuple(map(torch.randn_like, z)), torch.randn_like(x)

    def moved(step):
        return flat(f(tuple(a + step * b for a, b in zip(z, dz, strict=True)), x + step * dx))

    with torch.no_grad():
        forward = flat(torch.func.jvp(f, (z, x), (dz, dx))[1])
        differences = (moved(1e-6) - moved(-1e-6)) / 2e-6
    torch.testing.assert_close(forward, differences, rtol=1e-6, atol=1e-6)
    mu = tuple(map(torch.randn_like, z))
    pulled_z, pulled_x = torch.func.vjp(f, z, x)[1](mu)
    pulled = (flat(pulled_z) * flat(dz)).sum() + (pulled_x * dx).sum()
    torch.testing.assert_close(pulled, (flat(mu) * differences).sum(), rtol=1e-6, atol=1e-6)


# The task vector


def test_a_zero_task_vector_changes_nothing_yet_has_a_gradient():
    _, f, z, v = problem("film")
    v = torch.zeros_like(v, requires_grad=True)
    image = flat(f(z, v))
    (gradient,) = torch.autograd.grad((image * torch.randn_like(image)).sum(), v)
    assert (gradient.abs() > 1e-6).all()


def test_a_zero_task_vector_leaves_the_cell_without_one():
    torch.manual_seed(0)
    cell, plain = Cell((4, 8), (8, 4), film=6), Cell((4, 8), (8, 4))
    shared = {key: value for key, value in cell.state_dict().items() if "film" not in key}
    plain.load_state_dict(shared)
    z = tuple(torch.randn(2, *shape) for shape in cell.shapes)
    injection = tuple(map(torch.randn_like, z))
    for a, b in zip(cell(z, injection, torch.zeros(2, 6)), plain(z, injection), strict=True):
        torch.testing.assert_close(a, b)


# As a module


@KINDS
def test_every_parameter_hears_of_the_loss(kind):
    model, f, z, x = problem(kind, batch=2)
    read = model.image if kind == "decoder" else model.logits

    def loss(z, x):
        return (read(z) ** 2).flatten(1).sum(dim=1) + 0.1 * (x**2).flatten(1).sum(dim=1)

    implicitopt.solve(f, loss, x, z, max_steps=20, tol=0.0).value.mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@KINDS
def test_weights_can_be_saved_loaded_and_copied(kind, tmp_path):
    model, _, z, _ = problem(kind, seed=0)
    other, _, _, x = problem(kind, seed=1)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    twin = copy.deepcopy(model)
    rows = []
    for each in (model, other, twin):
        torch.manual_seed(5)
        images = torch.rand(3, 2, 1, 8, 8, dtype=torch.float64)
        rows.append(flat((each.bind(images) if kind == "film" else each.f)(z, x)))
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    after = (model.bind(images) if kind == "film" else model.f)(z, x)
    assert torch.equal(flat(after), rows[0])
