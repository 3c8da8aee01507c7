"""torchattacks' attacks that look for short perturbations."""

from torch import Tensor

from rvlm.attacks.cw import cw
from rvlm.attacks.deepfool import deepfool
from rvlm.compat.torchattacks.attack import Attack, Model, settings

__all__ = ["CW", "DeepFool"]


@settings
class CW(Attack):
    """`cw` in L2, one round with weight c.

    Other than theirs: the batch does not stop as a whole when its summed objective rises (no sample depends on the
    others), a pixel at 0 or 1 can move, the largest other logit is looked for among the others (theirs counts a 0 in
    place of the label's, which hides that all others are negative), and an image counts from a margin of kappa on.
    """

    model: Model
    c: float = 1
    kappa: float = 0
    steps: int = 50
    lr: float = 0.01

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        return cw(
            model, images, labels, steps=self.steps, rounds=1, const=self.c, lr=self.lr, confidence=self.kappa,
            abort_early=False, targeted=self.targeted, model_mode="keep",
        )  # fmt: skip


@settings
class DeepFool(Attack):
    """`deepfool` in L2 over all classes: the paper's, which overshoots once; theirs at every step, from another sum."""

    supported_mode = ("default",)
    model: Model
    steps: int = 50
    overshoot: float = 0.02

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        return self._found(model, images, labels).x_adv

    def forward_return_target_labels(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Adversarial images of pixels in [0, 1], and the classes that they are taken for."""
        with self._mode():
            found = self._found(self._on_pixels(), images.detach().to(self.device), labels.to(self.device))
        return found.x_adv, found.pred

    def _found(self, model: Model, images: Tensor, labels: Tensor):
        return deepfool(
            model, images, labels, steps=self.steps, overshoot=self.overshoot, candidates=10**9, model_mode="keep",
            return_info=True,
        )  # fmt: skip
