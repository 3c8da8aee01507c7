"""PGD whose change is low-passed: its spectrum, the ball, its gradient, and its way through the commands' names."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rvlm import cli
from rvlm.attacks import PGD, pgd
from rvlm.attacks.ball import Ball
from rvlm.attacks.stages import parse_attack
from rvlm.data import load_data
from rvlm.models import ZeroShotClassifier, load_clip
from rvlm.ops import gaussian_filter

EPS, CUTOFF, SIDE = 8 / 255, 3.0, 32


def fixed(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def scene():
    """A model that sees every pixel, and grey images that no box cuts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(1800, 5)).double()
    x = 0.3 + 0.4 * torch.rand(6, 3, SIDE, SIDE, dtype=torch.float64)
    return model, x, model(x).argmax(1)


def share_beyond(change, bins):
    """Of the energy of a change [B, 3, S, S]: the share beyond a radius in DFT bins, per sample."""
    power = torch.fft.fft2(change).abs().square().sum(1)
    line = torch.fft.fftfreq(change.shape[-1], 1 / change.shape[-1], dtype=change.dtype)
    outside = (line[:, None] ** 2 + line**2) > bins**2
    return (power * outside).sum((1, 2)) / power.sum((1, 2))


@pytest.mark.parametrize("norm, eps", [("linf", EPS), ("l2", 0.5), ("l1", 8.0)])
@pytest.mark.parametrize("best", ["last", "adv"])
def test_the_change_has_low_frequencies_alone_and_stays_in_the_ball(scene, norm, eps, best):
    model, x, y = scene
    settings = {"eps": eps, "norm": norm, "steps": 20, "best": best, "generator": fixed()}
    low = pgd(model, x, y, low_frequency=CUTOFF, **settings)
    plain = pgd(model, x, y, **settings)
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
    assert ((low - x).flatten(1).norm(order, dim=1) <= eps + 1e-9).all() and 0 <= low.min() and low.max() <= 1
    # A filtered change has exp(-(3 D0)^2 / D0^2) = 1e-4 of its energy at three times the cutoff; L1 balls cut it.
    assert (share_beyond(low - x, 3 * CUTOFF) < (1e-3 if norm != "l1" else 0.2)).all()
    assert (share_beyond(plain - x, 3 * CUTOFF) > 0.3).all()


def test_it_climbs_and_fools_what_filters_its_images(scene):
    model, x, y = scene
    low = pgd(model, x, y, eps=EPS, steps=20, low_frequency=CUTOFF, generator=fixed())
    loss = lambda images: F.cross_entropy(model(images), y, reduction="none")  # noqa: E731
    smooth_noise = gaussian_filter(EPS * torch.randn(x.shape, generator=fixed(), dtype=x.dtype).sign(), CUTOFF, False)
    assert (loss(low) > loss(x + smooth_noise)).all()
    plain = pgd(model, x, y, eps=EPS, steps=20, generator=fixed())
    blurred = lambda images: F.cross_entropy(model(gaussian_filter(images, CUTOFF)), y, reduction="none")  # noqa: E731
    assert (blurred(low) - blurred(x) > blurred(plain) - blurred(x)).all(), "a filter takes little of it away"


def test_the_gradient_is_that_of_what_the_model_sees(scene):
    model, x, y = scene
    ball = Ball(x, EPS, "linf", (0.0, 1.0), low_frequency=CUTOFF)
    iterate = (x + 0.5 * EPS * torch.randn(x.shape, generator=fixed(), dtype=x.dtype).clamp(-1, 1)).requires_grad_()
    through = F.cross_entropy(model(x + gaussian_filter(iterate - x, CUTOFF, False)), y, reduction="sum")
    (expected,) = torch.autograd.grad(through, iterate)
    seen = ball.as_seen(iterate.detach()).requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(seen), y, reduction="sum"), seen)
    torch.testing.assert_close(ball.of_iterate(grad), expected)
    assert ball.at(torch.tensor([1])).low_frequency == ball.scaled(2.0).low_frequency == CUTOFF


@pytest.mark.parametrize("settings", [{"quantize": 255}, {"strict_eps": True}, {"early_stop": "compact"},
                                      {"restarts": 3, "early_stop": "compact", "best": "adv"}])  # fmt: skip
def test_with_the_other_settings(scene, settings):
    model, x, y = scene
    model, x = model.float(), (x * 255).round().float() / 255
    x_adv = pgd(model, x, y, eps=EPS, steps=5, low_frequency=CUTOFF, generator=fixed(), **settings)
    assert (x_adv.double() - x.double()).abs().max() <= EPS + (0 if "strict_eps" in settings else 1e-7)
    if "quantize" in settings:
        assert torch.equal((x_adv * 255).round() / 255, x_adv)
    one = pgd(model, x[2:3], y[2:3], eps=EPS, steps=5, low_frequency=CUTOFF, generator=fixed(),
              sample_ids=torch.tensor([2]), **settings)  # fmt: skip
    assert (one - x_adv[2:3]).abs().max() < 1e-5, "a sample does not depend on its batch"


def test_names():
    (stage,) = parse_attack("pgd-20@lowfreq=5.7")
    assert stage.name == "pgd-20@lowfreq=5.7" and stage.passes(10) == parse_attack("pgd-20")[0].passes(10)
    assert stage.settings == {"steps": 20, "loss": "ce", "low_frequency": 5.7}
    assert parse_attack("pgd-20")[0].record()["settings"]["low_frequency"] is None
    both = parse_attack("pgd-3x2@lowfreq=4, fgsm@lowfreq=.5, pgd-3")
    assert [(s.name, s.settings.get("low_frequency")) for s in both] == [
        *((f"pgd-3-{loss}-{k}@lowfreq=4", 4.0) for loss in ("ce", "margin") for k in (1, 2)),
        ("fgsm@lowfreq=.5", 0.5), ("pgd-3", None),
    ]  # fmt: skip
    for bad, message in (
        ("pgd-3@lowfreq=0", "a number above 0"), ("pgd-3@lowfreq", "@lowfreq=BINS"), ("pgd-3@", "@lowfreq=BINS"),
        ("pgd-3@highfreq=3", "unknown variant @highfreq=3"), ("square@lowfreq=3", "is for fgsm and pgd"),
        ("autoattack@lowfreq=3", "is for fgsm and pgd"), ("pgd@lowfreq=3", "expected fgsm, pgd-STEPS"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            parse_attack(bad)


@pytest.mark.parametrize("cutoff", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_cutoffs(scene, cutoff):
    model, x, y = scene
    with pytest.raises(ValueError, match="finite number of DFT bins above 0"):
        pgd(model, x, y, low_frequency=cutoff)
    with pytest.raises(ValueError, match=r"needs images \[B, C, H, W\]"):
        PGD(model, low_frequency=3.0)(x.flatten(1), y)


def test_evaluations_and_records(tmp_path):
    base = str(load_clip("tiny-vit", seed=1).save(tmp_path / "base"))
    name = "pgd-2@lowfreq=4"
    flags = ["--model", base, "--attack", name, "--limit", "12", "--eps", "8/255"]
    assert cli.main(["eval", *flags, "--source", "tiny-vit", "--out", str(tmp_path / "eval")]) == 0
    assert cli.main(["attack", *flags, "--out", str(tmp_path / "attack")]) == 0
    flags = ["--models", f"{base},tiny-vit", "--attack", name, "--limit", "12", "--out", str(tmp_path / "matrix")]
    assert cli.main(["analyze", "transfer", *flags]) == 0
    for run, target in (("eval", "transfer"), ("attack", "white-box")):
        (row,) = json.loads((tmp_path / run / "summary.json").read_text())["rows"]
        assert (row["attack"], row["target"]) == (name, target)
        (stage,) = json.loads((tmp_path / run / row["record"]).read_text())["attack"]["stages"]
        assert stage["name"] == name and stage["settings"]["low_frequency"] == 4.0


def test_black_and_white_pixels_cut_it_and_less_is_left_than_without():
    """Scans of digits are mostly black: there the box cuts the change, and still it is lower than plain PGD's."""
    data = load_data("digits", "test", limit=32)
    model = ZeroShotClassifier(load_clip("tiny-vit", seed=1), data.class_names)
    x = data.batch(slice(None))[0]
    low, plain = (pgd(model, x, eps=EPS, steps=5, low_frequency=d, generator=fixed()) - x for d in (CUTOFF, None))
    assert low.abs().max() <= EPS + 1e-6
    assert share_beyond(low, 3 * CUTOFF).mean() < 0.5 * share_beyond(plain, 3 * CUTOFF).mean()
