"""What an attack optimises: a model, a loss and labels, evaluated together and counted."""

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rvlm import profiling
from rvlm.attacks.checks import AttackWarning, are_probabilities, check_labels
from rvlm.attacks.engines import Compiled, Question, Replayed
from rvlm.attacks.losses import AIMED, LOSSES, loss_at_head, loss_at_logits, wide
from rvlm.attacks.rows import Rows
from rvlm.attacks.trace import Trace

__all__ = ["AttackResult", "Objective", "Passes", "Scores", "most_targets"]

MOST_TARGETS = 9  # classes that an attack aims at unless told otherwise: AutoAttack's
BACKWARD = 2  # forward passes that a backward pass costs, about


@dataclasses.dataclass(frozen=True)
class Passes:
    """Images that go through a model, there and back."""

    forwards: int = 0
    backwards: int = 0

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(self.forwards + other.forwards, self.backwards + other.backwards)

    def times(self, n: float) -> "Passes":
        return Passes(round(n * self.forwards), round(n * self.backwards))

    @property
    def units(self) -> int:
        """Forward passes that take as long, with `BACKWARD` for a backward one."""
        return self.forwards + BACKWARD * self.backwards


@dataclasses.dataclass
class Scores(Rows):
    """One evaluation of a batch: loss [B] and, where outputs are logits and y are labels, fooled [B] and pred [B]."""

    loss: Tensor
    fooled: Tensor | None
    pred: Tensor | None

    def put(self, rows: Tensor, part: "Scores") -> None:
        """Replaces the rows of that index by a part's."""
        for mine, new in ((self.loss, part.loss), (self.fooled, part.fooled), (self.pred, part.pred)):
            if mine is not None:
                mine[rows] = new


@dataclasses.dataclass
class Count:
    """Images that went through the model, how many gradients were zero in every pixel (on the device), how often it
    was asked outside regions and graphs, and the classes of its outputs, once it has been asked."""

    forwards: int = 0
    backwards: int = 0
    zeros: Tensor | int = 0
    calls: int = 0
    classes: int = 0


@dataclasses.dataclass
class AttackResult:
    """An attack's images and what is known of them.

    Attributes:
        x_adv: adversarial images, like x.
        success: bool [B], whether x_adv is misclassified (targeted: classified as the target); None without labels.
        loss: [B], of x_adv.
        pred: int64 [B], predicted class of x_adv; None if the model's outputs are not logits.
        steps_used: int64 [B], steps a sample moved in all restarts.
        forwards, backwards: images that went through the model, there and back.
        zero_gradients: how many of those gradients were exactly zero in every pixel, and so showed no way.
        fooled_in_bf16_only, fooled_in_fp32_only: images that a search in bf16 has kept on which the two disagree.
        trace: of the iterates, for attacks that climb a loss, pgd, mifgsm, apgd and square, and for fab, whose losses
            there are margins.
    """

    x_adv: Tensor
    success: Tensor | None
    loss: Tensor
    pred: Tensor | None
    steps_used: Tensor
    forwards: int
    backwards: int
    zero_gradients: int = 0
    fooled_in_bf16_only: int = 0
    fooled_in_fp32_only: int = 0
    trace: Trace | None = None


class Objective:
    """Evaluates iterates. Losses are summed over the batch, so a sample's gradient does not depend on the batch.

    Args:
        model: callable [B, ...] pixels -> logits [B, C], or anything that a callable loss understands. A module whose
            class sets `fused_head = True` promises that its forward is embed(x) @ head(), with embed(x) [B, D] and
            head() [D, C] scaled: then gradients of named losses start at the embedding (`ops.clip_head_loss`).
        x: the clean batch; with y=None and a named loss, the model's own prediction on it becomes the label.
        y: labels [B] (targets if targeted), or whatever a callable loss takes.
        loss: name in LOSSES, or callable (output, y) -> [B].
        targeted: lower the loss toward y instead of raising it.
        eot: evaluations that a gradient is the mean of (for models that draw random numbers); the loss is their mean,
            too, and an image counts as fooled if most of them say so.
        engine: what runs gradients in place of eager code (`rvlm.attacks.engines`).
        slots: the largest batch that the model is asked about at once; a larger one is cut. None: any.
        static: with slots, all of these batches have that size: rows without work repeat one.

    Attributes:
        target: int64 [B], class that an untargeted attack aims at with a loss of AIMED; set it before the first use.
        count: images so far.
        watched: whether gradients are looked at for zeros, which costs a pass over them.
        trace: where `note` writes, None: nowhere.
    """

    def __init__(
        self,
        model: Callable,
        x: Tensor,
        y: Any,
        loss: str | Callable[[Any, Any], Tensor],
        targeted: bool = False,
        eot: int = 1,
        engine: Compiled | Replayed | None = None,
        slots: int | None = None,
        static: bool = False,
    ) -> None:
        self.slots, self.static = slots, static
        self.model, self.targeted, self.batch, self.eot, self.engine = model, targeted, len(x), eot, engine
        self.count, self.watched, self.target, self.y, self.labels = Count(), False, None, None, None
        self.trace: Trace | None = None
        self._rows = torch.arange(len(x), device=x.device)  # in the whole batch
        self.named = isinstance(loss, str)
        if self.named and loss not in LOSSES and loss not in AIMED:
            known = ", ".join((*LOSSES, *AIMED))
            raise ValueError(f"unknown loss {loss!r}: expected {known} or a callable (output, y) -> [B]")
        self.loss = loss
        self.fused = self.named and _has_fused_head(model)
        if self.fused:
            self.head = model.head().detach()  # the weights are frozen, so once per attack
        if self.named:
            if y is None and targeted:
                raise ValueError("a targeted attack needs target labels y, got None")
            y = self._own_prediction(x) if y is None else check_labels(y, self.batch).to(x.device)
        if isinstance(y, Tensor) and y.is_inference():
            y = y.clone()  # autograd cannot save a tensor that was made in inference mode
        self.y = y
        self.labels = y if isinstance(y, Tensor) and y.dtype == torch.int64 and y.shape == (self.batch,) else None
        self.every_label = self.labels  # also in a part

    def at(self, rows: Tensor) -> "Objective":
        """The same objective for some of the samples; what went through the model is counted together."""
        part = copy.copy(self)
        part.batch, part._rows = len(rows), self._rows[rows]
        for name in ("y", "labels", "target"):
            t = getattr(self, name)
            if isinstance(t, Tensor) and t.dim() and len(t) == self.batch:
                setattr(part, name, t[rows])
        return part

    def note(self, steps: int | list[int], scores: Scores, counts: bool = True) -> None:
        """Notes the scores of an iterate; see `Trace`. counts: whether it may count as fooled."""
        if self.trace is not None:
            self.trace.note(self._rows, steps, scores.loss, scores.fooled if counts else None)

    def score(self, x: Tensor) -> Scores:
        """Scores of x, without a gradient."""
        if self._to_cut(x):
            return self._in_parts(x, lambda part, rows: part.score(x[rows]))
        with torch.no_grad():
            return _mean([self._evaluate(x) for _ in range(self.eot)])

    def gradient(self, x: Tensor, before: Callable[[Tensor], Tensor] | None = None) -> tuple[Scores, Tensor]:
        """Scores of x and the gradient of the summed loss with respect to x, in x's dtype or a narrower one.

        before: differentiable map of the pixels that stands in front of the model.
        """
        if self._to_cut(x):
            return self._in_parts(x, lambda part, rows: part.gradient(x[rows], before))
        scores, grad = self._gradient(x, before)
        if self.eot == 1:
            return scores, grad
        draws = [scores]
        for _ in range(self.eot - 1):
            scores, another = self._gradient(x, before)
            draws.append(scores)
            grad = grad + another
        return _mean(draws), grad / self.eot

    def logits(self, x: Tensor) -> Tensor:
        """Logits [B, C] of x, without a gradient, in float32 or float64."""
        if self._to_cut(x):
            return self._in_parts(x, lambda part, rows: part.logits(x[rows]))
        with torch.no_grad(), profiling.phase("forward", len(x)):
            output = self.model(x)
        self.count.forwards += len(x)
        return self._as_logits(output, len(x))

    def runners_up(self, x: Tensor, most: int | None, at_most: int = MOST_TARGETS) -> Tensor:
        """The likeliest classes on x that are not the label, likeliest first: int64 [B, most].

        most: None means at_most, or all if there are fewer.
        """
        logits = self.logits(x)
        classes = logits.shape[1]
        most = most_targets(most, classes, at_most)
        if most >= classes:
            raise ValueError(f"targets={most} needs more than {most} classes, the model has {classes}")
        order = logits.scatter(1, self.labels[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)
        return order[:, :most]

    def differences(self, x: Tensor, classes: Tensor | None) -> tuple[Tensor, list[Tensor], Tensor]:
        """z_c - z_y [B, K] at x for classes [B, K] (None: all), the gradient of each column (a list of K tensors like
        x), and the logits [B, C].
        """
        if self._to_cut(x):
            return self._in_parts(
                x, lambda part, rows: part.differences(x[rows], classes if classes is None else classes[rows])
            )
        leaf = x.detach().requires_grad_()
        with profiling.phase("forward", len(x)):
            output = self._ask(leaf)
        self.count.forwards += len(x)
        z = self._as_logits(output, len(x))
        if not z.requires_grad:
            raise ValueError(NO_GRADIENT)
        if classes is None:
            classes = torch.arange(z.shape[1], device=z.device).expand(len(x), -1)
        gaps = z.gather(1, classes) - z.gather(1, self.labels[:, None])
        with profiling.phase("backward", len(x) * gaps.shape[1]):
            last = gaps.shape[1] - 1
            grads = [
                torch.autograd.grad(gaps[:, k].sum(), leaf, retain_graph=k < last)[0].to(x.dtype)
                for k in range(gaps.shape[1])
            ]
        self.count.backwards += len(grads) * len(x)
        return gaps.detach().to(x.dtype), grads, z.detach()

    def _as_logits(self, output: Any, images: int) -> Tensor:
        """A model's output, which must be logits [B, C], in float32 or float64."""
        if not isinstance(output, Tensor) or output.dim() != 2 or not output.is_floating_point():
            got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"the model must return logits [{images}, C], got {got}")
        logits = wide(output)
        if not self.count.classes and self.labels is not None:
            self._check_range(logits.shape[1])
            self._first_look(logits.detach())
        return logits

    def _to_cut(self, x: Tensor) -> bool:
        return self.slots is not None and (len(x) > self.slots or (self.static and 0 < len(x) < self.slots))

    def _in_parts(self, x: Tensor, ask: Callable[["Objective", Tensor], Any]) -> Any:
        """ask(objective, rows) for parts of x that fit, joined."""
        found, classes = [], self.count.classes
        for rows in torch.arange(len(x), device=x.device).split(self.slots):
            self.count.classes = classes  # if nobody has looked before, the first look is at every part
            n = len(rows)
            if self.static:
                rows = torch.cat([rows, rows[:1].expand(self.slots - n)])
            part = self.at(rows)
            part.slots = None
            found.append((n, ask(part, rows)))
        return _joined(found)

    def _gradient(self, x: Tensor, before: Callable[[Tensor], Tensor] | None) -> tuple[Scores, Tensor]:
        found = None if before is not None else self._by_engine(x)
        scores, grad = self._by_autograd(x, before) if found is None else found
        self.count.backwards += len(x)
        if self.watched:
            self.count.zeros = self.count.zeros + (grad == 0).flatten(1).all(1).sum()
        return scores, grad

    def _by_engine(self, x: Tensor) -> tuple[Scores, Tensor] | None:
        """None where eager code is to be asked: nothing is known of the model yet, or the engine is not for it."""
        if self.engine is None or not self.named:
            return None
        classes = self.engine.classes
        if classes is None:
            return None
        if not self.count.classes:
            self._check_range(classes)
        target = self.target if self.loss in AIMED else None
        with profiling.phase("model", len(x)):
            found = self.engine.gradient(
                Question(self.model, self.loss, self.labels, target, self.head if self.fused else None), x
            )
        if found is None:
            return None
        self.count.forwards += len(x)
        if not self.count.classes:
            self._first_look(found.logits)
        return self._scores(found.loss, found.logits), found.grad

    def _by_autograd(self, x: Tensor, before: Callable[[Tensor], Tensor] | None) -> tuple[Scores, Tensor]:
        leaf = x.detach().requires_grad_()
        pixels = leaf if before is None else before(leaf)
        if self.fused:
            scores, output, of_output = self._evaluate_head(pixels)
        else:
            scores = self._evaluate(pixels)
            output, of_output = scores.loss, torch.ones_like(scores.loss)
        if not output.requires_grad:
            raise ValueError(NO_GRADIENT)
        with profiling.phase("backward", len(x)):
            (grad,) = torch.autograd.grad(output, leaf, of_output, allow_unused=True)
        if grad is None:
            raise ValueError(
                "the gradient does not reach the images: the model computes its output from a detached copy of them."
            )
        return Scores(scores.loss.detach(), scores.fooled, scores.pred), grad

    def _ask(self, x: Tensor, what: str = "model") -> Tensor:
        """The model's output or, what="embed", its embedding; compiled if this is a loop, not a first or last look."""
        self.count.calls += 1
        if isinstance(self.engine, Compiled) and self.count.calls > 2:
            return getattr(self.engine, what)(x)
        return (self.model if what == "model" else self.model.embed)(x)

    def better(self, new: Tensor, old: Tensor) -> Tensor:
        """Where a loss is better for the attacker; a NaN never is, and gives way to any number."""
        return (new < old if self.targeted else new > old) | (old.isnan() & ~new.isnan())

    def _evaluate(self, x: Tensor) -> Scores:
        with profiling.phase("forward", len(x)):
            output = self._ask(x)
            self.count.forwards += len(x)
            logits = output if isinstance(output, Tensor) and output.is_floating_point() else None
            if self.named and (logits is None or logits.dim() != 2 or len(logits) != self.batch):
                got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise ValueError(
                    f"the model must return logits [{self.batch}, C], got {got}. For other outputs pass "
                    "loss=callable(output, y) -> [B]."
                )
            is_logits = logits is not None and logits.dim() == 2 and len(logits) == self.batch
            if is_logits:
                output = logits = wide(logits)
                if not self.count.classes:
                    self._check_range(logits.shape[1])
                    self._first_look(logits.detach())
            if self.named:
                loss = loss_at_logits(self.loss, logits, self.labels, self.target, fused=self.fused)
            else:
                loss = self.loss(output, self.y)
            if not isinstance(loss, Tensor) or loss.shape != (self.batch,):
                got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(
                    f"the loss must be a tensor [{self.batch}], one value per sample, got {got} (reduction='none')"
                )
            return self._scores(loss, logits.detach()) if is_logits else Scores(loss, None, None)

    def _evaluate_head(self, x: Tensor) -> tuple[Scores, Tensor, Tensor]:
        """Scores, embeddings and the gradient with respect to them; nothing behind the embedding is in a graph."""
        with profiling.phase("forward", len(x)):
            embedding = self._ask(x, "embed")
            self.count.forwards += len(x)
            if not self.count.classes:
                self._check_range(self.head.shape[1])
            loss, logits, of_embedding = loss_at_head(self.loss, embedding, self.head, self.labels, self.target)
            if not self.count.classes:
                self._first_look(logits)
            return self._scores(loss, logits), embedding, of_embedding

    def _scores(self, loss: Tensor, logits: Tensor) -> Scores:
        """Of a loss [B], by the predictions of logits [B, C]."""
        pred = logits.argmax(1)
        if self.labels is None:
            return Scores(loss, None, pred)
        return Scores(loss, pred == self.labels if self.targeted else pred != self.labels, pred)

    def _own_prediction(self, x: Tensor) -> Tensor:
        try:
            return self.logits(x).argmax(1)
        except ValueError as error:
            raise ValueError(f"y=None takes the model's own prediction, but {error}; pass y") from None

    def _check_range(self, classes: int) -> None:
        """Labels must be classes; once per attack, since asking waits for the device."""
        if self.labels is not None and self.named:
            low, high = (v.item() for v in torch.aminmax(self.every_label))
            if low < 0 or high >= classes:
                raise ValueError(f"labels must lie in 0 .. {classes - 1}, the model's classes, got {low} .. {high}")

    def _first_look(self, logits: Tensor) -> None:
        """Warnings about the model's output, once per attack."""
        self.count.classes = logits.shape[1]
        if self.engine is not None:
            self.engine.classes = logits.shape[1]
        broken = (logits.isnan() | (logits == torch.inf)).any(1)  # -inf is a masked class, and fine
        if broken.any():
            bad = broken.sum().item()
            warnings.warn(
                f"the model returns NaN or infinite logits for {bad} of {self.batch} images; they cannot be attacked "
                "and their verdict means nothing",
                AttackWarning,
                stacklevel=2,
            )
        elif are_probabilities(logits):
            warnings.warn(
                "the model seems to return probabilities (every row is non-negative and sums to 1). Attacks need "
                "logits: a softmax inside saturates and hides the gradient. Remove it, or ignore this if it is meant.",
                AttackWarning,
                stacklevel=2,
            )


def most_targets(most: int | None, classes: int, at_most: int = MOST_TARGETS) -> int:
    """How many wrong classes are aimed at; None means at_most, or all if there are fewer."""
    return min(at_most, classes - 1) if most is None else most


NO_GRADIENT = (
    "the loss does not depend on the images: the model's output carries no gradient. Remove detach(), no_grad(), "
    ".data, numpy or argmax from the model's forward pass."
)


def _joined(parts: list[tuple[int, Any]]) -> Any:
    """Answers to parts of a batch as one, of each part its first n rows."""
    answers = [answer for _, answer in parts]
    if answers[0] is None:
        return None
    if isinstance(answers[0], Tensor):
        return torch.cat([answer[:n] for n, answer in parts])
    if isinstance(answers[0], Scores):
        return Scores(*_joined([(n, (a.loss, a.fooled, a.pred)) for n, a in parts]))
    return type(answers[0])(_joined([(n, a[i]) for n, a in parts]) for i in range(len(answers[0])))


def _mean(draws: list[Scores]) -> Scores:
    """Mean loss, the vote of the majority and the most frequent prediction."""
    if len(draws) == 1:
        return draws[0]
    loss = torch.stack([scores.loss for scores in draws]).mean(0)
    fooled = pred = None
    if draws[0].fooled is not None:
        fooled = 2 * sum(scores.fooled.int() for scores in draws) > len(draws)
    if draws[0].pred is not None:
        pred = torch.stack([scores.pred for scores in draws]).mode(0).values
    return Scores(loss, fooled, pred)


def _has_fused_head(model: Callable) -> bool:
    """Whether the class that defines forward promises, by `fused_head = True`, that it is embed(x) @ head().

    A constant added to a row is allowed, since every named loss is blind to it. A subclass with a forward of its own
    promises anew or not at all; hooks and patches on the forward pass would be stepped over, so they rule it out.
    """
    if not isinstance(model, nn.Module) or "forward" in vars(model) or model._forward_hooks or model._forward_pre_hooks:
        return False
    owner = next(cls for cls in type(model).__mro__ if "forward" in vars(cls))
    return vars(owner).get("fused_head") is True
