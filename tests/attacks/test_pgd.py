"""What the options of pgd mean."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from rvlm.attacks import FGSM, PGD, ball, fgsm, losses, mifgsm, pgd, scoring
from rvlm.ops import steps as step_ops

EPS = 8 / 255
ORDER = {"linf": torch.inf, "l2": 2, "l1": 1}


def fixed(seed=0):
    return torch.Generator().manual_seed(seed)


def per_sample_loss(model, x, y):
    with torch.no_grad():
        return F.cross_entropy(model(x), y, reduction="none")


def test_a_linear_model_is_attacked_optimally(build, batch):
    """The worst case of a linear model is known: x - eps * sign(w_y - w_c), and in L2 along the same direction."""
    model, (x, y) = build("linear"), batch()
    weight = model[1].weight.detach()
    two = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).double()
    two[1].weight.data.copy_(weight[:2])
    y = y % 2
    direction = (two[1].weight[1 - y] - two[1].weight[y]).detach().view(x.shape)
    assert torch.allclose(
        pgd(two, x, y, eps=EPS, alpha=EPS / 4, steps=8, generator=fixed()), x + EPS * direction.sign()
    )
    assert torch.allclose(fgsm(two, x, y, eps=EPS), x + EPS * direction.sign())
    unit = direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert torch.allclose(pgd(two, x, y, eps=0.3, alpha=0.3, steps=40, norm="l2", generator=fixed()), x + 0.3 * unit)


def test_mutated_steps_are_caught(build, batch, monkeypatch):
    """The check above is worth something: with the sign of alpha turned, or without the ball, it fails."""
    step = step_ops.linf_step_
    mutants = {
        "sign": lambda x_adv, g, x, alpha, eps, *rest, **kw: step(x_adv, g, x, -alpha, eps, *rest, **kw),
        "ball": lambda x_adv, g, x, alpha, eps, *rest, **kw: step(x_adv, g, x, alpha, 10 * eps, *rest, **kw),
    }
    model, (x, y) = build(), batch()
    clean = per_sample_loss(model, x, y)
    good = pgd(model, x, y, eps=EPS, generator=fixed())
    assert (per_sample_loss(model, good, y) > clean).all() and (good - x).abs().max() <= EPS + 1e-12
    for name, mutant in mutants.items():
        monkeypatch.setitem(ball._STEPS, "linf", mutant)
        bad = pgd(model, x, y, eps=EPS, generator=fixed())
        if name == "sign":
            assert not (per_sample_loss(model, bad, y) > clean).all()
        else:
            assert (bad - x).abs().max() > EPS + 1e-3


@pytest.mark.parametrize("norm, eps", [("linf", EPS), ("l2", 0.4), ("l1", 4.0)])
def test_ball_and_box(model, batch, norm, eps):
    x, y = batch()
    x[0] = 0.0
    x[1] = 1.0
    result = pgd(model, x, y, eps=eps, norm=norm, generator=fixed(), return_info=True)
    delta = (result.x_adv - x).flatten(1)
    assert (delta.norm(ORDER[norm], dim=1) <= eps + 1e-9).all() and result.x_adv.min() >= 0 and result.x_adv.max() <= 1
    assert (result.loss > per_sample_loss(model, x, y)).all()
    assert torch.equal(result.success, result.pred != y)
    assert torch.equal(result.pred, model(result.x_adv).argmax(1))


@pytest.mark.parametrize("norm, eps", [("linf", EPS), ("l2", 0.5), ("l1", 5.0)])
def test_strict_eps_holds_in_float64(build, batch, norm, eps):
    model, (x, y) = build("conv", torch.float32), batch(torch.float32)
    x_adv = pgd(model, x, y, eps=eps, norm=norm, strict_eps=True, generator=fixed())
    delta = (x_adv.double() - x.double()).flatten(1)
    assert delta.norm(ORDER[norm], dim=1).max() <= eps


@pytest.mark.parametrize(
    "norm, eps, alpha", [("linf", EPS, None), ("linf", 2 / 255, 0.2 / 255), ("l2", 0.5, None), ("l1", 5.0, 1.0)]
)
def test_quantized_images_survive_uint8(build, batch, norm, eps, alpha):
    model, (x, y) = build("conv", torch.float32), batch(torch.float32)
    settings = dict(eps=eps, alpha=alpha, steps=20, norm=norm, quantize=255, best="adv", return_info=True)
    result = pgd(model, x, y, generator=fixed(), **settings)
    stored = (result.x_adv * 255).round().to(torch.uint8)
    assert torch.equal(stored.float() / 255, result.x_adv)
    assert torch.equal(model(stored.float() / 255).argmax(1), result.pred)
    if norm == "linf":
        levels = stored.int() - (x * 255).round().int()
        assert levels.abs().max() == round(255 * eps), "the attack reaches the edge of the ball, also with small steps"
    assert (per_sample_loss(model, result.x_adv, y) > per_sample_loss(model, x, y)).all()


def test_per_sample_eps_equals_scalar_runs(build, batch):
    model, (x, y) = build(), batch()
    eps = torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64) / 255
    together = pgd(model, x, y, eps=eps, generator=fixed(), sample_ids=torch.arange(6))
    for k in range(6):
        alone = pgd(
            model, x[k : k + 1], y[k : k + 1], eps=eps[k].item(), generator=fixed(), sample_ids=torch.tensor([k])
        )
        assert (together[k] - alone[0]).abs().max() < 1e-12
    assert torch.equal(together[0], x[0])


@pytest.mark.parametrize("norm, eps", [("linf", EPS), ("l2", 0.4), ("l1", 4.0)])
def test_results_do_not_depend_on_the_batch(model, batch, norm, eps):
    x, y = batch()
    ids = torch.tensor([5, 3, 2**40, 1, 0, 9])
    run = lambda rows: pgd(  # noqa: E731
        model, x[rows], y[rows], eps=eps, norm=norm, generator=fixed(), sample_ids=ids[rows], restarts=2
    )
    whole = run(torch.arange(6))
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    assert (run(order) - whole[order]).abs().max() < 1e-12
    for k in range(6):
        assert (run(torch.tensor([k])) - whole[k : k + 1]).abs().max() < 1e-12


def test_restarts_take_the_best_run(model, batch):
    x, y = batch()
    runs = [pgd(model, x, y, eps=2 / 255, steps=3, generator=fixed(1), restarts=r, return_info=True) for r in (1, 2, 6)]
    for fewer, more in zip(runs, runs[1:], strict=False):
        assert (more.success | ~fewer.success).all(), "a sample that was fooled stays fooled"
        same = more.success == fewer.success
        assert (more.loss[same] >= fewer.loss[same] - 1e-12).all()
    assert runs[2].backwards == 18 * 6 and runs[2].forwards == 24 * 6, "images, of six samples"


def test_best_loss_never_falls_with_steps(model, batch):
    x, y = batch()
    losses_at = [
        pgd(model, x, y, eps=EPS, alpha=3 / 255, steps=n, best="loss", generator=fixed(), return_info=True).loss
        for n in (0, 1, 2, 5, 10)
    ]
    for before, after in zip(losses_at, losses_at[1:], strict=False):
        assert (after >= before - 1e-12).all()
    last = pgd(model, x, y, eps=EPS, alpha=3 / 255, steps=10, generator=fixed(), return_info=True).loss
    assert (losses_at[-1] >= last - 1e-12).all()


def test_best_adv_returns_a_fooling_iterate_where_there_was_one(build, batch):
    model, (x, y) = build(), batch()
    y = model(x).argmax(1)
    fooled = torch.zeros(6, dtype=torch.bool)

    def watch(step, x_adv, loss):
        fooled.logical_or_(model(x_adv).argmax(1) != y)

    result = pgd(
        model, x, y, eps=0.3, alpha=0.25, steps=6, best="adv", random_start=False, callback=watch, return_info=True
    )
    assert fooled.any() and torch.equal(result.success, fooled | (result.pred != y))


def test_freeze_keeps_the_first_fooling_iterate_and_ends_early(build, batch):
    model, (x, _) = build(), batch()
    y = model(x).argmax(1)
    seen = []
    settings = dict(eps=0.2, alpha=0.01, steps=60, random_start=False)
    result = pgd(
        model, x, y, early_stop="freeze", return_info=True, callback=lambda k, v, _: seen.append(v.clone()), **settings
    )  # fmt: skip
    assert result.success.all() and result.backwards < 60 * 6
    full = pgd(model, x, y, return_info=True, **settings)
    assert (result.steps_used <= full.steps_used).all() and result.steps_used.max() < 60
    for k, used in enumerate(result.steps_used.tolist()):
        before = seen[used - 1][k : k + 1]
        assert model(before).argmax(1) == y[k], "one step less did not fool the model"
        assert torch.equal(seen[-1][k], result.x_adv[k])


@pytest.mark.parametrize("best", ["last", "loss", "adv"])
@pytest.mark.parametrize("norm, eps", [("linf", 0.08), ("l2", 1.2), ("l1", 12.0)])
def test_compact_is_freeze_for_less(model, batch, norm, eps, best):
    x, _ = batch()
    y = model(x).argmax(1)
    settings = dict(eps=eps * torch.linspace(1.5, 0.1, 6), norm=norm, steps=30, restarts=2, best=best)
    settings |= {"return_info": True}
    frozen = pgd(model, x, y, early_stop="freeze", generator=fixed(), **settings)
    found = pgd(model, x, y, early_stop="compact", generator=fixed(), **settings)
    assert found.success.any() and torch.equal(found.success, frozen.success)
    assert (found.x_adv - frozen.x_adv).abs().max() < 1e-9
    assert torch.equal(found.steps_used, frozen.steps_used) and torch.equal(found.pred, frozen.pred)
    torch.testing.assert_close(found.loss, frozen.loss, atol=1e-9, rtol=0)
    assert found.backwards < frozen.backwards
    alpha = torch.linspace(0.01, 0.02, 6)
    two = [pgd(model, x, y, early_stop=e, alpha=alpha, generator=fixed(), **settings) for e in ("freeze", "compact")]
    assert (two[0].x_adv - two[1].x_adv).abs().max() < 1e-9


def test_eot_averages_draws(build, batch):
    inner, (x, _) = build("linear"), batch()
    y = inner(x).argmax(1)

    class Noisy(nn.Module):
        def forward(self, v):
            return inner(v + 0.3 * torch.randn_like(v) * v)

    torch.manual_seed(0)
    eot = pgd(Noisy(), x, y, eps=0.1, steps=5, eot=30, generator=fixed(), return_info=True)
    assert eot.backwards == 5 * 30 * 6 and eot.forwards == 6 * 30 * 6
    exact = pgd(inner, x, y, eps=0.1, steps=5, generator=fixed())
    single = pgd(Noisy(), x, y, eps=0.1, steps=5, generator=fixed())
    assert (eot.x_adv - exact).abs().mean() < 0.5 * (single - exact).abs().mean()
    assert (fgsm(Noisy(), x, y, eot=3) - x).abs().max() > 0
    assert (mifgsm(Noisy(), x, y, eot=3) - x).abs().max() > 0
    with pytest.raises(ValueError, match="eot must be an integer >= 1"):
        pgd(inner, x, y, eot=0)


def test_freeze_skips_restarts_of_what_is_fooled(build, batch):
    model, (x, _) = build(), batch()
    y = (model(x).argmax(1) + 1) % 5  # wrong from the start
    result = pgd(model, x, y, restarts=5, early_stop="freeze", generator=fixed(), return_info=True, eps=1e-4)
    assert result.success.all() and result.steps_used.sum() == 0 and result.backwards == 6


@pytest.mark.parametrize("best", ["last", "loss", "adv"])
def test_cycle_is_exact_and_cheaper(model, batch, best):
    x, y = batch()
    settings = dict(eps=EPS, alpha=2 / 255, steps=100, best=best, generator=fixed(), return_info=True)
    full = pgd(model, x, y, **(settings | {"generator": fixed()}))
    short = pgd(model, x, y, early_stop="cycle", **settings)
    assert torch.equal(short.x_adv, full.x_adv) and torch.equal(short.loss, full.loss)
    assert short.backwards < full.backwards and (short.steps_used < 100).all()


def test_samples_whose_cycle_is_known_leave_the_batch(build):
    """With a loss by name; one of your own may know the whole batch."""
    generator = fixed(3)
    x = torch.rand(32, 3, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 5, (32,), generator=generator)
    settings = dict(eps=EPS, alpha=EPS / 4, steps=100, early_stop="cycle", return_info=True, random_start=False)
    left = pgd(build(), x, y, **settings)
    whole = pgd(build(), x, y, loss=lambda z, y: F.cross_entropy(z, y, reduction="none"), **settings)
    assert left.steps_used.max() > 1.5 * left.steps_used.float().mean(), "some take much longer"
    assert left.backwards < 1.3 * int(left.steps_used.sum()) + len(x)
    assert whole.backwards >= 32 * int(whole.steps_used.max())
    torch.testing.assert_close(left.x_adv, whole.x_adv)


def one_by_one(seed, rows):
    """A random model that takes one sample after the other, so that no bit depends on who is still in the batch."""
    generator = fixed(seed)
    first, second = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    x = torch.rand(rows, 1, 2, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 4, (rows,), generator=generator)
    return lambda x: torch.stack([second[:, :4] @ (first @ row).sin() for row in x.flatten(1)]), x, y


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    steps=st.integers(0, 70),
    k=st.sampled_from([1, 2, 3, 5]),
    best=st.sampled_from(["last", "loss"]),
)
def test_cycle_is_exact_on_random_models(seed, steps, k, best):
    model, x, y = one_by_one(seed, rows=3)
    settings = dict(eps=0.1, alpha=0.1 / k, steps=steps, best=best, random_start=False)
    assert torch.equal(pgd(model, x, y, early_stop="cycle", **settings), pgd(model, x, y, **settings))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    steps=st.integers(0, 70),
    k=st.sampled_from([1, 2, 3, 5]),
    best=st.sampled_from(["last", "loss", "adv"]),
    slots=st.sampled_from([None, 1, 3, 20]),
)
def test_leaving_for_either_reason_is_as_exact_as_leaving_when_fooled(seed, steps, k, best, slots):
    model, x, y = one_by_one(seed, rows=7)
    settings = dict(eps=0.1, alpha=0.1 / k, steps=steps, best=best, random_start=False, return_info=True)
    compact, both = (pgd(model, x, y, early_stop=stop, **settings) for stop in ("compact", "compact+cycle"))
    if slots is not None:
        both = pgd(model, x, y, early_stop="compact+cycle", slots=slots, **settings)
    assert torch.equal(both.x_adv, compact.x_adv) and torch.equal(both.success, compact.success)
    assert (both.steps_used <= compact.steps_used).all()


def test_leaving_for_either_reason_is_cheaper(build):
    model = build()
    x = torch.rand(32, 3, 8, 8, generator=fixed(3), dtype=torch.float64)
    settings = dict(eps=0.1, alpha=0.025, steps=100, best="adv", random_start=False, return_info=True)
    found = {
        stop: pgd(model, x, model(x).argmax(1), early_stop=stop, **settings)
        for stop in ("compact", "cycle", "compact+cycle")
    }
    assert 0 < found["compact"].success.sum() < 32
    assert all(torch.equal(result.success, found["compact"].success) for result in found.values())
    both = found.pop("compact+cycle")
    assert all(both.backwards < 0.5 * result.backwards for result in found.values())


@pytest.mark.parametrize("stop", [None, "freeze", "compact", "cycle", "compact+cycle"])
@pytest.mark.parametrize("best", ["last", "adv"])
@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("slots", [1, 4, 40])
def test_slots_say_the_same(stop, best, restarts, slots):
    """The model never sees more than slots; where several restarts fool a sample the image may be another one's."""
    model, x, _ = one_by_one(11, rows=9)
    y, eps = model(x).argmax(1), 0.3 * torch.linspace(1.5, 0.01, 9)
    settings = dict(eps=eps, alpha=eps / 3, steps=15, best=best, restarts=restarts, early_stop=stop, return_info=True)
    plain, sizes = pgd(model, x, y, generator=fixed(), **settings), []

    counted = lambda v: sizes.append(len(v)) or model(v)  # noqa: E731
    found = pgd(counted, x, y, slots=slots, generator=fixed(), **settings)
    assert max(sizes) <= slots and torch.equal(found.success, plain.success)
    assert found.success.any() and not found.success.all()
    same = ~found.success if restarts > 1 and stop in ("freeze", "compact", "compact+cycle") else slice(None)
    assert torch.equal(found.x_adv[same], plain.x_adv[same]) and torch.equal(found.loss[same], plain.loss[same])
    assert torch.equal(found.steps_used[same], plain.steps_used[same])
    assert torch.equal(model(found.x_adv).argmax(1) != y, found.success)


def test_restarts_share_the_batch():
    """As long as it is not full without them."""
    model, x, _ = one_by_one(11, rows=3)
    y, sizes = model(x).argmax(1), []

    counted = lambda v: sizes.append(len(v)) or model(v)  # noqa: E731
    pgd(counted, x, y, eps=0.01, steps=5, restarts=4, early_stop="compact", best="adv", slots=12, generator=fixed())
    assert sizes[:6] == [12] * 6 and sum(sizes) == 12 * 6


@pytest.mark.parametrize("restarts", [1, 3])
def test_slots_keep_their_shape_when_compiled(build, batch, compiled_sizes, restarts):
    """And samples may leave."""
    model, (x, _) = build("mlp"), batch()
    y = model(x).argmax(1)
    settings = dict(eps=0.1 * torch.linspace(1.5, 0.05, 6), steps=20, best="adv", early_stop="compact", slots=4)
    settings |= dict(restarts=restarts, return_info=True)
    found = pgd(model, x, y, engine="compile", generator=fixed(), **settings)
    assert len(compiled_sizes) > 20 and set(compiled_sizes) == {4}
    eager = pgd(model, x, y, generator=fixed(), **settings)
    assert torch.equal(found.success, eager.success) and found.success.any() and not found.success.all()
    assert (found.x_adv - eager.x_adv)[~found.success].abs().max() < 1e-9


def test_targeted_lowers_the_loss_of_the_target(model, batch):
    x, y = batch()
    result = pgd(model, x, y, targeted=True, eps=0.2, steps=30, generator=fixed(), best="loss", return_info=True)
    assert (result.loss < per_sample_loss(model, x, y)).all()
    assert torch.equal(result.success, result.pred == y) and result.success.float().mean() > 0.5


def test_no_labels_means_the_models_own(build, batch):
    model, (x, _) = build(), batch()
    own = model(x).argmax(1)
    assert torch.equal(pgd(model, x, generator=fixed()), pgd(model, x, own, generator=fixed()))


def test_starts(build, batch):
    model, (x, y) = build(), batch()
    near = (x + 0.3 * EPS).clamp(0, 1)
    assert torch.equal(pgd(model, x, y, x_init=near, steps=0), near), "a start inside keeps its bits"
    far = pgd(model, x, y, x_init=(x + 0.2).clamp(0, 1), steps=0)
    assert torch.allclose((far - x).abs(), torch.full_like(x, EPS))
    linf = pgd(model, x, y, steps=0, generator=fixed())
    assert 0.9 * EPS < (linf - x).abs().max() <= EPS and (linf != x).all()
    l2 = (pgd(model, x, y, steps=0, norm="l2", eps=0.3, generator=fixed()) - x).flatten(1).norm(dim=1)
    assert (l2 <= 0.3 + 1e-9).all() and l2.std() > 0.02
    l1 = (pgd(model, x, y, steps=0, norm="l1", eps=3.0, generator=fixed()) - x).flatten(1).norm(1, dim=1)
    assert torch.allclose(l1, torch.full_like(l1, 3.0)), "the noise is far outside the ball"
    assert torch.equal(pgd(model, x, y, steps=0, random_start=False), x)
    assert torch.equal(pgd(model, x, y, eps=0.0, steps=3, generator=fixed()), x), "eps = 0 gives x, bit for bit"


def test_callable_losses_see_whatever_the_model_returns(build, batch):
    model, (x, _) = build(), batch()
    reference = torch.randn(6, 5, dtype=torch.float64, generator=fixed())
    distance = lambda out, ref: ((out["embedding"] - ref) ** 2).sum(1)  # noqa: E731
    result = pgd(lambda v: {"embedding": model(v)}, x, reference, loss=distance, generator=fixed(), return_info=True)
    assert result.success is None and result.pred is None
    assert (result.loss > distance({"embedding": model(x)}, reference)).all()


def test_losses():
    logits, y = torch.tensor([[2.0, 1.0, -torch.inf], [0.0, 3.0, 1.0]]), torch.tensor([0, 2])
    assert torch.allclose(losses.margin(logits, y), torch.tensor([-1.0, 2.0]))
    assert torch.allclose(losses.ce(logits, y), F.cross_entropy(logits, y, reduction="none"))
    with pytest.raises(ValueError, match="at least 2 classes"):
        losses.margin(logits[:, :1], y)


def test_margin_attacks_where_cross_entropy_is_saturated(build, batch):
    model, (x, _) = build("mlp", torch.float32), batch(torch.float32)
    y = model(x).argmax(1)
    saturated = lambda v: 1e5 * model(v)  # noqa: E731
    settings = dict(eps=0.1, steps=20, random_start=False, return_info=True)
    by_ce = pgd(saturated, x, y, **settings).success.float().mean()
    by_margin = pgd(saturated, x, y, loss="margin", **settings).success.float().mean()
    assert by_margin > by_ce


@pytest.mark.parametrize(
    "shape, bounds", [((4, 10), (0.0, 1.0)), ((2, 1, 3, 4, 4), (0.0, 1.0)), ((3, 3, 4, 4), (-1.0, 1.0))]
)
def test_other_shapes_and_bounds(shape, bounds):
    lo, hi = bounds
    x = torch.rand(shape, generator=fixed(), dtype=torch.float64) * (hi - lo) + lo
    weight = torch.randn(x[0].numel(), 3, generator=fixed(), dtype=torch.float64)
    x_adv = pgd(lambda v: v.flatten(1) @ weight, x, bounds=bounds, eps=0.1, generator=fixed())
    assert x_adv.shape == x.shape and x_adv.min() >= lo and x_adv.max() <= hi
    assert (x_adv - x).abs().max() <= 0.1 + 1e-12


def test_precision_and_reference_verdict(build, batch):
    model, (x, y) = build("vit", torch.float32), batch(torch.float32)
    dtypes = set()
    model.blocks[0].mlp[0].register_forward_hook(lambda m, args, out: dtypes.add(out.dtype))
    result = pgd(model, x, y, precision="bf16", generator=fixed(), return_info=True)
    assert dtypes == {torch.bfloat16, torch.float32}, "searched in bf16, verdict in the model's own precision"
    with scoring(model):
        assert torch.equal(result.loss, F.cross_entropy(model(result.x_adv), y, reduction="none"))
    dtypes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        pgd(model, x, y, precision="fp32", generator=fixed())
    assert dtypes == {torch.float32}


@pytest.mark.slow
def test_compiled_engine_equals_eager(build, batch, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # not shared with another process that compiles
    model, (x, y) = build("conv"), batch()
    eager = pgd(model, x, y, generator=fixed())
    assert (pgd(model, x, y, generator=fixed(), engine="compile") - eager).abs().max() < 1e-9


def test_counts_and_callback(build, batch):
    model, (x, y) = build(), batch()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    steps_seen = []
    pgd(model, x, y, steps=7, callback=lambda k, x_adv, loss: steps_seen.append((k, tuple(loss.shape))))
    assert len(calls) == 7, "without info there is no forward beyond the steps"
    assert steps_seen == [(k, (6,)) for k in range(7)]
    calls.clear()
    result = pgd(model, x, y, steps=7, return_info=True)
    assert (len(calls), result.forwards, result.backwards) == (8, 48, 42)
    assert result.steps_used.tolist() == [7] * 6


def test_classes_equal_functions(build, batch):
    model, (x, y) = build(), batch()
    attack = PGD(model, eps=0.1, steps=3)
    assert torch.equal(attack(x, y, generator=fixed()), pgd(model, x, y, eps=0.1, steps=3, generator=fixed()))
    attack.eps = 0.05
    assert torch.equal(attack(x, y, generator=fixed()), pgd(model, x, y, eps=0.05, steps=3, generator=fixed()))
    assert repr(attack) == "PGD(Sequential, eps=0.05, steps=3)"
    assert torch.equal(FGSM(model, eps=0.1)(x, y), fgsm(model, x, y, eps=0.1))
    assert torch.equal(FGSM(model)(x, y, eps=0.1), fgsm(model, x, y, eps=0.1))


def test_radii_per_sample_go_where_the_images_are():
    whole = ball.Ball(torch.empty(2, 3, 4, 4, device="meta"), torch.ones(2), "linf", (0.0, 1.0))
    part = whole.at(torch.zeros(1, dtype=torch.int64, device="meta"))
    assert {t.device.type for t in (whole.radius, part.radius, part.eps)} == {"meta"} and part.eps.shape == (1,)
