"""Engines: the gradients of a region and of a graph are eager mode's; what cannot be compiled says so."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rvlm.attacks import AttackWarning, apgd, mifgsm, pgd
from rvlm.attacks import engines as module
from rvlm.attacks.engines import Answer, Compiled, Question, Replayed, eager


def fixed():
    return torch.Generator().manual_seed(0)


class Head(nn.Module):
    """Pixels [B, 3, 8, 8] -> unit-norm embedding [B, 6] -> five logits; a batch-first attention inside."""

    fused_head = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 6, 4, stride=4)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.text = nn.Parameter(torch.randn(6, 5))

    def embed(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return F.normalize(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1), dim=1)

    def head(self):
        return 5 * self.text

    def forward(self, x):
        return self.embed(x) @ self.head()


def uncompiled(monkeypatch):
    """Regions as they are, and how often each was asked for."""
    asked = []

    def compile(work, **_):
        def run(*args):
            asked.append(getattr(work, "__name__", "model"))
            return work(*args)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(module, "_fold", lambda: None)
    return asked


QUESTIONS = [("head", loss) for loss in ("ce", "margin", "dlr", "dlr-targeted", "ce-targeted")]
QUESTIONS += [("vit", loss) for loss in ("ce", "margin", "dlr", "dlr-targeted", "ce-targeted")]


@pytest.mark.parametrize("kind, loss", QUESTIONS)
def test_a_region_is_the_eager_gradient(kind, loss, build, batch, monkeypatch):
    uncompiled(monkeypatch)
    model = (Head() if kind == "head" else build(kind)).double().requires_grad_(False)
    x, y = batch()
    target = (y + 1) % 5 if loss.endswith("targeted") else None
    question = Question(model, loss, y, target, model.head() if kind == "head" else None)
    got, expected = Compiled(model).gradient(question, x), eager(question, x)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


ATTACKS = [
    (pgd, {"steps": 6}),
    (pgd, {"steps": 6, "targeted": True, "loss": "margin"}),
    (pgd, {"steps": 6, "best": "adv", "early_stop": "freeze", "restarts": 2}),
    (pgd, {"steps": 6, "early_stop": "cycle"}),
    (apgd, {"steps": 6, "loss": "dlr-targeted", "best": "loss"}),
    (mifgsm, {"steps": 4, "transforms": ["si"]}),
    (pgd, {"steps": 4, "loss": lambda output, y: F.cross_entropy(output, y, reduction="none")}),
]


@pytest.mark.parametrize("kind", ["head", "vit"])
@pytest.mark.parametrize("attack, given", ATTACKS)
@pytest.mark.parametrize("engine", ["compile", "cudagraph"])
def test_attacks_are_the_same_by_engines(engine, attack, given, kind, build, batch, monkeypatch):
    asked = uncompiled(monkeypatch)
    captured = []

    def capture(work):
        """Stands for a CUDA graph: what a replay writes lies where the first run's results were."""
        found = Answer(*(t.clone() for t in work()))
        captured.append(1)

        def replay():
            for held, new in zip(found, work(), strict=True):
                held.copy_(new)

        return replay, found

    if engine == "cudagraph":
        monkeypatch.setattr(
            "rvlm.attacks.search.engine_for", lambda name, *_: Replayed(capture) if name == engine else None
        )
    model, (x, y) = Head().double() if kind == "head" else build(kind), batch()
    trained = [p.requires_grad for p in model.parameters()]
    for _ in range(2):
        got = attack(model, x, y, eps=4 / 255, generator=fixed(), engine=engine, return_info=True, **given)
        plain = attack(model, x, y, eps=4 / 255, generator=fixed(), return_info=True, **given)
        assert torch.equal(got.success, plain.success)
        if "restarts" in given:  # which go with the whole batch: a fooled sample may find a better image
            continue
        assert (got.x_adv - plain.x_adv).abs().max() < 1e-9 and torch.equal(got.steps_used, plain.steps_used)
        assert (got.backwards, got.zero_gradients) == (plain.backwards, plain.zero_gradients)
    assert [p.requires_grad for p in model.parameters()] == trained
    named = isinstance(given.get("loss", "ce"), str)
    if engine == "compile":
        assert any(name.startswith("_at_") for name in asked) == named and asked
    else:
        assert len(captured) == (2 if named else 0), "once per attack and shape"


def test_a_loop_calls_the_compiled_model_and_a_look_does_not(build, batch, monkeypatch):
    asked = uncompiled(monkeypatch)
    model, (x, y) = build("vit"), batch()
    for _ in range(2):
        pgd(model, x, y, steps=5, engine="compile", generator=fixed(), return_info=True)
    assert asked == ["_at_logits"] * 9, "the first pass over a new model is eager, and so are the last looks"


def test_regions_go_with_their_model(batch, monkeypatch):
    uncompiled(monkeypatch)
    model, (x, y) = Head(), batch(torch.float32)
    pgd(model, x, y, steps=3, engine="compile")
    assert model in module._of_modules
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


class Broken(nn.Module):
    """Leaves the graph, so that a region cannot hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(192, 5)

    def forward(self, x):
        torch._dynamo.graph_break()
        return self.linear(x.flatten(1))


@pytest.mark.slow
def test_what_cannot_be_a_region_is_compiled_in_parts(batch, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    model, (x, y) = Broken(), batch(torch.float32)
    plain = pgd(model, x, y, random_start=False)
    with pytest.warns(AttackWarning, match="compiles this model's forward pass alone"):
        got = pgd(model, x, y, random_start=False, engine="compile")
    assert ((got - plain).abs() > 1e-6).float().mean() < 0.01


class Counting(nn.Module):
    """Another function at every call: a compiled one that did not ask would repeat one of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.calls = nn.Linear(192, 5), 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x.flatten(1)) * (-1.0 if self.calls % 2 else 1.0)


@pytest.mark.slow
def test_a_model_that_changes_as_it_runs_is_not_taken_for_still(batch, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (x, y), losses = batch(torch.float32), {}
    with pytest.warns(AttackWarning, match="forward pass alone"):
        for engine in ("eager", "compile"):
            seen = losses[engine] = []
            pgd(
                Counting(), x, y, steps=6, engine=engine, random_start=False,
                callback=lambda k, x_adv, loss, seen=seen: seen.append(loss.sum()),
            )  # fmt: skip
    torch.testing.assert_close(torch.stack(losses["compile"]), torch.stack(losses["eager"]), rtol=1e-4, atol=1e-4)


class Scaled(nn.Module):
    """Logits times a number that Python knows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.factor = nn.Linear(192, 5), 1.0

    def forward(self, x):
        return self.linear(x.flatten(1)) * self.factor


def losses_by_engine(model, x, y) -> list[torch.Tensor]:
    """At every step: eager, compiled."""
    seen = {"eager": [], "compile": []}
    for engine, losses in seen.items():
        pgd(
            model, x, y, steps=4, engine=engine, random_start=False,
            callback=lambda k, x_adv, loss, losses=losses: losses.append(loss.clone()),
        )  # fmt: skip
    return [torch.stack(losses) for losses in seen.values()]


@pytest.mark.slow
def test_hooks_that_come_and_go_are_seen(batch, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, (x, y) = Scaled(), batch(torch.float32)
    losses_by_engine(model, x, y)
    hook = model.linear.register_forward_hook(lambda module, args, output: 0.1 * output + torch.arange(5.0))
    hooked = losses_by_engine(model, x, y)
    hook.remove()
    free = losses_by_engine(model, x, y)
    assert (hooked[0] - free[0]).abs().max() > 0.1
    for eager_ones, compiled_ones in (hooked, free):
        torch.testing.assert_close(compiled_ones, eager_ones, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_model_may_change_more_often_than_torch_recompiles(batch, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, (x, y) = Scaled(), batch(torch.float32)
    with torch._dynamo.config.patch(recompile_limit=2):
        for factor in (1.0, 2.0, 3.0, 4.0, 1.0):
            model.factor = factor
            eager_ones, compiled_ones = losses_by_engine(model, x, y)
            torch.testing.assert_close(compiled_ones, eager_ones, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_region_has_no_weight_gradient_and_no_product_per_token(batch, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    from torch._inductor.utils import run_and_get_code

    model, (x, y) = Head().requires_grad_(False), batch(torch.float32)
    question = Question(model, "ce", y, None, model.head())
    got, code = run_and_get_code(lambda: Compiled(model).gradient(question, x))
    torch.testing.assert_close(got.grad, eager(question, x).grad)
    assert len(code) == 1 and "extern_kernels.bmm" not in code[0]
    pgd(model, x, y, engine="compile")  # and once more by the attack: the same region for both precisions of a cascade
    result = pgd(model, x, y, engine="compile", precision="cascade", return_info=True)
    assert torch.equal(result.success, model(result.x_adv).argmax(1) != y)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("attack, given", ATTACKS)
@pytest.mark.parametrize("precision", [None, "bf16", "cascade"])
def test_cuda_graphs_are_eager_attacks(attack, given, precision, build, batch):
    if precision == "cascade" and callable(given.get("loss")):
        pytest.skip("the same path")
    model, (x, y) = build("vit", torch.float32).cuda(), [t.cuda() for t in batch(torch.float32)]
    given = {"eps": 4 / 255, "precision": precision, "return_info": True, **given}
    plain, graphed = (
        attack(model, x, y, generator=fixed(), engine=engine, **given) for engine in ("eager", "cudagraph")
    )
    assert ((graphed.x_adv - plain.x_adv).abs() > 1e-6).float().mean() < (0.01 if precision is None else 0.1)
    assert (graphed.success != plain.success).sum() <= 1


def test_nets_of_convolutions_see_images_channels_last(batch, monkeypatch):
    uncompiled(monkeypatch)
    seen, (x, y) = [], batch(torch.float32)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    model.register_forward_pre_hook(
        lambda m, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    plain = pgd(model, x, y, steps=3, random_start=False)
    assert not any(seen)
    for _ in range(2):
        seen.clear()
        got = pgd(model, x, y, steps=3, random_start=False, engine="compile")
        assert got.is_contiguous() and ((got - plain).abs() > 1e-6).float().mean() < 0.01
    assert seen == [True] * 3
