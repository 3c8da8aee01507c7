"""Wrong input: an error that says what was expected, before anything is touched."""

import pytest
import torch

from rvlm.attacks import FGSM, PGD, AttackWarning, fgsm, pgd, square

X, Y = torch.full((2, 3, 8, 8), 0.5), torch.tensor([0, 1])
NAN = X.clone()
NAN[1, 0, 0, 0] = float("nan")


@pytest.mark.parametrize("change, error, message", [
    (dict(x=X * 255), ValueError, r"bounds \[0.0, 1.0\].*normalisation"),
    (dict(x=X - 1), ValueError, "must lie in bounds"),
    (dict(x=(X * 255).to(torch.uint8)), TypeError, r"x.float\(\) / 255"),
    (dict(x=X.half()), TypeError, "float32 or float64"),
    (dict(x=X.numpy()), TypeError, "must be a tensor"),
    (dict(x=X[0, 0, 0]), ValueError, "must be a batch"),
    (dict(x=NAN), ValueError, r"NaN pixels in sample\(s\) 1"),
    (dict(y=torch.tensor([0, 5])), ValueError, r"0 \.\. 4.*got 0 \.\. 5"),
    (dict(y=torch.tensor([-1, 0])), ValueError, r"got -1 \.\. 0"),
    (dict(y=torch.tensor([0])), ValueError, r"shape \[2\]"),
    (dict(y=torch.tensor([0.0, 1.0])), TypeError, "integer labels"),
    (dict(y=None, targeted=True), ValueError, "needs target labels"),
    (dict(eps=4), ValueError, "did you mean 4/255"),
    (dict(eps=8.0, bounds=(0.0, 4.0)), ValueError, "pixel range 4"),
    (dict(eps=-0.1), ValueError, "not negative"),
    (dict(eps=float("nan")), ValueError, "finite"),
    (dict(eps="8/255"), TypeError, "eps must be a float"),
    (dict(eps=torch.zeros(3)), ValueError, r"\[2\]"),
    (dict(alpha=-0.1), ValueError, "alpha must be finite and not negative"),
    (dict(steps=-1), ValueError, "steps"),
    (dict(steps=2.5), ValueError, "steps"),
    (dict(restarts=0), ValueError, "restarts"),
    (dict(restarts=2, random_start=False), ValueError, "same run"),
    (dict(norm="l7"), ValueError, "'linf', 'l2', 'l1'"),
    (dict(best="first"), ValueError, "'last', 'loss', 'adv'"),
    (dict(early_stop="soon"), ValueError, "'freeze', 'compact', 'cycle'"),
    (dict(early_stop="compact", engine="compile"), ValueError, "changes the batch size"),
    (dict(early_stop="compact", loss=lambda out, y: out.sum(1)), ValueError, "needs a loss by name"),
    (dict(early_stop="cycle", norm="l2"), ValueError, "exact for norm='linf' only"),
    (dict(early_stop="cycle", eot=2), ValueError, "would cut the attack short"),
    (dict(engine="graph"), ValueError, "'auto', 'eager', 'compile'"),
    (dict(precision="fp8"), ValueError, "'tf32', 'bf16', 'cascade'"),
        (dict(precision="cascade", y=None, loss=lambda out, y: out.sum(1)), ValueError, "cascade' needs labels"),
        (dict(engine="cudagraph"), ValueError, "for CUDA devices, x is on cpu"),
    (dict(model_mode="off"), ValueError, "'eval', 'train', 'keep'"),
    (dict(loss="dlrr"), ValueError, "unknown loss 'dlrr'"),
    (dict(x_init=X[:1]), ValueError, "x_init must be like x"),
    (dict(bounds=(1.0, 0.0)), ValueError, "low < high"),
    (dict(quantize=255, x=X + 0.001), ValueError, "needs clean images on the grid"),
    (dict(quantize=0), ValueError, "levels"),
    (dict(quantize=255, strict_eps=True, x=torch.round(X * 255) / 255), ValueError, "exclude each other"),
    (dict(sample_ids=torch.zeros(3, dtype=torch.int64)), ValueError, "sample_ids"),
    (dict(model=3), TypeError, "model must be callable"),
])  # fmt: skip
def test_bad_arguments(build, change, error, message):
    model = build("linear", torch.float32)
    given = dict(model=model, x=X, y=Y) | change
    rng = torch.get_rng_state()
    with pytest.raises(error, match=message):
        pgd(**given)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_freezing_needs_logits(build):
    model = build("linear", torch.float32)
    with pytest.raises(ValueError, match="needs a model that returns logits"):
        pgd(lambda x: {"logits": model(x)}, X, Y, early_stop="freeze", loss=lambda out, y: out["logits"].sum(1))


@pytest.mark.parametrize("output, message", [
    (lambda x: x.flatten(1).detach()[:, :5], "carries no gradient"),
    (lambda x: torch.ones(len(x), 5, requires_grad=True) * 2, "does not reach the images"),
    (lambda x: x.sum((1, 2, 3)), r"must return logits \[2, C\], got \[2\]"),
    (lambda x: x.flatten(1)[:1, :5], r"must return logits"),
    (lambda x: {"logits": x.flatten(1)[:, :5]}, "must return logits.*dict"),
])  # fmt: skip
def test_bad_models(output, message):
    with pytest.raises(ValueError, match=message):
        pgd(output, X, Y)


@pytest.mark.parametrize("loss, message", [
    (torch.nn.CrossEntropyLoss(), r"one value per sample, got \[\]"),
    (lambda out, y: out, "one value per sample"),
    (lambda out, y: 3.0, "one value per sample, got float"),
])  # fmt: skip
def test_bad_losses(build, loss, message):
    with pytest.raises(ValueError, match=message):
        pgd(build("linear", torch.float32), X, Y, loss=loss)


def test_freeze_needs_labels(build):
    with pytest.raises(ValueError, match="needs labels"):
        pgd(build("linear", torch.float32), X, None, loss=lambda out, y: out.sum(1), early_stop="freeze")


def test_probabilities_and_nan_logits_warn(build):
    model = build("linear", torch.float32)
    with pytest.warns(AttackWarning, match="probabilities"):
        pgd(lambda x: model(x).softmax(1), X, Y)
    broken = lambda x: torch.where(torch.arange(2)[:, None] == 1, torch.nan, 1.0) * model(x)  # noqa: E731
    with pytest.warns(AttackWarning, match="NaN or infinite logits for 1 of 2"):
        result = pgd(broken, X, Y, return_info=True)
    assert result.x_adv.isfinite().all()


@pytest.mark.parametrize("attack", [pgd, square])
def test_nan_logits_warn_in_whichever_part_of_a_batch_they_are(build, attack):
    model, x = build("linear", torch.float32), torch.full((6, 3, 8, 8), 0.5)
    x[5] = 0.9
    broken = lambda x: torch.where(x.mean((1, 2, 3)) > 0.7, torch.nan, 1.0)[:, None] * model(x)  # noqa: E731
    with pytest.warns(AttackWarning, match="NaN or infinite logits for 1 of 2") as seen:
        attack(broken, x, torch.zeros(6, dtype=torch.int64), slots=2)
    assert len(seen) == 1


def test_classes_and_fgsm_reject_what_they_do_not_take(build):
    with pytest.raises(TypeError, match="unknown argument.*stepz"):
        PGD(build(), stepz=3)
    with pytest.raises(TypeError, match="fgsm fixes steps"):
        fgsm(build(), X, Y, steps=3)
    with pytest.raises(TypeError, match="fgsm fixes alpha"):
        FGSM(build(), alpha=0.1)
