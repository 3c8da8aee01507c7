"""Square: from the same random numbers the same proposals as AutoAttack's implementation; what its options mean."""

import pytest
import torch
from torch import nn

from rvlm.attacks import Square, apgd, square
from rvlm.attacks.ball import Noise

EPS = {"linf": 8 / 255, "l2": 0.7, "l1": 6.0}
THEIRS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
ORDER = {"linf": torch.inf, "l2": 2, "l1": 1}


def fixed(seed=0):
    return torch.Generator().manual_seed(seed)


class Recorder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.model(x)


@pytest.fixture
def images():
    """Six images of 11 x 11 pixels, and models for them that are attacked with some effort."""
    x = torch.randint(40, 216, (6, 3, 11, 11), generator=fixed(1)).double() / 255
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 81, 5)).double().eval()
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize("loss, rescale", [("margin", False), ("ce", True)])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_proposals_are_autoattacks(images, monkeypatch, norm, loss, rescale):
    base = pytest.importorskip("pyautoattack.square", reason="install rvlm[oracles]")
    (model, x, y), drawn, random = images, [], fixed(3)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

    patched = torch.rand
    theirs, ours = Recorder(model), Recorder(model)
    settings = dict(n_queries=150, eps=EPS[norm], loss=loss, resc_schedule=rescale, device="cpu")
    attack = base.SquareAttack(theirs, norm=THEIRS[norm], **settings)
    attack.init_hyperparam(x)
    with monkeypatch.context() as patch:
        patch.setattr(base.torch, "rand", lambda *shape: rand_of(patched, drawn, random, shape))
        torch.set_default_dtype(torch.float64)
        try:
            _, best = attack.attack_single_run(x, y)
        finally:
            torch.set_default_dtype(torch.float32)
    numbers = iter([2 * t - 1 for t in drawn])

    def around(self, like, *_, draw=0, **more):
        out = torch.zeros_like(like)
        if draw == 0 and norm == "linf":
            out[:] = next(numbers)
        elif draw == 0:
            for i in range(out.shape[1]):
                for j in range(out.shape[2]):
                    out[:, i, j, 0], out[:, i, j, 1:] = next(numbers), next(numbers).flatten(1)
        else:
            count = 2 if norm == "linf" else 5
            for k in range(count):
                out[:, k] = next(numbers)
            signs = next(numbers)
            out[:, count : count + 3] = signs.flatten() if norm == "linf" else signs.flatten(1)
        return out

    monkeypatch.setattr(Noise, "around", around)
    found = square(ours, x, y, eps=EPS[norm], norm=norm, queries=150, loss=loss, rescale=rescale, return_info=True)
    # A small window that was cleared before holds rounding errors, which the original divides by 1e-12.
    close = 1e-4 if rescale and norm != "linf" else 1e-9
    assert len(ours.seen) == len(theirs.seen) and (len(theirs.seen) > 100 or found.success.all())
    for mine, wanted in zip(ours.seen, theirs.seen, strict=True):
        assert mine.shape == wanted.shape and (mine - wanted).abs().max() < close
    assert (found.x_adv - best).abs().max() < close
    assert 0 < found.success.sum()


def rand_of(patched, drawn, random, shape):
    drawn.append(patched(*shape, generator=random, dtype=torch.float64))
    return drawn[-1]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_ball_box_counts_and_batch(images, norm):
    model, x, y = images
    ids = torch.tensor([5, 3, 2**40, 1, 0, 9])
    run = lambda rows, **more: square(  # noqa: E731
        model, x[rows], y[rows], eps=EPS[norm], norm=norm, queries=60, generator=fixed(), sample_ids=ids[rows], **more
    )
    found = run(torch.arange(6), return_info=True)
    delta = (found.x_adv - x).flatten(1)
    assert (delta.norm(ORDER[norm], dim=1) <= EPS[norm] + 1e-9).all()
    assert found.x_adv.min() >= 0 and found.x_adv.max() <= 1
    assert torch.equal(found.pred, model(found.x_adv).argmax(1)) and torch.equal(found.success, found.pred != y)
    assert found.forwards == 6 + found.steps_used.sum() and found.backwards == 0
    assert (found.steps_used[~found.success] == 60).all()
    for k in range(6):
        assert (run(torch.tensor([k])) - found.x_adv[k : k + 1]).abs().max() < 1e-9
    assert (run(torch.arange(6), strict_eps=True) - x).flatten(1).norm(ORDER[norm], dim=1).max() <= EPS[norm]


def test_more_queries_and_restarts_never_do_worse(images):
    model, x, y = images
    settings = dict(eps=4 / 255, return_info=True)
    few = square(model, x, y, queries=20, generator=fixed(), **settings)
    many = square(model, x, y, queries=200, generator=fixed(), **settings)
    again = square(model, x, y, queries=20, restarts=3, generator=fixed(), **settings)
    for better in (many, again):
        assert (better.success | ~few.success).all()
        same = better.success == few.success
        assert (better.loss[same & ~few.success] >= few.loss[same & ~few.success]).all()


def test_a_gradient_is_not_needed(images):
    model, x, y = images
    hidden = lambda v: model(v.detach()).round(decimals=2)  # noqa: E731
    assert square(hidden, x, y, queries=300, eps=0.1, generator=fixed(), return_info=True).success.any()
    with pytest.raises(ValueError, match="gradient"):
        apgd(hidden, x, y, steps=2)


def test_targeted_and_quantized(images):
    model, x, y = images
    target = (y + 1) % 5
    found = square(model, x, target, eps=0.2, queries=400, targeted=True, generator=fixed(), return_info=True)
    assert found.success.any() and torch.equal(found.success, found.pred == target)
    x_adv = square(model, x.float().double(), y, queries=20, quantize=255, generator=fixed())
    assert ((x_adv * 255).round() / 255 - x_adv).abs().max() < 1e-12


class Rowwise(nn.Module):
    """Logits whose bits do not depend on the batch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 363, generator=fixed(2)))
        self.sizes = []

    def forward(self, x):
        self.sizes.append(len(x))
        weight = self.weight.to(x.dtype)
        return torch.stack([(weight * one).sum(1) for one in x.flatten(1)])


@pytest.fixture
def many():
    """23 images, of which two are wrong when clean, and radii that fool some of the others."""
    x, model = torch.randint(40, 216, (23, 3, 11, 11), generator=fixed(1)).float() / 255, Rowwise().eval()
    y = model(x).argmax(1)
    y[3:5] = (y[3:5] + 1) % 5
    model.sizes.clear()
    return model, x, y, torch.linspace(1.5, 0.01, 23)


@pytest.mark.parametrize("norm, eps", [("linf", 0.04), ("l2", 0.6), ("l1", 6.0)])
def test_slots_change_nothing_but_the_batches(many, norm, eps):
    """To the bit; all batches of a query are full but the last, however many have been fooled."""
    model, x, y, radii = many
    settings = dict(eps=eps * radii, norm=norm, queries=40, return_info=True)
    whole = square(model, x, y, generator=fixed(), **settings)
    assert 5 < whole.success.sum() < 18, "otherwise this shows little"
    for slots in (1, 4, 23, 40):
        model.sizes.clear()
        found = square(model, x, y, slots=slots, generator=fixed(), **settings)
        for name in ("x_adv", "success", "loss", "pred", "steps_used"):
            assert torch.equal(getattr(found, name), getattr(whole, name)), name
        assert torch.equal(found.trace.fooled_at, whole.trace.fooled_at) and found.forwards == whole.forwards
        left = [23, *((found.steps_used > query).sum().item() for query in range(40))]
        batches = [min(slots, n - first) for n in left for first in range(0, n, slots)]
        assert model.sizes == batches


@pytest.mark.parametrize("more", [
    dict(restarts=3), dict(precision="cascade"), dict(precision="cascade", restarts=2), dict(y=None),
])  # fmt: skip
def test_slots_of_restarts_and_cascades(many, more):
    model, x, y, radii = many
    seen = {None: [], 5: []}
    whole, found = (
        square(model, x, slots=slots, generator=fixed(), callback=lambda *of, to=seen[slots]: to.append(of),
               **dict(y=y, eps=0.03 * radii, queries=30, return_info=True) | more)
        for slots in seen
    )  # fmt: skip
    assert whole.success.any() and not whole.success.all()
    assert torch.equal(found.x_adv, whole.x_adv) and torch.equal(found.steps_used, whole.steps_used)
    assert len(seen[5]) == len(seen[None])
    for (query, proposals, loss), (same_query, same_proposals, same_loss) in zip(*seen.values(), strict=True):
        assert query == same_query and torch.equal(proposals, same_proposals) and torch.equal(loss, same_loss)


def test_no_batch_is_larger_than_slots(many):
    """Nor the one whose predictions are the labels, nor the verdict's."""
    model, x, *_ = many
    square(model, x, slots=5, queries=3, precision="bf16", return_info=True)
    assert max(model.sizes) == 5


@pytest.mark.parametrize("more", [{}, dict(restarts=2), dict(precision="cascade"), dict(precision="bf16")])
def test_slots_keep_their_shape_when_compiled(many, monkeypatch, more):
    """Idle ones repeat a row, and change nothing."""
    model, x, y, radii = many
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda work, **_: compiled.append(work) or work)
    settings = dict(eps=0.03 * radii, queries=30, slots=5, return_info=True) | more
    eager = square(model, x, y, generator=fixed(), **settings)
    model.sizes.clear()
    found = square(model, x, y, engine="compile", generator=fixed(), **settings)
    assert compiled and set(model.sizes) == {5} and found.forwards == sum(model.sizes) > eager.forwards
    for name in ("x_adv", "success", "loss", "steps_used"):
        assert torch.equal(getattr(found, name), getattr(eager, name)), name
    assert eager.success.any() and not eager.success.all()


def test_class(images):
    model, x, y = images
    attack = Square(model, eps=4 / 255, queries=5)
    assert torch.equal(attack(x, y, generator=fixed()), square(model, x, y, eps=4 / 255, queries=5, generator=fixed()))


@pytest.mark.parametrize("change, message", [
    (dict(queries=0), "queries must be an integer >= 1"),
    (dict(queries=2**20), "below 2"),
    (dict(p_init=0.0), "p_init must be a share"),
    (dict(x=torch.rand(2, 12)), r"images \[B, C, H, W\], got \[2, 12\]"),
    (dict(x=torch.rand(2, 3, 4, 9), norm="l2", eps=1.0), "sides of at least 5"),
    (dict(norm="l0"), "'linf', 'l2', 'l1'"),
    (dict(slots=0), "slots must be an integer >= 1"),
    (dict(slots=1, loss=lambda out, y: out.sum(1)), "slots needs a loss by name"),
])  # fmt: skip
def test_bad_input(change, message):
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(5))
    given = dict(x=torch.rand(2, 3, 8, 8), y=torch.zeros(2, dtype=torch.int64)) | change
    with pytest.raises(ValueError, match=message):
        square(model, given.pop("x"), given.pop("y"), **given)
