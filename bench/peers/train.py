"""Training steps as the papers' released scripts take them, in our words: what the methods are timed against.

    rvlm profile train --method hpt_gpd --twin bench/peers/train.py:epoch

Text is encoded anew at every forward pass, with a graph; the attack calls backward() on the whole model, weight
gradients and all; teachers are neither under no_grad nor cached; MMT-ARD's third teacher is asked and not used. Under
the settings of bench_train.py the losses are those of the methods; random starts, clipping, SGD, weights of rows and
other knobs of a preset are not followed, since they cost next to nothing.
"""

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rvlm.data import Data
from rvlm.methods import Method
from rvlm.models import Clip, load_clip
from rvlm.training.trainer import _mix

__all__ = ["STEPS", "epoch"]


def logits(clip: Clip, x: Tensor, texts: list[str]) -> Tensor:
    text = F.normalize(clip.model.encode_text(clip.tokenizer(texts).to(x.device)), dim=-1)
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


class Prompted(nn.Module):
    """A copy of a model with deep prompts [J, P, D] in both towers, which begin as those of an adapter.

    Prompts are tokens: rows that hooks append to the image's and write over the words behind the start of a text.
    Sequences have their full length."""

    def __init__(self, clip: Clip, adapter) -> None:
        super().__init__()
        self.clip = copy.deepcopy(clip).requires_grad_(False)
        self.prompts, self.context = (nn.Parameter(t.detach().clone()) for t in (adapter.prompts, adapter.context))
        visual, text = self.clip.model.visual.transformer, self.clip.model.transformer
        for number, block in enumerate(visual.resblocks[: len(self.prompts)]):
            block.register_forward_pre_hook(functools.partial(self._append, number), with_kwargs=True)
        for number, block in enumerate(text.resblocks[: len(self.context)]):
            block.register_forward_pre_hook(functools.partial(self._write, number), with_kwargs=True)

    def _append(self, number: int, module: nn.Module, given: tuple, named: dict) -> tuple[tuple, dict]:
        x, rows = given[0], self.prompts[number]
        rows = self.clip.model.visual.ln_pre(rows) if number == 0 else rows
        x = x if number == 0 else x[:, : -len(rows)]
        return (torch.cat([x, rows.expand(len(x), -1, -1)], 1), *given[1:]), named

    def _write(self, number: int, module: nn.Module, given: tuple, named: dict) -> tuple[tuple, dict]:
        x, rows = given[0], self.context[number]
        rows = rows + self.clip.model.positional_embedding[1 : 1 + len(rows)] if number == 0 else rows
        return (torch.cat([x[:, :1], rows.expand(len(x), -1, -1), x[:, 1 + len(rows) :]], 1), *given[1:]), named

    def logits(self, x: Tensor, sentences: list[str]) -> Tensor:
        words = "x " * self.context.shape[1]
        text = self.clip.model.encode_text(
            self.clip.tokenizer([words + sentence for sentence in sentences]).to(x.device)
        )
        return self.clip.logit_scale * self.clip.encode_pixels(x) @ F.normalize(text, dim=-1).T


def apd(student: Prompted, teacher: Prompted, x: Tensor, y: Tensor, sentences: list[str], attack: dict) -> Tensor:
    """Of adversarial prompt distillation, as scripts for prompt learning would take it: the sum of both losses.

    Weights are frozen, and the attack asks for the gradient of the image alone."""
    adv = x.clone()
    for _ in range(attack["steps"]):
        adv.requires_grad_()
        slope = torch.autograd.grad(F.cross_entropy(student.logits(adv, sentences), y), adv)[0]
        adv = adv.detach() + attack["alpha"] * slope.sign()
        adv = torch.clamp(x + torch.clamp(adv - x, -attack["eps"], attack["eps"]), 0, 1)
    said, found = teacher.logits(x, sentences), student.logits(adv, sentences)
    distilled = F.kl_div(found.log_softmax(1), said.softmax(1).detach(), reduction="batchmean")
    feedback = F.kl_div(said.log_softmax(1), found.softmax(1).detach(), reduction="batchmean")
    return distilled + F.cross_entropy(said, y) + feedback


STEPS = {"tecoa": tecoa, "pmg_aft": pmg_aft, "hpt_gpd": hpt_gpd, "mmt_ard": mmt_ard, "apd": apd}

TEACHERS = {  # of a method: what a step calls a frozen model -> the setting that names it
    "apd": {},
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
    alpha = 2.5 * config.eps / config.steps if config.alpha is None else config.alpha
    attack = {"eps": float(config.eps), "alpha": alpha, "steps": config.steps}
    if name == "apd":
        return _prompted_epoch(method, student, data, attack)
    teachers = {role: load_clip(of, student.device) if isinstance(of, str) else of for role, of in sources.items()}
    if name == "pmg_aft":
        teachers["frozen"] = copy.deepcopy(student)
    for teacher in teachers.values():
        teacher.requires_grad_(True)
    template = method.training_templates(data)[0]
    texts = [template.format(thing) for thing in data.class_names]
    steps = [STEPS[name]]
    if name == "hpt_gpd":
        anchored, transfer = hpt_gpd_anchored, hpt_gpd
        steps = {"both": [anchored, transfer], "ga": [anchored], "hpt": [transfer]}[config.stages]

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


def _prompted_epoch(method: Method, student: Clip, data: Data, attack: dict) -> Callable[[], int]:
    """Of APD: prompts begin as the method's own do."""
    config, like = method.config, copy.deepcopy(student)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_mix(0, 0, -(2**20)))
        method.setup(like, data)
    sentences = [config.sentence.format(name) for name in data.class_names]

    def run() -> int:
        learning, teacher = Prompted(student, like.adapter), Prompted(student, like.adapter)
        rows = [t for model in (learning, teacher) for t in (model.prompts, model.context)]
        optimizer = torch.optim.AdamW(rows, lr=config.lr, weight_decay=0.0)
        for chosen in torch.arange(len(data)).split(config.batch_size):
            x, y, _ = (t.to(student.device) for t in data.batch(chosen))
            loss = apd(learning, teacher, x, y, sentences, attack)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return len(data)

    return run
