"""What an attack optimises: a model, a loss and labels, evaluated together and counted."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rvlm import ops, profiling
from rvlm.attacks.checks import AttackWarning, are_probabilities, check_labels
from rvlm.attacks.losses import LOSSES

__all__ = ["AttackResult", "Objective", "Scores"]


@dataclasses.dataclass
class Scores:
    """One evaluation of a batch: loss [B] and, where outputs are logits and y are labels, fooled [B] and pred [B]."""

    loss: Tensor
    fooled: Tensor | None
    pred: Tensor | None


@dataclasses.dataclass
class AttackResult:
    """An attack's images and what is known of them.

    Attributes:
        x_adv: adversarial images, like x.
        success: bool [B], whether x_adv is misclassified (targeted: classified as the target); None without labels.
        loss: [B], of x_adv.
        pred: int64 [B], predicted class of x_adv; None if the model's outputs are not logits.
        steps_used: int64 [B], steps a sample moved in all restarts.
        forwards, backwards: passes through the model, each over the whole batch.
    """

    x_adv: Tensor
    success: Tensor | None
    loss: Tensor
    pred: Tensor | None
    steps_used: Tensor
    forwards: int
    backwards: int


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
    """

    def __init__(
        self, model: Callable, x: Tensor, y: Any, loss: str | Callable[[Any, Any], Tensor], targeted: bool
    ) -> None:
        self.model, self.targeted, self.batch = model, targeted, len(x)
        self.forwards = self.backwards = 0
        self._seen_output = False
        self.named = isinstance(loss, str)
        if self.named and loss not in LOSSES:
            raise ValueError(f"unknown loss {loss!r}: expected {', '.join(LOSSES)} or a callable (output, y) -> [B]")
        self.loss = LOSSES[loss] if self.named else loss
        self.name = loss if self.named else None
        self.fused = self.named and _has_fused_head(model)
        if self.fused:
            self.head = model.head().detach()  # the weights are frozen, so once per attack
            # Scores without a gradient must come from the same formula.
            self.loss = lambda logits, labels: ops.attack_loss(logits, labels, loss)[0]
        if self.named:
            if y is None and targeted:
                raise ValueError("a targeted attack needs target labels y, got None")
            y = self._own_prediction(x) if y is None else check_labels(y, self.batch).to(x.device)
        if isinstance(y, Tensor) and y.is_inference():
            y = y.clone()  # autograd cannot save a tensor that was made in inference mode
        self.y = y
        self.labels = y if isinstance(y, Tensor) and y.dtype == torch.int64 and y.shape == (self.batch,) else None

    def score(self, x: Tensor) -> Scores:
        """Scores of x, without a gradient."""
        with torch.no_grad():
            return self._evaluate(x)

    def gradient(self, x: Tensor) -> tuple[Scores, Tensor]:
        """Scores of x and the gradient of the summed loss with respect to x, in x's dtype or a narrower one."""
        leaf = x.detach().requires_grad_()
        if self.fused:
            scores, output, of_output = self._evaluate_head(leaf)
        else:
            scores = self._evaluate(leaf)
            output, of_output = scores.loss, torch.ones_like(scores.loss)
        if not output.requires_grad:
            raise ValueError(
                "the loss does not depend on the images: the model's output carries no gradient. Remove detach(), "
                "no_grad(), .data, numpy or argmax from the model's forward pass."
            )
        with profiling.phase("backward"):
            (grad,) = torch.autograd.grad(output, leaf, of_output, allow_unused=True)
        if grad is None:
            raise ValueError(
                "the gradient does not reach the images: the model computes its output from a detached copy of them."
            )
        self.backwards += 1
        return Scores(scores.loss.detach(), scores.fooled, scores.pred), grad

    def better(self, new: Tensor, old: Tensor) -> Tensor:
        """Where a loss is better for the attacker; a NaN never is, and gives way to any number."""
        return (new < old if self.targeted else new > old) | (old.isnan() & ~new.isnan())

    def _evaluate(self, x: Tensor) -> Scores:
        with profiling.phase("forward"):
            output = self.model(x)
            self.forwards += 1
            logits = output if isinstance(output, Tensor) and output.is_floating_point() else None
            if self.named and (logits is None or logits.dim() != 2 or len(logits) != self.batch):
                got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise ValueError(
                    f"the model must return logits [{self.batch}, C], got {got}. For other outputs pass "
                    "loss=callable(output, y) -> [B]."
                )
            is_logits = logits is not None and logits.dim() == 2 and len(logits) == self.batch
            if is_logits:
                logits = logits if logits.dtype == torch.float64 else logits.float()
                output = logits
                if not self._seen_output:
                    self._check_range(logits.shape[1])
                    self._first_look(logits.detach())
            loss = self.loss(output, self.y)
            if not isinstance(loss, Tensor) or loss.shape != (self.batch,):
                got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(
                    f"the loss must be a tensor [{self.batch}], one value per sample, got {got} (reduction='none')"
                )
            pred = logits.detach().argmax(1) if is_logits else None
            fooled = None
            if pred is not None and self.labels is not None:
                fooled = pred == self.labels if self.targeted else pred != self.labels
            return Scores(loss, fooled, pred)

    def _evaluate_head(self, x: Tensor) -> tuple[Scores, Tensor, Tensor]:
        """Scores, embeddings and the gradient with respect to them; nothing behind the embedding is in a graph."""
        with profiling.phase("forward"):
            embedding = self.model.embed(x)
            self.forwards += 1
            if not self._seen_output:
                self._check_range(self.head.shape[1])
            loss, correct, logits, of_embedding = ops.clip_head_loss(embedding, self.head, self.labels, self.name)
            if not self._seen_output:
                self._first_look(logits)
            fooled = correct if self.targeted else ~correct
            return Scores(loss, fooled, logits.argmax(1)), embedding, of_embedding

    def _own_prediction(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            output = self.model(x)
        self.forwards += 1
        if not isinstance(output, Tensor) or output.dim() != 2:
            raise ValueError("y=None takes the model's own prediction, which needs logits [B, C]; pass y")
        return output.argmax(1)

    def _check_range(self, classes: int) -> None:
        """Labels must be classes; once per attack, since asking waits for the device."""
        if self.labels is not None and self.named:
            low, high = (v.item() for v in torch.aminmax(self.labels))
            if low < 0 or high >= classes:
                raise ValueError(f"labels must lie in 0 .. {classes - 1}, the model's classes, got {low} .. {high}")

    def _first_look(self, logits: Tensor) -> None:
        """Warnings about the model's output, once per attack."""
        self._seen_output = True
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


def _has_fused_head(model: Callable) -> bool:
    """Whether the class that defines forward promises, by `fused_head = True`, that it is embed(x) @ head().

    A constant added to a row is allowed, since every named loss is blind to it. A subclass with a forward of its own
    promises anew or not at all; hooks and patches on the forward pass would be stepped over, so they rule it out.
    """
    if not isinstance(model, nn.Module) or "forward" in vars(model) or model._forward_hooks or model._forward_pre_hooks:
        return False
    owner = next(cls for cls in type(model).__mro__ if "forward" in vars(cls))
    return vars(owner).get("fused_head") is True
