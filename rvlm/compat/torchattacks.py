"""torchattacks (3.5.1) on rvlm's engine: `import rvlm.compat.torchattacks as torchattacks`.

Same constructors, defaults, modes and random draws; `attack(images, labels)`. What is other than there, in every class:
the model is left as it was (module by module, batch norm statistics too), images must lie in [0, 1] and eps below 1,
float16 images are refused, and seeds of APGD, FAB and Square do not reseed the global generator. docs/compat.md has the
table of classes.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from rvlm.attacks.checks import AttackWarning
from rvlm.attacks.contract import scoring, untouched
from rvlm.attacks.cw import cw
from rvlm.attacks.deepfool import deepfool
from rvlm.attacks.mifgsm import NI, SI, TI, VMI, Ask, Now, Transform, mifgsm
from rvlm.attacks.objective import Scores
from rvlm.attacks.pgd import pgd
from rvlm.compat.common import GlobalDraws, Preprocessed, l2_start, linf_start
from rvlm.compat.parts import attacked

__all__ = [
    "APGD",
    "APGDT",
    "BIM",
    "CW",
    "DIFGSM",
    "EOTPGD",
    "FAB",
    "FFGSM",
    "FGSM",
    "GN",
    "MIFGSM",
    "NIFGSM",
    "PGD",
    "PGDL2",
    "RFGSM",
    "SINIFGSM",
    "TIFGSM",
    "TPGD",
    "VANILA",
    "VMIFGSM",
    "VNIFGSM",
    "Attack",
    "AutoAttack",
    "DeepFool",
    "MultiAttack",
    "Square",
]

Model = Callable[[Tensor], Tensor]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise AttributeError(f"rvlm.compat.torchattacks has no {name}; it has {', '.join(__all__)}")


class Attack:
    """Base class: a model, a mode, a normalisation.

    Attributes:
        device: images and labels are moved there; None leaves them where they are.
        attack_mode, targeted, normalization_used: set by the methods of those names.
    """

    supported_mode: Sequence[str] = ("default", "targeted")

    def __init__(self, name: str, model: Model) -> None:
        self.attack = name
        self.set_model(model)
        parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
        self.device = next((p.device for p in parameters), None)
        self.attack_mode, self.targeted, self.normalization_used = "default", False, None
        self._target_map_function = self._training = None

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        """The attack itself. labels: or targets, if self.targeted."""
        raise NotImplementedError

    def __call__(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Adversarial images of a batch in [0, 1], or normalised if `set_normalization_used` said so."""
        images = inputs.detach().to(self.device)
        labels = None if labels is None else labels.detach().to(self.device)
        with self._mode():
            if self.normalization_used is None:
                return self._attack(images, labels)
            return self.normalize(self._attack(self.inverse_normalize(images), labels))

    def _attack(self, images: Tensor, labels: Tensor | None) -> Tensor:
        if self.targeted:
            labels = self._target_map_function(images, labels).to(images.device)
        return self._find(self._on_pixels(), images, labels)

    def _on_pixels(self) -> Model:
        return self.model if self.normalization_used is None else Preprocessed(self.model, self.normalize)

    @contextmanager
    def _mode(self) -> Iterator[None]:
        """Everything of the model is restored afterwards; inside, the mode that was asked for."""
        with untouched(self.model, "eval" if self._training is None else "train"):
            for m in self.model.modules() if self._training is not None else ():
                for kind, training in self._training.items():
                    if kind in type(m).__name__ and not training:
                        m.eval()
            yield

    def set_model(self, model: Model) -> None:
        self.model, self.model_name = model, type(model).__name__

    def set_device(self, device: torch.device | str) -> None:
        self.device = device

    def set_model_training_mode(
        self, model_training: bool = False, batchnorm_training: bool = False, dropout_training: bool = False
    ) -> None:
        """The model's mode during the attack; the two others count under model_training=True only."""
        given = {"BatchNorm": batchnorm_training, "Dropout": dropout_training}
        self._training = given if model_training else None

    def set_normalization_used(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Images are given and returned normalised; eps and alpha stay in pixel units."""
        given = {"mean": mean, "std": std}
        self.normalization_used = {k: torch.as_tensor(v).reshape(1, -1, 1, 1) for k, v in given.items()}

    def normalize(self, inputs: Tensor) -> Tensor:
        used = self.normalization_used
        return (inputs - used["mean"].to(inputs)) / used["std"].to(inputs)

    def inverse_normalize(self, inputs: Tensor) -> Tensor:
        used = self.normalization_used
        return inputs * used["std"].to(inputs) + used["mean"].to(inputs)

    def get_mode(self) -> str:
        return self.attack_mode

    def set_mode_default(self) -> None:
        self.attack_mode, self.targeted = "default", False
        print("Attack mode is changed to 'default.'")

    def set_mode_targeted_by_function(self, target_map_function: Callable, quiet: bool = False) -> None:
        """Targets are target_map_function(images, labels)."""
        self._set_targeted("targeted(custom)", target_map_function, quiet)

    def set_mode_targeted_random(self, quiet: bool = False) -> None:
        """Targets are drawn among the other classes."""
        self._set_targeted("targeted(random)", self.get_random_target_label, quiet)

    def set_mode_targeted_least_likely(self, kth_min: int = 1, quiet: bool = False) -> None:
        """The target is the class with the kth_min smallest logit that is not the label."""
        if kth_min < 1:
            raise ValueError(f"kth_min counts from 1, got {kth_min}")
        self._kth_min = kth_min
        self._set_targeted("targeted(least-likely)", self.get_least_likely_label, quiet)

    def set_mode_targeted_by_label(self, quiet: bool = False) -> None:
        """The labels given with the images are the targets."""
        self._set_targeted("targeted(label)", lambda images, labels: labels, quiet)

    def _set_targeted(self, mode: str, target_map_function: Callable, quiet: bool) -> None:
        if "targeted" not in self.supported_mode:
            raise ValueError("Targeted mode is not supported.")
        self.targeted, self.attack_mode, self._target_map_function = True, mode, target_map_function
        if not quiet:
            print(f"Attack mode is changed to '{mode}'.")

    def _logits(self, images: Tensor) -> Tensor:
        """Of pixels in [0, 1]."""
        with scoring(self.model):
            return self._on_pixels()(images)

    def get_least_likely_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        outputs = self._logits(inputs)
        labels = outputs.argmax(1) if labels is None else labels
        return outputs.scatter(1, labels[:, None], torch.inf).kthvalue(self._kth_min, dim=1).indices

    def get_random_target_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        outputs = self._logits(inputs)
        labels = outputs.argmax(1) if labels is None else labels
        drawn = torch.cat([torch.rand([1]) for _ in labels]).to(outputs.device)  # one call for each, as there
        other = ((outputs.shape[1] - 1) * drawn).long()
        return other + (other >= labels)

    def save(
        self,
        data_loader: DataLoader,
        save_path: str | None = None,
        verbose: bool = True,
        return_verbose: bool = False,
        save_predictions: bool = False,
        save_clean_inputs: bool = False,
        save_type: str = "float",
    ) -> tuple[float, float, float] | None:
        """Attacks all batches and writes a file that `load` reads; images are stored in [0, 1].

        Args:
            save_type: "float", or "int": uint8, rounded (torchattacks cuts off).

        Returns:
            With return_verbose: robust accuracy in %, mean L2 length of the perturbations that fooled the model, and
            the seconds of the last batch.
        """
        kept: dict[str, list[Tensor]] = {}
        right, total, lengths, seconds = 0, 0, [], 0.0
        for step, (inputs, labels) in enumerate(data_loader):
            began = time.time()
            adv_inputs = self(inputs, labels)
            with scoring(self.model):
                pred = self.model(adv_inputs).argmax(1).cpu()
            correct = pred == labels.cpu()
            right, total = right + int(correct.sum()), total + len(labels)
            lengths.append((adv_inputs.cpu() - inputs.cpu()).flatten(1).norm(dim=1)[~correct])
            seconds, l2 = time.time() - began, torch.cat(lengths).mean().item()
            if verbose:
                share = 100 * (step + 1) / len(data_loader)
                end = "\n" if step + 1 == len(data_loader) else "\r"
                print(self._progress(share, 100 * right / total, l2, seconds), end=end)
            batch = {"adv_inputs": self._stored(adv_inputs, save_type), "labels": labels}
            batch |= {"preds": pred} if save_predictions else {}
            batch |= {"clean_inputs": self._stored(inputs, save_type)} if save_clean_inputs else {}
            for name, value in batch.items():
                kept.setdefault(name, []).append(value.detach().cpu())
        if save_path is not None:
            torch.save({name: torch.cat(parts) for name, parts in kept.items()} | {"save_type": save_type}, save_path)
        return (100 * right / total, l2, seconds) if return_verbose else None

    def _progress(self, share: float, robust: float, l2: float, seconds: float) -> str:
        found = f"Robust accuracy: {robust:2.2f} % / L2: {l2:1.5f} ({seconds:2.3f} it/s)"
        return f"- Save progress: {share:2.2f} % / {found} \t"

    def _stored(self, images: Tensor, save_type: str) -> Tensor:
        if save_type not in ("float", "int"):
            raise ValueError(f"{save_type} is not a valid type. [Options: float, int]")
        images = images if self.normalization_used is None else self.inverse_normalize(images)
        return images if save_type == "float" else (images * 255).round().to(torch.uint8)

    @staticmethod
    def load(
        load_path: str,
        batch_size: int = 128,
        shuffle: bool = False,
        normalize: dict[str, Sequence[float]] | None = None,
        load_predictions: bool = False,
        load_clean_inputs: bool = False,
    ) -> DataLoader:
        """Batches of (adversarial images, labels[, predictions][, clean images]) from a file that `save` wrote.

        normalize: {"mean": ..., "std": ...} to normalise the images with.
        """
        kept = torch.load(load_path, weights_only=True)
        keys = ["adv_inputs", "labels", *["preds"] * load_predictions, *["clean_inputs"] * load_clean_inputs]
        for name in {"adv_inputs", "clean_inputs"} & set(keys):
            images = kept[name].float() / 255 if kept["save_type"] == "int" else kept[name]
            if normalize is not None:
                mean, std = (torch.tensor(normalize[k]).reshape(1, -1, 1, 1) for k in ("mean", "std"))
                images = (images - mean) / std
            kept[name] = images
        print(f"Data is loaded in the following order: [{', '.join(keys)}]")
        return DataLoader(TensorDataset(*[kept[key] for key in keys]), batch_size=batch_size, shuffle=shuffle)

    def __repr__(self) -> str:
        hidden = {"model", "attack", "normalization_used"}
        shown = {name: value for name, value in vars(self).items() if name not in hidden and name[0] != "_"}
        shown["normalization_used"] = self.normalization_used is not None
        return f"{self.attack}({', '.join(f'{name}={value}' for name, value in shown.items())})"


class VANILA(Attack):
    """No attack: the images."""

    supported_mode = ("default",)

    def __init__(self, model: Model) -> None:
        super().__init__("VANILA", model)

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        return images.clone()


class GN(Attack):
    """Gaussian noise of deviation std."""

    supported_mode = ("default",)

    def __init__(self, model: Model, std: float = 0.1) -> None:
        super().__init__("GN", model)
        self.std = std

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        return (images + self.std * torch.randn_like(images)).clamp(0, 1)


class FGSM(Attack):
    """`pgd` with one step of size eps from the image."""

    def __init__(self, model: Model, eps: float = 8 / 255) -> None:
        super().__init__("FGSM", model)
        self.eps = eps

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        return self._steps(model, images, labels, alpha=self.eps, steps=1)

    def _steps(self, model: Model, images: Tensor, labels: Any, start: Tensor | None = None, **settings: Any) -> Tensor:
        """`pgd` from a start, or from the images."""
        settings = {"targeted": self.targeted} | settings
        return pgd(model, images, labels, eps=self.eps, x_init=start, random_start=False, model_mode="keep", **settings)


class BIM(FGSM):
    """`pgd` without a random start; steps=0 stands for min(255 eps + 4, 1.25 * 255 eps). Within 1e-7 of theirs."""

    def __init__(self, model: Model, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10) -> None:
        super().__init__(model, eps)
        self.attack, self.alpha = "BIM", alpha
        self.steps = steps or int(min(eps * 255 + 4, 1.25 * eps * 255))

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        return self._steps(model, images, labels, alpha=self.alpha, steps=self.steps)


class FFGSM(FGSM):
    """`pgd` with one step of size alpha from uniform noise."""

    def __init__(self, model: Model, eps: float = 8 / 255, alpha: float = 10 / 255) -> None:
        super().__init__(model, eps)
        self.attack, self.alpha = "FFGSM", alpha

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        noise = torch.randn_like(images).uniform_(-self.eps, self.eps)  # draws twice, as there
        return self._steps(model, images, labels, (images + noise).clamp(0, 1), alpha=self.alpha, steps=1)


class RFGSM(FGSM):
    """`pgd` from a step along random signs; a start outside the ball (alpha > eps) is projected first."""

    def __init__(self, model: Model, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10) -> None:
        super().__init__(model, eps)
        self.attack, self.alpha, self.steps = "RFGSM", alpha, steps

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        start = (images + self.alpha * torch.randn_like(images).sign()).clamp(0, 1)
        return self._steps(model, images, labels, start, alpha=self.alpha, steps=self.steps)


class PGD(FGSM):
    """`pgd`."""

    def __init__(
        self, model: Model, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10, random_start: bool = True
    ) -> None:
        super().__init__(model, eps)
        self.attack, self.alpha, self.steps, self.random_start = "PGD", alpha, steps, random_start

    def _find(self, model: Model, images: Tensor, labels: Tensor, **more: Any) -> Tensor:
        start = linf_start(images, self.eps) if self.random_start else None
        return self._steps(model, images, labels, start, alpha=self.alpha, steps=self.steps, **more)


class EOTPGD(PGD):
    """`pgd` with the mean of eot_iter gradients, for models that draw random numbers."""

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        eot_iter: int = 2,
        random_start: bool = True,
    ) -> None:
        super().__init__(model, eps, alpha, steps, random_start)
        self.attack, self.eot_iter = "EOTPGD", eot_iter

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        return super()._find(model, images, labels, eot=self.eot_iter)


class PGDL2(FGSM):
    """`pgd` in L2. eps_for_division is not needed: a zero gradient is no step."""

    def __init__(
        self,
        model: Model,
        eps: float = 1.0,
        alpha: float = 0.2,
        steps: int = 10,
        random_start: bool = True,
        eps_for_division: float = 1e-10,
    ) -> None:
        super().__init__(model, eps)
        self.attack, self.alpha, self.steps, self.random_start = "PGDL2", alpha, steps, random_start
        self.eps_for_division = eps_for_division

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        start = l2_start(images, self.eps) if self.random_start else None
        return self._steps(model, images, labels, start, alpha=self.alpha, steps=self.steps, norm="l2")


class TPGD(FGSM):
    """`pgd` on KL(f(x) || f(x')), TRADES' attack; takes no labels."""

    supported_mode = ("default",)

    def __init__(self, model: Model, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10) -> None:
        super().__init__(model, eps)
        self.attack, self.alpha, self.steps = "TPGD", alpha, steps

    def _find(self, model: Model, images: Tensor, labels: Tensor | None) -> Tensor:
        with torch.no_grad():
            clean = model(images).softmax(1)
        start = (images + 0.001 * torch.randn_like(images)).clamp(0, 1)
        return self._steps(model, images, clean, start, alpha=self.alpha, steps=self.steps, loss=_divergence)


def _divergence(logits: Tensor, clean: Tensor) -> Tensor:
    return F.kl_div(logits.log_softmax(1), clean, reduction="none").sum(1)


class MIFGSM(FGSM):
    """`mifgsm`; its transforms make the classes below."""

    def __init__(
        self, model: Model, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10, decay: float = 1.0
    ) -> None:
        super().__init__(model, eps)
        self.attack, self.alpha, self.steps, self.decay, self.random_start = (
            type(self).__name__,
            alpha,
            steps,
            decay,
            False,
        )

    def _transforms(self) -> list[Transform]:
        return []

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        start = linf_start(images, self.eps) if self.random_start else None
        return mifgsm(
            model, images, labels, eps=self.eps, alpha=self.alpha, steps=self.steps, mu=self.decay, x_init=start,
            transforms=self._transforms(), targeted=self.targeted, generator=GlobalDraws(), model_mode="keep",
        )  # fmt: skip


class NIFGSM(MIFGSM):
    """`mifgsm` with NI."""

    def _transforms(self) -> list[Transform]:
        return [NI()]


class SINIFGSM(MIFGSM):
    """`mifgsm` with NI and m copies of SI."""

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        decay: float = 1.0,
        m: int = 5,
    ) -> None:
        super().__init__(model, eps, alpha, steps, decay)
        self.m = m

    def _transforms(self) -> list[Transform]:
        return [NI(), SI(self.m)]


class VMIFGSM(MIFGSM):
    """`mifgsm` with VMI, N neighbours."""

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        decay: float = 1.0,
        N: int = 5,
        beta: float = 3 / 2,
    ) -> None:
        super().__init__(model, eps, alpha, steps, decay)
        self.N, self.beta = N, beta

    def _transforms(self) -> list[Transform]:
        return [VMI(self.N, self.beta)]


class VNIFGSM(VMIFGSM):
    """`mifgsm` with VMI, whose own gradient is taken at NI's look ahead, and its neighbours' around the iterate."""

    def _transforms(self) -> list[Transform]:
        return [_AheadVMI(self.N, self.beta)]


class _AheadVMI(VMI):
    def __call__(self, ask: Ask, x: Tensor, now: Now) -> tuple[Scores, Tensor]:
        return super().__call__(lambda v: NI()(ask, v, now) if v is x else ask(v), x, now)


class _Resized(Transform):
    """torchattacks' input diversity: one draw for the batch, the image made smaller and padded on both sides."""

    images = True

    def __init__(self, resize_rate: float, diversity_prob: float) -> None:
        self.resize_rate, self.diversity_prob = resize_rate, diversity_prob

    def __call__(self, ask: Ask, x: Tensor, now: Now) -> tuple[Scores, Tensor]:
        sides = sorted((int(x.shape[-1] * self.resize_rate), x.shape[-1]))
        side = _between(*sides)
        spare = sides[1] - side
        top, left = _between(0, spare), _between(0, spare)
        if torch.rand(1) >= self.diversity_prob:
            return ask(x)
        padding = [left, spare - left, top, spare - top]
        return ask(x, lambda v: F.pad(F.interpolate(v, [side, side], mode="bilinear", align_corners=False), padding))


def _between(low: int, high: int) -> int:
    return int(torch.randint(low, high, (1,), dtype=torch.int32))


class DIFGSM(MIFGSM):
    """`mifgsm` with torchattacks' own input diversity, which draws once for the batch (ours: for each sample)."""

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        decay: float = 0.0,
        resize_rate: float = 0.9,
        diversity_prob: float = 0.5,
        random_start: bool = False,
    ) -> None:
        super().__init__(model, eps, alpha, steps, decay)
        self.resize_rate, self.diversity_prob, self.random_start = resize_rate, diversity_prob, random_start

    def _transforms(self) -> list[Transform]:
        return [_Resized(self.resize_rate, self.diversity_prob)]


class TIFGSM(DIFGSM):
    """DIFGSM with a Gaussian over its gradients; kernel_name "linear" and "uniform" are refused."""

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        decay: float = 0.0,
        kernel_name: str = "gaussian",
        len_kernel: int = 15,
        nsig: float = 3,
        resize_rate: float = 0.9,
        diversity_prob: float = 0.5,
        random_start: bool = False,
    ) -> None:
        super().__init__(model, eps, alpha, steps, decay, resize_rate, diversity_prob, random_start)
        if kernel_name != "gaussian":
            raise ValueError(f"kernel_name must be 'gaussian' here, got {kernel_name!r}")
        self.kernel_name, self.len_kernel, self.nsig = kernel_name, len_kernel, nsig

    def _transforms(self) -> list[Transform]:
        return [TI(self.len_kernel, self.nsig), *super()._transforms()]


class CW(Attack):
    """`cw` in L2, one round with weight c.

    Other than theirs: the batch does not stop as a whole when its summed objective rises (no sample depends on the
    others), a pixel at 0 or 1 can move, the largest other logit is looked for among the others (theirs counts a 0 in
    place of the label's, which hides that all others are negative), and an image counts from a margin of kappa on.
    """

    def __init__(self, model: Model, c: float = 1, kappa: float = 0, steps: int = 50, lr: float = 0.01) -> None:
        super().__init__("CW", model)
        self.c, self.kappa, self.steps, self.lr = c, kappa, steps, lr

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        return cw(
            model, images, labels, steps=self.steps, rounds=1, const=self.c, lr=self.lr, confidence=self.kappa,
            abort_early=False, targeted=self.targeted, model_mode="keep",
        )  # fmt: skip


class DeepFool(Attack):
    """`deepfool` in L2 over all classes: the paper's, which overshoots once; theirs at every step, from another sum."""

    supported_mode = ("default",)

    def __init__(self, model: Model, steps: int = 50, overshoot: float = 0.02) -> None:
        super().__init__("DeepFool", model)
        self.steps, self.overshoot = steps, overshoot

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        return self.forward_return_target_labels(images, labels)[0]

    def forward_return_target_labels(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Adversarial images of pixels in [0, 1], and the classes that they are taken for."""
        found = deepfool(
            self._on_pixels(), images, labels, steps=self.steps, overshoot=self.overshoot, candidates=10**9,
            return_info=True,
        )  # fmt: skip
        return found.x_adv, found.pred


class _Part(Attack):
    """A part of AutoAttack; early_stop is set by AutoAttack, for which the verdict is all that counts."""

    supported_mode: Sequence[str] = ("default",)
    early_stop: str | None = None
    part: str

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        return attacked(
            self.part, model, images, labels, norm=self.norm, eps=self.eps, seed=self.seed, restarts=self.n_restarts,
            targeted=self.targeted, early_stop=self.early_stop, **self._settings(),
        )  # fmt: skip


class APGD(_Part):
    """`apgd` on "ce" or "dlr", Linf or L2."""

    part = "apgd"

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        eps: float = 8 / 255,
        steps: int = 10,
        n_restarts: int = 1,
        seed: float = 0,
        loss: str = "ce",
        eot_iter: int = 1,
        rho: float = 0.75,
        verbose: bool = False,
    ) -> None:
        super().__init__("APGD", model)
        self.norm, self.eps, self.steps, self.n_restarts, self.seed = norm, eps, steps, n_restarts, seed
        self.loss, self.eot_iter, self.thr_decr, self.verbose = loss, eot_iter, rho, verbose

    def _settings(self) -> dict[str, Any]:
        return {"steps": self.steps, "loss": self.loss, "eot": self.eot_iter, "rho": self.thr_decr}


class APGDT(_Part):
    """`apgd` on "dlr-targeted", against the n_classes - 1 likeliest wrong classes."""

    part = "apgd"

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        eps: float = 8 / 255,
        steps: int = 10,
        n_restarts: int = 1,
        seed: float = 0,
        eot_iter: int = 1,
        rho: float = 0.75,
        verbose: bool = False,
        n_classes: int = 10,
    ) -> None:
        super().__init__("APGDT", model)
        self.norm, self.eps, self.steps, self.n_restarts, self.seed = norm, eps, steps, n_restarts, seed
        self.eot_iter, self.thr_decr, self.verbose, self.n_target_classes = eot_iter, rho, verbose, n_classes - 1

    def _settings(self) -> dict[str, Any]:
        return {
            "steps": self.steps, "loss": "dlr-targeted", "targets": self.n_target_classes, "eot": self.eot_iter,
            "rho": self.thr_decr,
        }  # fmt: skip


class FAB(_Part):
    """`fab`; with multi_targeted against the n_classes - 1 likeliest wrong classes. No targeted mode."""

    part = "fab"

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        eps: float | None = 8 / 255,
        steps: int = 10,
        n_restarts: int = 1,
        alpha_max: float = 0.1,
        eta: float = 1.05,
        beta: float = 0.9,
        verbose: bool = False,
        seed: float = 0,
        multi_targeted: bool = False,
        n_classes: int = 10,
    ) -> None:
        super().__init__("FAB", model)
        self.norm, self.steps, self.n_restarts, self.seed, self.verbose = norm, steps, n_restarts, seed, verbose
        self.eps = {"Linf": 0.3, "L2": 1.0, "L1": 5.0}[norm] if eps is None else eps
        self.alpha_max, self.eta, self.beta = alpha_max, eta, beta
        self.multi_targeted, self.n_target_classes = multi_targeted, n_classes - 1

    def _settings(self) -> dict[str, Any]:
        aimed = {"aimed": True, "targets": self.n_target_classes} if self.multi_targeted else {"aimed": False}
        steps = {"steps": self.steps, "alpha_max": self.alpha_max, "eta": self.eta, "beta": self.beta}
        return aimed | steps


class Square(_Part):
    """`square`, Linf or L2."""

    part, supported_mode = "square", ("default", "targeted")

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        eps: float = 8 / 255,
        n_queries: int = 5000,
        n_restarts: int = 1,
        p_init: float = 0.8,
        loss: str = "margin",
        resc_schedule: bool = True,
        seed: float | None = 0,
        verbose: bool = False,
    ) -> None:
        super().__init__("Square", model)
        self.norm, self.eps, self.n_queries, self.n_restarts, self.p_init = norm, eps, n_queries, n_restarts, p_init
        self.loss, self.rescale_schedule, self.verbose = loss, resc_schedule, verbose
        self.seed = time.time() if seed is None else seed

    def _settings(self) -> dict[str, Any]:
        return {"queries": self.n_queries, "p_init": self.p_init, "loss": self.loss, "rescale": self.rescale_schedule}


class MultiAttack(Attack):
    """Attacks of one model, each on what the ones before left; images that nothing fooled stay clean."""

    supported_mode = ("default",)

    def __init__(self, attacks: Sequence[Attack], verbose: bool = False) -> None:
        if len(attacks) < 2:
            raise ValueError("More than two attacks should be given.")
        if any(attack.model is not attacks[0].model for attack in attacks):
            raise ValueError("At least one of attacks is referencing a different model.")
        super().__init__("MultiAttack", attacks[0].model)
        self.attacks, self.verbose = attacks, verbose
        used = [attack.normalization_used for attack in attacks]
        if any((a is None) != (used[0] is None) for a in used):
            raise ValueError("set_normalization_used must be called on all of the attacks, or on none")
        self.normalization_used = used[0]

    def set_normalization_used(self, mean: Sequence[float], std: Sequence[float]) -> None:
        for attack in (super(), *self.attacks):
            attack.set_normalization_used(mean, std)

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        x_adv = images.clone()
        left, counts = torch.arange(len(images), device=images.device), [len(images)]
        for attack in self.attacks:
            found = attack._attack(images[left], labels[left])
            with torch.no_grad():
                wrong = model(found).argmax(1) != labels[left]
            x_adv[left[wrong]] = found[wrong]
            left = left[~wrong]
            counts.append(len(left))
            if not len(left):
                break
        if self.verbose:
            rates = " | ".join(f"{100 * (1 - n / counts[0]):2.2f} %" for n in counts[1:])
            print(f"Attack success rate: {rates}")
        return x_adv


class AutoAttack(Attack):
    """torchattacks' AutoAttack, whose APGD and FAB run 10 steps where the original runs 100.

    Its robust accuracies are not those of AutoAttack (torchattacks issue 188): for these use
    `rvlm.compat.autoattack`, `rvlm.attacks.autoattack` or `rvlm eval --attack autoattack`. Samples leave APGD once they
    are fooled, so verdicts are torchattacks', images of fooled samples come from earlier iterates.
    """

    supported_mode = ("default",)

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        eps: float = 8 / 255,
        version: str = "standard",
        n_classes: int = 10,
        seed: float | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__("AutoAttack", model)
        self.norm, self.eps, self.version, self.n_classes = norm, eps, version, n_classes
        self.seed, self.verbose = seed, verbose
        warnings.warn(
            "torchattacks' AutoAttack runs APGD and FAB for 10 steps, AutoAttack for 100: its figures are not "
            "comparable with published ones (use rvlm.compat.autoattack for those)",
            AttackWarning,
            stacklevel=2,
        )
        common = {"norm": norm, "eps": eps, "seed": self.get_seed(), "verbose": verbose}
        aimed = [
            APGDT(model, n_classes=n_classes, **common),
            FAB(model, multi_targeted=True, n_classes=n_classes, **common),
        ]
        parts = {
            "standard": [APGD(model, **common), *aimed, Square(model, **common)],
            "plus": [
                APGD(model, n_restarts=5, **common), APGD(model, loss="dlr", n_restarts=5, **common),
                FAB(model, n_restarts=5, **common), Square(model, **common), *aimed,
            ],
            "rand": [APGD(model, loss=loss, eot_iter=20, **common) for loss in ("ce", "dlr")],
        }  # fmt: skip
        if version not in parts:
            raise ValueError(f"Not valid version. {list(parts)}")
        for part in parts[version]:
            part.early_stop = "compact"
        self._autoattack = MultiAttack(parts[version])

    def _find(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        return self._autoattack._find(model, images, labels)

    def set_normalization_used(self, mean: Sequence[float], std: Sequence[float]) -> None:
        for attack in (super(), self._autoattack):
            attack.set_normalization_used(mean, std)

    def get_seed(self) -> float:
        return time.time() if self.seed is None else self.seed
