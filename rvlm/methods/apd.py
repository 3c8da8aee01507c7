"""APD: adversarial prompt distillation (arXiv 2411.15244); every weight of CLIP is frozen.

Student S and teacher T are one CLIP with two sets of prompts in both towers. The student, which is what is kept, sees
adversarial images, the teacher clean ones:

    x_a = argmax_{|x_a - x|_inf <= eps} L_in(z_S(x_a))                       PGD through the student
    L_S = KL(p_T(x) || p_S(x_a))                                             p_T fixed; no labels, no clean images
    L_T = CE(z_T(x), y) + beta KL(p_S(x_a) || p_T(x))                        p_S fixed: the student's feedback

Both are minimised at once. `teacher` names the ablations: `online` is the method, and with beta 0 it is without
feedback; `zero_shot` is the model with templates by hand; `fine_tuned` has prompts that are first tuned on clean images
by cross-entropy, in a stage of its own, and then stay; anything else is a frozen model, robust or not. Prompts are in
both towers, or in one of them (visual_tokens=0 or text_tokens=0), in teacher and student alike.

Not published, and so knobs: L_in (`inner_loss`: ce; kl_teacher, KL(p_T(x) || p_S(x_a)); kl_self, KL(p_S(x) ||
p_S(x_a))), the directions of both divergences, whether beta is added or is a share (`beta_mode` convex: the
cross-entropy gets 1 - beta), its value, the number and depth of prompts, and the optimiser. Divergences are means over
the batch and never over classes: that would shrink them by the number of classes, and beta would mean something else
for each data set.

Presets. `code`: 50 epochs of 16 shots as published, with the settings that the labs' released configurations of its
kind share, the warm-up per step. `rvlm`: ours, on the digits.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rvlm import ops
from rvlm.attacks import scoring
from rvlm.data import Data
from rvlm.methods.base import Batch, Stage, judged, mixed, register, warmup_cosine
from rvlm.methods.prompt_tuning import BOTH
from rvlm.methods.prompts import LAB, PromptConfig, PromptMethod
from rvlm.methods.teachers import classifier, twin
from rvlm.models import Clip

__all__ = ["APD"]

PULLED = 0.05  # clean accuracy that a teacher may lose to the model without prompts before beta is called too high
WRONG = 0.5  # share of images on which feedback contradicts a teacher who is right, before it is called unreliable
COLLAPSED = 0.05  # how far the prompts of one tower moved, over how far the other's did, before one is called unused


@dataclasses.dataclass(kw_only=True)
class APDConfig(PromptConfig):
    teacher: Any = "online"
    """online, zero_shot, fine_tuned, or a frozen model as --model elsewhere; from Python also a Clip or a callable to
    logits."""
    teacher_epochs: int | None = None
    """Epochs in which teacher fine_tuned is tuned; as many as the student's if None."""
    same_start: bool = True
    """Teacher and student begin with the same prompts."""
    beta: float | None = None
    """Of the student's feedback to an online teacher; None is 1 if it is added, 0.5 as a share."""
    beta_mode: str = "add"
    """add, CE + beta KL, or convex, (1 - beta) CE + beta KL."""
    student_kl: str = "teacher_first"
    """teacher_first KL(T || S), or student_first KL(S || T)."""
    feedback_kl: str = "student_first"
    """student_first KL(S || T), or teacher_first KL(T || S)."""
    detach: str = "both"
    """both: each loss moves its own prompts alone; none: the sum of both losses moves all."""
    inner_loss: str = "ce"
    """ce, kl_teacher or kl_self."""
    temperature: float = 1.0
    """Divides all logits in the divergences, which are multiplied by its square."""
    ce_weight: float = 0.0
    """Of the student's cross-entropy on adversarial images."""
    clean_weight: float = 0.0
    """Of the student's cross-entropy on clean images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_of(
            beta_mode=("add", "convex"),
            student_kl=("teacher_first", "student_first"),
            feedback_kl=("teacher_first", "student_first"),
            detach=("both", "none"),
            inner_loss=("ce", "kl_teacher", "kl_self"),
        )
        if self.inner_loss == "kl_self":
            self.from_noise("inner_loss kl_self")
        if self.beta is None:
            self.beta = 0.5 if self.beta_mode == "convex" else 1.0
        self.at_least(0, "beta", "ce_weight", "clean_weight")
        if self.beta_mode == "convex" and self.beta > 1:
            raise ValueError(f"beta_mode convex needs a beta of at most 1, got {self.beta}")
        self.positive("temperature")
        self.at_least(1, "teacher_epochs")


@register
class APD(PromptMethod):
    """See the module. After setup:

    Attributes:
        partner: teacher online or fine_tuned: the same weights with the teacher's prompts.
        teacher: a frozen teacher; None for an online one, and until it is tuned.
    """

    name = "apd"
    Config = APDConfig
    presets = {"code": LAB, "rvlm": BOTH}

    def __init__(self, config: APDConfig) -> None:
        super().__init__(config)
        self.online, self.tuning = config.teacher == "online", False
        self._see()

    def _see(self) -> None:
        self.inputs = "clean" if self.tuning else "both" if self.config.clean_weight else "adv"

    def setup(self, student: Clip, data: Data) -> None:
        super().setup(student, data)
        config, self.data, self.partner, self.teacher = self.config, data, None, None
        given = {
            "student": student, "data": data, "templates": self.training_templates(data),
            "precision": self.teacher_precision(student),
        }  # fmt: skip
        if config.teacher in ("online", "fine_tuned"):
            self.partner = twin(self.undefended)
            self.prompt(self.partner)
            if config.same_start:
                self.partner.adapter.load_state_dict(student.adapter.state_dict())
        if self.online:
            student.teacher = self.partner.adapter  # so that what reduces, saves and restores the student sees it
            plain = classifier(self.undefended, **given)
            plain.remember(data, student.device)
            y = data.y.to(student.device)
            self.without_prompts = (plain.rows.argmax(1) == y).float().mean().item()
        elif config.teacher != "fine_tuned":
            zero_shot = config.teacher == "zero_shot"
            self.teacher = classifier(self.undefended if zero_shot else config.teacher, **given)
            self.teacher.remember(data, student.device)
        else:
            self.partner.requires_grad_(False)
        self.began = {name: rows.detach().clone() for name, rows in _rows(student).items()}

    def learning(self) -> list[dict[str, Any]]:
        teacher = [p for p in self.partner.adapter.parameters() if p.requires_grad] if self.online else []
        theirs = {id(p) for p in teacher}
        student = [p for p in self.student.parameters() if p.requires_grad and id(p) not in theirs]
        return [{"params": student}, *([{"params": teacher}] if teacher else [])]

    def stages(self) -> list[Stage]:
        config, schedule = self.config, warmup_cosine(self.config.warmup_steps)
        student = Stage(config.epochs, self.learning(), schedule, on_epoch_start=self._begin_student)
        if config.teacher != "fine_tuned":
            return [student]
        epochs = config.epochs if config.teacher_epochs is None else config.teacher_epochs
        teacher = Stage(epochs, self.learning(), schedule, "teacher", on_epoch_start=self._begin_teacher, defends=False)
        return [teacher, student]

    def _begin_teacher(self, epoch: int) -> None:
        """Stage 1 tunes the student's prompts on clean images; then they are the teacher's."""
        self.tuning = True
        self._see()

    def _begin_student(self, epoch: int) -> None:
        if not self.tuning:
            return
        tuned, start = self.student.adapter.state_dict(), self.partner.adapter.state_dict()
        start = {name: t.clone() for name, t in start.items()}
        self.partner.adapter.load_state_dict(tuned)
        self.student.adapter.load_state_dict(start)
        self.tuning = False
        self._see()
        self._freeze_partner()

    def _freeze_partner(self) -> None:
        precision, templates = self.teacher_precision(self.student), self.training_templates(self.data)
        self.teacher = classifier(self.partner, self.student, self.data, templates, precision=precision)
        self.teacher.remember(self.data, self.student.device)

    def state(self) -> dict[str, Any]:
        if self.config.teacher != "fine_tuned":
            return {}
        return {"tuning": self.tuning, "partner": self.partner.adapter.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        if not state:
            return
        self.partner.adapter.load_state_dict(state["partner"])
        self.tuning = state["tuning"]
        self._see()
        if not self.tuning:
            self._freeze_partner()

    def attack(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        head, self.said = self.encode_text().detach(), None
        if self.config.inner_loss == "ce":
            return lambda embedding: ops.attack_loss(embedding @ head, batch.y)[0]
        if self.config.inner_loss == "kl_teacher":
            self.said = self._taught(batch)
            target = self.said.detach()
        else:
            with scoring(self.student), mixed(self.student, self.config.precision):
                clean = self.student.encode_pixels(batch.x)
            target = clean.float() @ head
        return lambda embedding: ops.multi_teacher_kl(embedding @ head, target[None].to(embedding), [1.0])[0]

    def _taught(self, batch: Batch) -> Tensor:
        """The teacher's logits for clean images, with a graph if it learns."""
        if self.teacher is not None:
            return self.teacher.on_clean(batch)
        with mixed(self.student, self.config.precision):
            embedding = self.partner.encode_pixels(batch.x).float()
        return embedding @ (self.head if self.texts is None else self.class_head(self.partner.adapter.context))

    def loss(self, out_adv: Tensor | None, out_clean: Tensor | None, batch: Batch) -> dict[str, Tensor]:
        config = self.config
        if self.tuning:
            loss, correct, _ = ops.attack_loss(out_clean @ self.encode_text(), batch.y)
            return {"total": batch.mean(loss), "clean_acc": correct.float().mean()}
        student = out_adv @ self.head
        teacher = (self._taught(batch) if self.said is None else self.said).to(student)
        distilled = self._kl(student, teacher, config.student_kl == "teacher_first")
        total, shown = distilled, {"distilled": distilled.mean()}
        ce, robust, _ = ops.attack_loss(student, batch.y)
        if config.ce_weight:
            total = total + config.ce_weight * ce
        if config.clean_weight:
            clean, correct, _ = ops.attack_loss(out_clean @ self.head, batch.y)
            total = total + config.clean_weight * clean
            shown["clean_acc"] = correct.float().mean()
        if self.online:
            supervised, right, _ = ops.attack_loss(teacher, batch.y)
            share = 1 - config.beta if config.beta_mode == "convex" else 1.0
            total = total + share * supervised
            if config.beta:
                feedback = self._kl(teacher, student, config.feedback_kl == "student_first")
                total = total + config.beta * feedback
                shown["feedback"] = feedback.mean()
                shown["contradicted"] = (right & ~robust).float().mean()
            shown["teacher_acc"] = right.float().mean()
        return {"total": batch.mean(total), **shown, "robust_acc": robust.float().mean(), **self._moved()}

    def _kl(self, learner: Tensor, other: Tensor, other_first: bool) -> Tensor:
        """Divergence [B] that moves the learner: KL(other || learner), or the reverse."""
        tau, kind = self.config.temperature, "forward" if other_first else "reverse"
        both = self.config.detach == "none" and other.requires_grad
        return tau**2 * ops.multi_teacher_kl(learner, other[None], [1.0], tau, kind, teacher_grad=both)[0]

    def _moved(self) -> dict[str, Tensor]:
        """How far each tower's prompts are from where they began (root mean square)."""
        with torch.no_grad():
            return {
                f"{name}_moved": (rows - self.began[name]).square().mean().sqrt()
                for name, rows in _rows(self.student).items()
            }

    def checks(self, data: Data, history: list[dict[str, float]]) -> list[dict[str, Any]]:
        """A teacher that its student pulls down, feedback that misleads it, and prompts of which one tower's alone
        learn, at the end of every stage."""
        lines = []
        for row in {row["stage"]: row for row in history}.values():
            if self.online and self.config.beta and "teacher_acc" in row:
                teacher, before = row["teacher_acc"], self.without_prompts
                said = (
                    f"the teacher is right on {teacher:.1%} of clean images, the model without prompts on {before:.1%}"
                )
                remedy = f"beta={self.config.beta} may be too high"
                lines.append(("teacher_kept", teacher >= before - PULLED, said, remedy))
            if "contradicted" in row:
                share = row["contradicted"]
                said = f"on {share:.1%} of the images the student's feedback contradicts a teacher who is right"
                remedy = "it is not reliable, lower beta or eps, or take a frozen teacher"
                lines.append(("feedback_reliable", share <= WRONG, said, remedy))
            moved = {name: row[f"{name}_moved"] for name in ("prompts", "context") if f"{name}_moved" in row}
            if len(moved) == 2:
                least, most = sorted(moved, key=moved.get)
                said = f"the {least} moved by {moved[least]:.2g}, the {most} by {moved[most]:.2g}"
                remedy = "training has collapsed to one tower, whose prompts alone would do"
                lines.append(("both_towers_learn", moved[least] >= COLLAPSED * moved[most], said, remedy))
        return [judged(*line) for line in lines]

    def finish(self) -> None:
        super().finish()
        if self.online and hasattr(self.student, "teacher"):
            del self.student.teacher
            detached = self.partner.requires_grad_(False)
            self.uncouple(detached.adapter)
            self.others = {"teacher": detached}


def _rows(clip: Clip) -> dict[str, Tensor]:
    rows = {name: getattr(clip.adapter, name) for name in ("prompts", "context")}
    return {name: t for name, t in rows.items() if t is not None}
