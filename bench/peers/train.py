"""Training steps as the papers' released scripts take them, in our words: what the methods are timed against.

    rvlm profile train --method hpt_gpd --twin bench/peers/train.py:epoch

Text is encoded anew at every forward pass, with a graph; the attack calls backward() on the whole model, weight
gradients and all; teachers are neither under no_grad nor cached; MMT-ARD's third teacher is asked and not used. Under
the settings of bench_train.py the losses are those of the methods; random starts, clipping, SGD, weights of rows and
other knobs of a preset are not followed, since they cost next to nothing.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from rvlm.data import Data
from rvlm.methods import Method
from rvlm.models import Clip, load_clip

__all__ = ["STEPS", "epoch"]


def logits(clip: Clip, x: Tensor, texts: list[str]) -> Tensor:
    text = clip.encode_text(texts)
    return clip.logit_scale * clip.encode_pixels(x) @ text.T


def attacked(x: Tensor, loss_of, eps: float, alpha: float, steps: int) -> Tensor:
    delta = torch.zeros_like(x)
    for _ in range(steps):
        delta.requires_grad_()
        delta.grad = None
        loss_of(x + delta).backward()
        step = delta.detach() + alpha * delta.grad.sign()
        step = torch.clamp(step, -eps, eps)
        delta = torch.clamp(x + step, 0, 1) - x
    return (x + delta).detach()


def kl(first: Tensor, second: Tensor) -> Tensor:
    return F.kl_div(second.log_softmax(1), first.softmax(1), reduction="batchmean")


def tecoa(student: Clip, teachers: dict[str, Clip], x: Tensor, y: Tensor, texts: list[str], attack: dict) -> Tensor:
    x_adv = attacked(x, lambda v: F.cross_entropy(logits(student, v, texts), y), **attack)
    return F.cross_entropy(logits(student, x_adv, texts), y)


def pmg_aft(student: Clip, teachers: dict[str, Clip], x: Tensor, y: Tensor, texts: list[str], attack: dict) -> Tensor:
    x_adv = attacked(x, lambda v: F.cross_entropy(logits(student, v, texts), y), **attack)
    adv, clean = logits(student, x_adv, texts), logits(student, x, texts)
    frozen = logits(teachers["frozen"], x_adv, texts)
    return F.cross_entropy(adv, y) + kl(frozen, adv) + kl(clean, adv)


def hpt_gpd(student: Clip, teachers: dict[str, Clip], x: Tensor, y: Tensor, texts: list[str], attack: dict) -> Tensor:
    x_adv = attacked(x, lambda v: F.cross_entropy(logits(student, v, texts), y), **attack)
    return kl(logits(student, x_adv, texts), logits(teachers["proxy"], x_adv, texts))


def hpt_gpd_anchored(
    student: Clip, teachers: dict[str, Clip], x: Tensor, y: Tensor, texts: list[str], attack: dict
) -> Tensor:
    """Its first stage."""
    x_adv = attacked(x, lambda v: F.cross_entropy(logits(student, v, texts), y), **attack)
    return kl(logits(student, x_adv, texts), logits(teachers["proxy"], x, texts))


def mmt_ard(student: Clip, teachers: dict[str, Clip], x: Tensor, y: Tensor, texts: list[str], attack: dict) -> Tensor:
    clean_said = logits(teachers["clean"], x, texts)
    x_adv = attacked(x, lambda v: kl(clean_said.detach(), logits(student, v, texts)), **attack)
    adv, clean = logits(student, x_adv, texts), logits(student, x, texts)
    robust_said, origin_said = logits(teachers["robust"], x_adv, texts), logits(teachers["origin"], x, texts)
    kl(origin_said, clean)
    return kl(robust_said, adv) + kl(clean_said, clean)


STEPS = {"tecoa": tecoa, "pmg_aft": pmg_aft, "hpt_gpd": hpt_gpd, "mmt_ard": mmt_ard}

TEACHERS = {  # of a method: what a step calls a frozen model -> the setting that names it
    "tecoa": {},
    "pmg_aft": {},
    "hpt_gpd": {"proxy": "proxy"},
    "mmt_ard": {"robust": "robust_teacher", "clean": "clean_teacher", "origin": "robust_teacher"},
}


def epoch(method: Method, student: Clip, data: Data) -> Callable[[], int]:
    """What trains a copy of the student for one epoch of each stage of a method, in the order of the samples, and
    returns the number of images. Teachers are loaded before."""
    config, name = method.config, method.name
    if name not in STEPS:
        raise ValueError(f"there is no paper-style step of {name}, only of {', '.join(STEPS)}")
    sources = {role: getattr(config, setting) for role, setting in TEACHERS[name].items()}
    teachers = {role: load_clip(of, student.device) if isinstance(of, str) else of for role, of in sources.items()}
    if name == "pmg_aft":
        teachers["frozen"] = copy.deepcopy(student)
    for teacher in teachers.values():
        teacher.requires_grad_(True)
    template = method.training_templates(data)[0]
    texts = [template.format(thing) for thing in data.class_names]
    alpha = 2.5 * config.eps / config.steps if config.alpha is None else config.alpha
    steps = [STEPS[name]]
    if name == "hpt_gpd":
        anchored, transfer = hpt_gpd_anchored, hpt_gpd
        steps = {"both": [anchored, transfer], "ga": [anchored], "hpt": [transfer]}[config.stages]
    attack = {"eps": float(config.eps), "alpha": alpha, "steps": config.steps}

    def run() -> int:
        learning = copy.deepcopy(student).requires_grad_(True)
        optimizer = torch.optim.AdamW(learning.model.visual.parameters(), lr=config.lr, weight_decay=0.0)
        for step in steps:
            for rows in torch.arange(len(data)).split(config.batch_size):
                x, y, _ = (t.to(student.device) for t in data.batch(rows))
                loss = step(learning, teachers, x, y, texts, attack)
                optimizer.zero_grad()  # else the attack's weight gradients would be added
                loss.backward()
                optimizer.step()
        return len(steps) * len(data)

    return run
