"""Precision: searches in bf16 whose verdicts are fp32's, TF32 that ends with the attack, no trace of either."""

import math

import pytest
import torch
from torch import nn

from rvlm.attacks import AttackWarning, apgd, autoattack, cw, deepfool, fab, fmn, mifgsm, pgd, scoring, square
from rvlm.attacks.contract import arithmetic
from rvlm.attacks.stages import ATTACKS as BY_NAME
from rvlm.attacks.stages import CONTINUED, Stage


def fixed():
    return torch.Generator().manual_seed(0)


class Coarse(nn.Module):
    """A margin of two classes that bf16 gets wrong by `slip`, upwards or downwards: z_1 - z_0 = 100 (mean - 0.5)."""

    def __init__(self, slip: float) -> None:
        super().__init__()
        self.slip, self.seen = slip, []
        self.one = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.one.weight)

    def forward(self, x):
        mean = x.flatten(1).mean(1, keepdim=True)
        narrow = self.one(mean).dtype == torch.bfloat16
        self.seen.append((narrow, len(x)))
        z = 100 * (mean - 0.5) + (self.slip if narrow else 0.0)
        return torch.cat([-z / 2, z / 2], 1)


def toy(gaps):
    """Images of mean 0.5 + gap, labelled by the sign of the gap."""
    gaps = torch.tensor(gaps)
    return (0.5 + gaps).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous(), (gaps > 0).long()


ATTACKS = [
    (pgd, {"steps": 8, "random_start": False}),
    (pgd, {"steps": 8, "best": "adv", "early_stop": "freeze"}),
    (apgd, {"steps": 8}),
    (mifgsm, {"steps": 8}),
    (square, {"queries": 40}),
]


@pytest.mark.parametrize("attack, given", ATTACKS, ids=[attack.__name__ for attack, _ in ATTACKS])
@pytest.mark.parametrize("slip", [-3.0, 0.0])
def test_cascade_counts_fp32_verdicts_alone(attack, given, slip):
    """eps reaches gaps up to 0.04, two units of margin less in bf16 (slip < 0: it believes that it has fooled more)."""
    x, y = toy([0.02, 0.035, 0.055, 0.2])
    model = Coarse(slip)
    result = attack(model, x, y, eps=0.04, precision="cascade", generator=fixed(), return_info=True, **given)
    with scoring(model):
        assert torch.equal(result.success, model(result.x_adv).argmax(1) != y)
    assert result.success.tolist() == [True, True, False, False]
    assert (result.fooled_in_bf16_only > 0) == (slip < 0) and result.fooled_in_fp32_only == 0
    assert (result.x_adv - x).abs().max() <= 0.04 + 1e-6


def test_cascade_finds_what_bf16_misses():
    """bf16 sees every margin three units too high, so it fools less than fp32 does with its images."""
    x, y = toy([0.02, 0.035])
    result = pgd(Coarse(3.0), x, y, eps=0.04, precision="cascade", generator=fixed(), return_info=True)
    assert result.success.all() and result.fooled_in_fp32_only > 0 and result.fooled_in_bf16_only == 0


def test_cascade_continues_survivors_alone_from_their_best_point_for_a_quarter_of_the_steps():
    x, y = toy([0.02, 0.055, 0.2])
    model, starts = Coarse(0.0), []

    def watch(step, seen, loss):
        if step == 0:
            starts.append(seen.clone())

    result = pgd(
        model, x, y, eps=0.04, steps=10, precision="cascade", callback=watch, random_start=False, return_info=True
    )
    assert [n for narrow, n in model.seen if narrow] == [3] * 11, "ten steps and the last iterate"
    assert [n for narrow, n in model.seen if not narrow] == [3, *[2] * (math.ceil(10 / 4) + 1)]
    assert result.steps_used.tolist() == [10, 13, 13]
    assert torch.equal(starts[0], x) and torch.allclose(starts[1], x[1:] - 0.04, atol=1e-6), "not from x again"


def test_cascade_goes_on_with_restarts_until_fp32_is_fooled():
    x, y = toy([0.035])
    model = Coarse(-30.0)  # bf16 believes that it has fooled the model on any image
    result = pgd(
        model, x, y, eps=0.04, alpha=0.001, steps=4, restarts=3, precision="cascade", best="adv",
        early_stop="freeze", generator=fixed(), return_info=True,
    )  # fmt: skip
    assert result.fooled_in_bf16_only == 3 and not result.success.any()


def test_cascade_aims_at_every_target(build, batch):
    model, (x, _) = build("vit", torch.float32), batch(torch.float32)
    y = model(x).argmax(1)
    result = apgd(model, x, y, eps=8 / 255, steps=5, loss="dlr-targeted", precision="cascade", return_info=True)
    with scoring(model):
        assert torch.equal(result.success, model(result.x_adv).argmax(1) != y) and result.success.any()


@pytest.mark.parametrize("slots", [None, 3])
def test_the_verdict_of_an_attack_that_aims_at_every_target(slots, build, batch):
    model, (x, _) = build("vit", torch.float32), batch(torch.float32)
    y = model(x).argmax(1)
    given = {"eps": 8 / 255, "steps": 5, "loss": "dlr-targeted", "early_stop": "compact", "slots": slots}
    result = apgd(model, x, y, precision="bf16", return_info=True, **given)
    with scoring(model):
        assert torch.equal(result.success, model(result.x_adv).argmax(1) != y) and result.success.any()


@pytest.mark.parametrize("precision", ["bf16", "cascade"])
def test_weights_are_cast_once_and_back(precision, build, batch):
    model, (x, y) = build("vit", torch.float32), batch(torch.float32)
    parameters = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    seen = []
    model.blocks[0].mlp[0].register_forward_hook(lambda m, args, out: seen.append((m.weight.dtype, id(m.weight))))
    pgd(model, x, y, eps=0.5 / 255, steps=6, restarts=2, precision=precision, generator=fixed(), return_info=True)
    narrow = {number for dtype, number in seen if dtype == torch.bfloat16}
    assert len(narrow) == 1 and any(dtype == torch.float32 for dtype, _ in seen)
    for name, p in model.named_parameters():
        assert (id(p), True) == (parameters[name][0], torch.equal(p, parameters[name][1]))


def test_an_error_in_the_fp32_part_leaves_no_trace(build, batch):
    model, (x, _) = build("vit", torch.float32), batch(torch.float32)
    y = model(x).argmax(1)
    before = {name: id(p) for name, p in model.named_parameters()}

    def fail(m, args, out):
        if m.weight.dtype == torch.float32:
            raise RuntimeError("the model broke")

    handle = model.blocks[0].mlp[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="the model broke"):
        pgd(model, x, y, precision="cascade")
    handle.remove()
    assert {name: id(p) for name, p in model.named_parameters()} == before and not torch.is_autocast_enabled("cpu")
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("attack", [fab, fmn, cw, deepfool])
def test_attacks_that_cannot_go_on_refuse_the_cascade(attack, build, batch):
    with pytest.raises(ValueError, match="can go on from the best point"):
        attack(build("linear", torch.float32), *batch(torch.float32), precision="cascade")


def test_stages_know_which_attacks_can_go_on(build, batch):
    model, (x, y) = build("linear", torch.float32), batch(torch.float32)
    for name in BY_NAME:
        stage = Stage(name, name, {"queries": 3} if name == "square" else {"steps": 2})
        assert stage.precision("cascade") == ("cascade" if name in CONTINUED else "fp32")
        stage(model, x, y, eps=1 / 255, generator=fixed(), precision="cascade")
    result = autoattack(
        model, x, eps=1 / 255, version="custom", attacks=["apgd-ce-3", "fab-t-2", "square-5"], precision="cascade",
        return_info=True,
    )  # fmt: skip
    with scoring(model):
        assert torch.equal(result.success, model(result.x_adv).argmax(1) != model(x).argmax(1))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "cascade"])
@pytest.mark.parametrize("attack", [pgd, autoattack])
def test_verdicts_are_in_fp32_under_the_callers_autocast(attack, precision):
    """In bf16 every image counts as fooled, the clean one, too."""
    x, y = toy([0.2, 0.02])
    given = {"version": "custom", "attacks": ["apgd-ce-3", "square-5"]} if attack is autoattack else {}
    with torch.autocast("cpu", torch.bfloat16):
        result = attack(
            Coarse(-100.0), x, y, eps=0.04, precision=precision, generator=fixed(), return_info=True, **given
        )
    assert not result.success[0] and result.loss[0] < result.loss[1]
    if attack is autoattack:
        assert result.broken_by[0] == -1 and result.robust["clean"] == 2


def flags():
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return cuda.allow_tf32, cudnn.allow_tf32, cuda.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision


@pytest.mark.parametrize("cudnn", [True, False])
def test_tf32_ends_with_the_block(cudnn, build, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", cudnn)
    before, model = flags(), build("linear")
    with pytest.raises(RuntimeError, match="stop"), arithmetic(model, torch.device("cpu"), "tf32"):
        assert flags() == (True, True, "tf32", "tf32", "tf32")
        raise RuntimeError("stop")
    assert flags() == before


def test_tf32_on_a_cpu_is_fp32_and_says_so(build, batch):
    model, (x, y) = build("conv", torch.float32), batch(torch.float32)
    before = flags()
    with pytest.warns(AttackWarning, match="on cpu it is fp32"):
        x_adv = pgd(model, x, y, precision="tf32", generator=fixed())
    assert torch.equal(x_adv, pgd(model, x, y, precision="fp32", generator=fixed())) and flags() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tf32_is_on_during_an_attack_alone(build, batch):
    model, (x, y) = build("conv", torch.float32).cuda(), [t.cuda() for t in batch(torch.float32)]
    before, seen = flags(), []
    pgd(model, x, y, precision="tf32", callback=lambda *_: seen.append(torch.backends.cuda.matmul.allow_tf32))
    assert all(seen) and flags() == before
