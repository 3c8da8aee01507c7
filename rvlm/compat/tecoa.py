"""TeCoA's attacks (ZSRobust4FoundationModel, PMG-AFT) on rvlm's engine: `from rvlm.compat.tecoa import attack_pgd`.

Same arguments, draws and result: the perturbation, not the image. Text embeddings are computed once per attack, where
the model lets its images be encoded alone; there once per step. Runs on X's device, in the model's own mode and under
the caller's autocast. The result is detached, and no gradients are left in the parameters.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rvlm.attacks.checks import AttackWarning
from rvlm.attacks.contract import untouched
from rvlm.attacks.pgd import pgd
from rvlm.compat.common import l2_start, linf_start, per_sample_loss

__all__ = ["attack_CW", "attack_pgd", "clip_img_preprocessing"]

MEAN, STD, SIDE = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), 224
CONFIDENCE = 50.0  # of attack_CW, in logits


def attack_pgd(
    prompter: Callable[[Tensor], Tensor] | None,
    model: nn.Module,
    add_prompter: Callable[[], Tensor | None] | None,
    criterion: Callable[[Tensor, Tensor], Tensor],
    X: Tensor,
    target: Tensor,
    text_tokens: Tensor,
    alpha: float,
    attack_iters: int,
    norm: str,
    restarts: int = 1,
    early_stop: bool = True,
    epsilon: float = 0,
) -> Tensor:
    """PGD on a CLIP.

    Args:
        prompter: map of the preprocessed images, or None.
        model: called as model(images, text_tokens, prompt) -> unit image embeddings [B, D], scaled text ones [C, D].
        add_prompter: returns a prompt [1, P, D], or None.
        criterion: loss (logits, target), made large; one number or [B].
        X: images [B, 3, H, W] in [0, 1]; they are resized to 224 pixels for the model.
        alpha, epsilon: step size and radius in pixel units.
        norm: "l_inf" or "l_2".
        restarts, early_stop: change nothing, as there; restarts > 1 warns.

    Returns:
        The perturbation, like X.
    """
    return _attacked(prompter, model, add_prompter, per_sample_loss(criterion, target), X, target, text_tokens, alpha,
                     attack_iters, norm, restarts, epsilon)  # fmt: skip


def attack_CW(
    prompter: Callable[[Tensor], Tensor] | None,
    model: nn.Module,
    add_prompter: Callable[[], Tensor | None] | None,
    criterion: Callable[[Tensor, Tensor], Tensor],
    X: Tensor,
    target: Tensor,
    text_tokens: Tensor,
    alpha: float,
    attack_iters: int,
    norm: str,
    restarts: int = 1,
    early_stop: bool = True,
    epsilon: float = 0,
) -> Tensor:
    """`attack_pgd` on -max(0, z_y - max_{c != y} z_c + 50); criterion is not used."""
    return _attacked(prompter, model, add_prompter, _cw_loss, X, target, text_tokens, alpha, attack_iters, norm,
                     restarts, epsilon)  # fmt: skip


def clip_img_preprocessing(X: Tensor) -> Tensor:
    """Images in [0, 1] as CLIP takes them: 224 pixels (bicubic), normalised."""
    mean, std = (torch.tensor(t, dtype=X.dtype, device=X.device).view(3, 1, 1) for t in (MEAN, STD))
    return (F.interpolate(X, size=(SIDE, SIDE), mode="bicubic") - mean) / std


def _cw_loss(logits: Tensor, y: Tensor) -> Tensor:
    own = logits.gather(1, y[:, None]).squeeze(1)
    other = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    return -F.relu(own - other + CONFIDENCE)


def _attacked(prompter, model, add_prompter, loss, X, target, text_tokens, alpha, steps, norm, restarts, eps) -> Tensor:
    starts = {"l_inf": (linf_start, "linf"), "l_2": (l2_start, "l2")}
    if norm not in starts:
        raise ValueError(f"norm must be 'l_inf' or 'l_2', got {norm!r}")
    if restarts > 1:
        warnings.warn(f"restarts={restarts} has no effect, here as in TeCoA's code", AttackWarning, stacklevel=3)
    X = X.detach()
    start, ours = starts[norm]
    x_adv = pgd(
        _Prompted(prompter, model, add_prompter, text_tokens, X), X, target, eps=eps, alpha=alpha, steps=steps,
        norm=ours, loss=loss, x_init=start(X, eps), random_start=False, model_mode="keep",
    )  # fmt: skip
    return x_adv - X


class _Prompted(nn.Module):
    """Pixels to logits, with the text embedded beforehand if images can be encoded alone on one device."""

    def __init__(self, prompter, model: nn.Module, add_prompter, text_tokens: Tensor, x: Tensor) -> None:
        super().__init__()
        self.prompter, self.model, self.add_prompter, self.text_tokens = prompter, model, add_prompter, text_tokens
        parallel = isinstance(model, nn.DataParallel)
        self.inner = model.module if parallel else model
        self.text: Tensor | None = None
        if hasattr(self.inner, "encode_image") and not (parallel and len(model.device_ids) > 1):
            with untouched(model, "keep"), torch.no_grad():
                self.text = self._both(self._prepared(x[:1]))[1]

    def forward(self, x: Tensor) -> Tensor:
        images = self._prepared(x)
        if self.text is None:
            embedding, text = self._both(images)
        else:
            embedding, text = self.inner.encode_image(images, self._prompt(images)), self.text
            embedding = embedding / embedding.norm(dim=1, keepdim=True)
        return embedding @ text.t()

    def _prepared(self, x: Tensor) -> Tensor:
        images = clip_img_preprocessing(x)
        return images if self.prompter is None else self.prompter(images)

    def _prompt(self, images: Tensor) -> Tensor | None:
        prompt = None if self.add_prompter is None else self.add_prompter()
        return None if prompt is None else prompt.repeat(len(images), 1, 1)

    def _both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(images, self.text_tokens, self._prompt(images))
