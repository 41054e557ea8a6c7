"""The generative example: its losses, networks, distance and density, and the script as a whole."""

from __future__ import annotations

import json
import math
import sys
import time
import types

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

from scipy.linalg import sqrtm

import fid
import frechet
import generative
import implicitopt
from data import faces
from generators import (
    Architecture,
    Autoencoder,
    Principal,
    Search,
    Trained,
    decode,
    find_codes,
    load,
    matching,
    parameters,
    save,
)
from generators.autoencoders import divergence
from generators.code_vae import draw_by_vae
from generators.density import components, draw
from generators.jury import Jury
from generators.race import Curve, Point, seconds_to
from generators.reading import resized
from mdeq.decoder import Patches
from training import steps_within

TINY = Architecture(4, (1, 8), (4, 4), 2)


def tiny(seed: int = 0) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(seed)
    return TINY.equilibrium(), torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)


def test_distance_is_the_textbook_formula():
    torch.manual_seed(0)
    first = torch.randn(50, 4).double() @ torch.randn(4, 4).double()
    second = torch.randn(40, 4).double() + 0.5
    moments = [(f.mean(0).numpy(), np.cov(f.T.numpy())) for f in (first, second)]
    (m1, c1), (m2, c2) = moments
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real)
    assert frechet.distance(first, second) == pytest.approx(expected, rel=1e-8)


def test_distance_of_shifted_features_is_the_shift_also_with_fewer_images_than_features():
    torch.manual_seed(0)
    features = torch.randn(5, 20)
    assert frechet.distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet.distance(features, features + 2) == pytest.approx(20 * 4, rel=1e-5)


class Inception(torch.nn.Module):
    """Stands for torch-fidelity's: the mean of each colour, and its options."""

    def __init__(self, name, features, feature_extractor_weights_path):
        super().__init__()
        self.given = (name, features, feature_extractor_weights_path)

    def forward(self, images):
        assert images.dtype == torch.uint8
        return (images.float().mean(dim=(2, 3)),)


def test_fid_is_of_what_is_on_the_disk_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(frechet, "network", lambda: None)
    module = "torch_fidelity.feature_extractor_inceptionv3"
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    path = tmp_path / "checkpoints" / fid.WEIGHTS
    path.parent.mkdir()
    path.touch()
    assert fid.network() is None
    stub = types.SimpleNamespace(FeatureExtractorInceptionV3=Inception)
    monkeypatch.setitem(sys.modules, module, stub)
    assert fid.network().given == ("inception-v3-compat", ["2048"], str(path))
    jury = Jury(torch.randint(0, 256, (5, 1, 4, 4), dtype=torch.uint8), quiet=True)
    lighter = jury.images * 0 + 1
    expected = 3 * (255 - 255 * jury.images.mean()).item() ** 2
    expected += 3 * (255 * jury.images.mean(dim=(1, 2, 3))).var().item()
    found = jury.distances(lighter, "samples")
    assert found == {"frechet_samples": None, "fid_samples": pytest.approx(expected, rel=1e-4)}
    path.unlink()
    assert fid.network() is None
    jury = Jury(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), quiet=True)
    assert jury.distances(lighter, "samples") == {"frechet_samples": None, "fid_samples": None}


def test_columns_of_absent_networks_are_left_out():
    method = {"mse": 0.1, "frechet_samples": None, "fid_samples": 12.5}
    shown = generative.show({"jiio": method}, [Curve("joint", (Point(1.0, 2.0, 1, 1, 1),))])
    assert "FID, samples" in shown
    assert "12.5" in shown
    assert "Fréchet" not in shown


@pytest.mark.parametrize("shape", [(1, 4), (3, 4, 2)])
def test_distance_says_what_it_needs(shape):
    with pytest.raises(ValueError, match=r"N > 1"):
        frechet.distance(torch.zeros(shape), torch.zeros(3, 4))


def test_matching_is_the_sum_over_visible_pixels_and_the_price_of_the_code():
    decoder, images = tiny()
    target, codes = images[:2] / 255, torch.randn(2, 4)
    z = tuple(torch.randn(2, *shape) for shape in decoder.cell.shapes)
    visible = torch.ones(8, 8)
    visible[2:4, 3:6] = 0
    found = matching(decoder, target, 0.3, visible)(z, codes)
    shown = decoder.image(z).detach().numpy()
    for k in range(2):
        error = sum(
            (shown[k, 0, i, j] - target[k, 0, i, j].item()) ** 2
            for i in range(8)
            for j in range(8)
            if not (2 <= i < 4 and 3 <= j < 6)
        )
        assert found[k].item() == pytest.approx(error + 0.15 * (codes[k] ** 2).sum().item(), 1e-4)


def test_gradient_of_the_training_loss_is_that_of_the_least_loss():
    """The envelope theorem, by finite differences of the whole solve."""
    decoder, images = tiny()
    decoder, bias = decoder.double(), decoder.double().head[1].bias
    target = images[:3].double() / 255

    def least() -> torch.Tensor:
        loss = matching(decoder, target, 50.0)
        start = torch.zeros(3, 4).double()
        options = {"max_steps": 150, "tol": 1e-6}
        return implicitopt.solve(decoder.f, loss, start, decoder.start, **options).value.mean()

    (exact,) = torch.autograd.grad(least(), bias)
    step = 1e-4
    with torch.no_grad():
        bias[0] += step
        above = least().item()
        bias[0] -= 2 * step
        below = least().item()
    assert exact[0].item() == pytest.approx((above - below) / (2 * step), rel=1e-3)


def test_kept_codes_are_those_of_the_batch_alone():
    decoder, images = tiny()
    begin = torch.randn(6, 4)
    careful = implicitopt.Joint(steps=implicitopt.StepSizes(x=0.1))
    objective = Trained(decoder, images, Search(60, 0.1, careful), penalty=1.0, codes=begin)
    loss, logged = objective(torch.tensor([1, 4]))
    loss.backward()
    nothing = {"codes": begin, "states": 0.0, "multipliers": 0.0, "visits": 0.0}
    for name in objective.keep:
        moved = ((objective.get_buffer(name) - nothing[name]) != 0).reshape(6, -1).any(dim=1)
        assert moved.tolist() == [False, True, False, False, True, False]
    assert set(logged) == {"mse", "jacobian", "code"}
    assert objective.keep == ("codes", "states", "multipliers", "visits")
    assert Trained(decoder, images, Search(4, 0.1), 1.0).keep == ()


def test_held_codes_stay_for_so_many_visits_while_the_decoder_learns():
    decoder, images = tiny()
    begin = torch.randn(6, 4)
    how = Search(60, 0.1, implicitopt.Joint(steps=implicitopt.StepSizes(x=0.1)))
    objective = Trained(decoder, images, how, penalty=0.0, codes=begin, hold=2)
    bias, rows = decoder.head[1].bias, torch.tensor([1, 4])

    def at_begin() -> torch.Tensor:
        z = implicitopt.fixed_point(decoder.f, begin[rows], decoder.start, tol=1e-5)
        return matching(decoder, images[rows] / 255, 0.0)(z, begin[rows]).mean()

    for _ in range(2):
        value = objective(rows)[0]
        assert torch.equal(objective.codes, begin)
        expected = at_begin()
        assert value.item() == pytest.approx(expected.item(), rel=1e-2)
        slopes = [torch.autograd.grad(each, bias)[0] for each in (value, expected)]
        torch.testing.assert_close(*slopes, rtol=0.05, atol=0.05 * slopes[1].abs().max().item())
    assert (objective.multipliers == 0).all()
    assert (objective.states[rows] != 0).any(dim=1).all()
    objective(rows)
    moved = (objective.codes != begin).any(dim=1)
    assert moved.tolist() == [False, True, False, False, True, False]
    # An image that was not there yet is held, and with it those that come in one batch.
    before = objective.codes.clone()
    objective(torch.tensor([0, 1]))
    assert torch.equal(objective.codes, before)
    assert objective.visits.tolist() == [1, 4, 0, 0, 3, 0]


def test_codes_are_held_only_where_they_are_kept():
    for settings in ({"keep_codes": False}, {"hold": 1.0}, {"hold": -0.1}):
        with pytest.raises(ValueError, match="hold must be a share"):
            generative.Settings(**settings)


def test_an_image_that_comes_again_goes_on_where_its_last_solve_ended():
    decoder, images = tiny()
    objective = Trained(decoder, images, Search(200, 0.1), penalty=0.0, codes=torch.zeros(6, 4))
    first = objective(torch.tensor([1, 4]))[0].item()
    start = sum(matching(decoder, images[[1, 4]] / 255, 0.1)(*at_zero(decoder, 2))) / 2
    assert first < 0.99 * start.item()  # this tiny decoder hardly hears of its codes
    objective.search = Search(1, 0.1)
    # In another batch, beside an image that has not been seen.
    again = objective(torch.tensor([4, 0, 1]))[1]["mse"].item() * images[0].numel() * 3
    unseen = matching(decoder, images[:1] / 255, 0.1)(*at_zero(decoder, 1)).item()
    assert again == pytest.approx(2 * first + unseen, rel=1e-3)


def at_zero(decoder, count):
    """Where a solve from codes of 0 begins."""
    x = torch.zeros(count, decoder.latent)
    return decoder.f(decoder.start(x), x), x


def test_principal_components_are_those_of_the_singular_values():
    torch.manual_seed(0)
    mixed = torch.randn(40, 48) @ torch.diag(0.5 ** torch.arange(48.0)) @ torch.randn(48, 48)
    images = (128 + 12 * mixed).clamp(20, 235).byte().unflatten(1, (3, 4, 4))
    found = Principal(images, 5, seed=0)
    rows = images.flatten(1) / 255
    _, _, axes = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False)
    expected = (rows - rows.mean(dim=0)) @ axes[:5].T @ axes[:5] + rows.mean(dim=0)
    codes = found.codes()
    torch.testing.assert_close(found.decoder(codes).flatten(1), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(codes.var(dim=0), torch.ones(5), atol=1e-3, rtol=0)
    assert (codes.mean(dim=0).abs() < 1e-5).all()


def test_principal_components_need_as_many_images():
    with pytest.raises(ValueError, match=r"latent=5 .* got 4"):
        Principal(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), 5, seed=0)


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 8])
def test_patches_overlap(stride):
    """Each place paints as far as the middles of its neighbours, at least."""
    state = torch.zeros(1, 6, 5, 5)
    state[0, :, 2, 2] = 1
    layer = Patches(6, 2, stride)
    painted = (layer(state) - layer(0 * state)).abs().amax(dim=(0, 1)) > 0
    assert painted.shape == (5 * stride, 5 * stride)
    reached = painted.any(dim=0).nonzero()[:, 0]
    assert reached[0] <= 1.5 * stride
    assert reached[-1] >= 3.5 * stride - 1


def test_divergence_is_torch_distributions():
    torch.manual_seed(0)
    mean, logvar = torch.randn(2, 3, 5)
    q = torch.distributions.Normal(mean, (logvar / 2).exp())
    p = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(q, p).sum(dim=1)
    assert torch.allclose(divergence(mean, logvar), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["vae", "ae", "rae"])
@pytest.mark.parametrize("plain", [True, False])
def test_autoencoders_learn_their_encoder_and_decoder(kind, plain):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    decoder = TINY.convolutional() if plain else TINY.equilibrium()
    encoder = TINY.encoder(8 if kind == "vae" else 4)
    objective = Autoencoder(kind, encoder, decoder, images, decay=0.1, penalty=1.0)
    loss, _ = objective(torch.arange(4))
    loss.backward()
    assert objective.encode(images / 255).shape == (4, 4)
    for module in (encoder, decoder):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
        assert any(p.grad.abs().max() > 0 for p in module.parameters())


@pytest.mark.parametrize("size", [28, 32, 64])
def test_plain_decoder_has_as_many_weights_within_a_tenth(size):
    architecture = Architecture(32, (3, size), (16, 32), 4)
    plain, other = architecture.convolutional(), architecture.equilibrium()
    assert abs(parameters(plain) / parameters(other) - 1) < 0.1
    assert plain(torch.zeros(2, 32)).shape == (2, 3, size, size)
    assert architecture.encoder(7)(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_saved_decoder_comes_back(tmp_path):
    decoder, _ = tiny()
    codes = torch.randn(3, 4)
    for name, model in (("a", decoder), ("b", TINY.convolutional())):
        save(tmp_path, name, TINY, model)
        architecture, again = load(tmp_path, name)
        assert architecture == TINY
        assert torch.equal(decode(again, codes), decode(model, codes))
    with pytest.raises(FileNotFoundError, match=r"generative\.py"):
        load(tmp_path, "c")


def test_found_codes_lower_the_loss():
    decoder, images = tiny()
    target = images[:5] / 255
    codes = find_codes(decoder, target, Search(30, 0.1), batch=2, bar=lambda parts, desc: parts)
    before = (decode(decoder, torch.zeros(5, 4)) - target).square().mean()
    assert (decode(decoder, codes) - target).square().mean() < before


def test_drawn_codes_have_the_moments_of_those_given():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.tensor([[3.0, 0.0], [1.0, 0.5]])
    codes = torch.randn(4000, 2, generator=generator) @ mixing + torch.tensor([1.0, -2.0])
    drawn = draw(codes, 4000, seed=0)
    assert torch.allclose(drawn.mean(dim=0), codes.mean(dim=0), atol=0.15)
    assert torch.allclose(drawn.T.cov(), codes.T.cov(), rtol=0.1, atol=0.1)
    assert torch.equal(drawn, draw(codes, 4000, seed=0))


def quietly(steps, desc):
    return steps


@pytest.mark.slow
def test_codes_drawn_by_a_vae_have_the_moments_of_those_given():
    """Of a correlated mixture of two normal distributions, within a tenth of its spread."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.tensor([[3.0, 0.0], [1.0, 0.5]])
    codes = torch.randn(4000, 2, generator=generator) @ mixing + torch.tensor([1.0, -2.0])
    codes[:2000] += torch.tensor([12.0, 0.0])
    drawn = draw_by_vae(codes, 4000, 0, quietly)
    spread = codes.std(dim=0)
    assert ((drawn.mean(dim=0) - codes.mean(dim=0)).abs() < 0.1 * spread).all()
    apart = (drawn.T.cov() - codes.T.cov()).abs()
    assert (apart < 0.1 * spread * spread[:, None]).all()


def test_a_vae_draws_the_same_codes_from_the_same_seed_and_leaves_the_generator(monkeypatch):
    monkeypatch.setattr("generators.code_vae.STEPS", 100)
    torch.manual_seed(0)
    codes, before = torch.randn(40, 3).double(), torch.get_rng_state()
    with torch.no_grad():
        one, same, other = (draw_by_vae(codes, 7, seed, quietly) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.shape == (7, 3)
    assert one.dtype == torch.float64
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.tensor([[0.0, 1.0], [torch.nan, 2.0], [torch.inf, 2.0]]), "finite; 2 of 3 are not"),
        (torch.zeros(1, 4), "N > 1"),
        (torch.zeros(4), "N > 1"),
    ],
)
def test_a_vae_says_what_codes_it_needs(codes, message):
    with pytest.raises(ValueError, match=message):
        draw_by_vae(codes, 5, 0, quietly)


def test_mixture_has_no_more_components_than_codes_can_bear():
    assert components(64, 64) == 1
    assert components(640, 16) == 20
    assert components(10**6, 64) == 20


def test_seconds_to_a_loss():
    points = [Point(loss, seconds, 1, 1, 1) for loss, seconds in ((3.0, 1.0), (1.0, 2.0))]
    curve = Curve("joint", tuple(points))
    assert seconds_to(curve, 2.0) == 2.0
    assert seconds_to(curve, 0.5) is None


def test_resized_images_keep_their_mean():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    small = resized(images, 16)
    assert small.shape == (2, 3, 16, 16)
    assert small.float().mean().item() == pytest.approx(images.float().mean().item(), abs=1)


class Sleeper(torch.nn.Module):
    """A training step of 20 ms."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.register_buffer("images", torch.zeros(3, 1))
        self.register_buffer("codes", torch.zeros(3, 1))

    def forward(self, indices):
        time.sleep(0.02)
        self.codes[indices] += 1
        return self.weight * len(indices), {}


def test_steps_within_a_time_are_counted_once_and_leave_no_trace(tmp_path):
    path, sleeper = tmp_path / "steps.json", Sleeper()
    steps = steps_within(path, sleeper, 2.0, 2, 2, resume=False)
    assert 20 <= steps <= 100
    assert sleeper.weight.grad is None
    assert (sleeper.codes == 0).all()
    assert steps_within(path, sleeper, 4.0, 2, 2, resume=True) == steps


@pytest.mark.parametrize("methods", [("vae", "jiio"), ("jiio", "gan"), ("jiio", "vae", "vae")])
def test_methods_are_checked(methods):
    with pytest.raises(ValueError, match="jiio first"):
        generative.Settings(methods=methods)


@pytest.mark.slow
def test_smoke_on_real_faces(tmp_path, data_folder):
    out = tmp_path / "out"
    generative.main(["--preset=smoke", f"--data={data_folder}", f"--out={out}", "--quiet"])
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))["results"]
    images = faces(data_folder, True, 32, 64, quiet=True).pixels / 255
    held_out = faces(data_folder, False, 32, 32, quiet=True).pixels / 255
    blind = (held_out - images.mean(dim=0)).square().mean().item()
    jiio = results["methods"]["jiio"]
    assert jiio["last_losses"] < 0.8 * jiio["first_losses"]
    # A decoder that knew nothing would show the mean image at best.
    assert jiio["mse"] < 0.9 * blind
    assert jiio["psnr"] == pytest.approx(-10 * math.log10(jiio["mse"]))
    assert all(point["loss"] > 0 for curve in results["solvers"] for point in curve["points"])
    for name in ("reconstructions.png", "samples.png", "cost.png", "decoder-jiio.pt"):
        assert (out / name).stat().st_size > 1000
