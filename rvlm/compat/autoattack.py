"""AutoAttack (fra31/auto-attack, RobustVLM's fork) on rvlm's engine: `from rvlm.compat.autoattack import AutoAttack`.

Same constructor, methods, parts and log lines, and the draws that its seed gives. Samples leave APGD once they are
fooled: the verdicts are the original's, images of fooled samples come from earlier iterates. FAB counts an image beyond
eps if it still fools the model when it is drawn into the ball. The model stays in the mode that it is in. The
original's checks of the model (randomness, softmax, dynamic code) are `rvlm check` here.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import InitVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rvlm.attacks.contract import untouched
from rvlm.compat.parts import NORMS, attacked
from rvlm.files import write_bytes

__all__ = ["APGDAttack", "APGDAttack_targeted", "AutoAttack", "FABAttack_PT", "SquareAttack"]

Model = Callable[[Tensor], Tensor]


_part = dataclasses.dataclass(repr=False, eq=False)  # fields are arguments and, but for InitVar, attributes


class _Part:
    """A part of AutoAttack. What its constructor took may be set later, under the original's names."""

    early_stop: str | None = None  # set by AutoAttack, for which the verdict is all that counts

    def __post_init__(self, predict: Model) -> None:
        self.model = predict
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(map(repr, NORMS))}, got {self.norm!r}")
        if self.eps is None:
            raise ValueError("eps, the radius in pixel units, must be given")

    def _attacked(self, name: str, x: Tensor, y: Tensor | None, **settings: Any) -> Tensor:
        device = x.device if self.device is None else self.device
        x, y = x.detach().to(device), None if y is None else y.detach().to(device).long()
        seed = time.time() if self.seed is None else self.seed
        with untouched(self.model, "keep"):
            return attacked(name, self.model, x, y, norm=self.norm, seed=seed, eps=self.eps, **settings)


class _APGD(_Part):
    def __post_init__(self, predict: Model, rho: float) -> None:
        super().__post_init__(predict)
        self.thr_decr = rho

    def perturb(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Adversarial images; clean ones where the model is wrong already or nothing was found."""
        aims = {"targets": self.n_target_classes} if hasattr(self, "n_target_classes") else {}
        return self._attacked(
            "apgd", x, y, restarts=self.n_restarts if self.use_rs else 1, random_start=self.use_rs, loss=self.loss,
            steps=self.n_iter, rho=self.thr_decr, eot=self.eot_iter, first_step=self.alpha,
            larger_eps=self.use_largereps, early_stop=self.early_stop, **aims,
        )  # fmt: skip


@_part
class APGDAttack(_APGD):
    """`apgd` on "ce" or "dlr".

    Args:
        alpha: the first step, in radii (RobustVLM's fork); None: 2, for L1 1.
        use_rs: start from noise (the fork); False: from the image, which makes one restart of all.
        topk, is_tf_model, logger: taken and ignored.
    """

    predict: InitVar[Model]
    n_iter: int = 100
    norm: str = "Linf"
    n_restarts: int = 1
    eps: float | None = None
    seed: float | None = 0
    loss: str = "ce"
    eot_iter: int = 1
    rho: InitVar[float] = 0.75
    topk: Any = None
    verbose: bool = False
    device: torch.device | str | None = None
    use_largereps: bool = False
    is_tf_model: bool = False
    logger: Any = None
    alpha: float | None = None
    use_rs: bool = True


@_part
class APGDAttack_targeted(_APGD):
    """`apgd` on "dlr-targeted" (or loss = "ce-targeted", set later), against the n_target_classes likeliest classes."""

    predict: InitVar[Model]
    n_iter: int = 100
    norm: str = "Linf"
    n_restarts: int = 1
    eps: float | None = None
    seed: float | None = 0
    eot_iter: int = 1
    rho: InitVar[float] = 0.75
    topk: Any = None
    n_target_classes: int = 9
    verbose: bool = False
    device: torch.device | str | None = None
    use_largereps: bool = False
    is_tf_model: bool = False
    logger: Any = None
    alpha: float | None = None
    use_rs: bool = True
    loss: str = dataclasses.field(default="dlr-targeted", init=False)


@_part
class FABAttack_PT(_Part):
    """`fab`; with targeted=True FAB-T, against the n_target_classes likeliest classes."""

    predict: InitVar[Model]
    norm: str = "Linf"
    n_restarts: int = 1
    n_iter: int = 100
    eps: float | None = None
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    loss_fn: Any = None
    verbose: bool = False
    seed: float | None = 0
    targeted: bool = False
    device: torch.device | str | None = None
    n_target_classes: int = 9

    def __post_init__(self, predict: Model) -> None:
        self.eps = {"Linf": 0.3, "L2": 1.0, "L1": 5.0}.get(self.norm) if self.eps is None else self.eps
        super().__post_init__(predict)

    def perturb(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Adversarial images within eps; clean ones where the model is wrong already or nothing was found."""
        aimed = {"aimed": True, "targets": self.n_target_classes} if self.targeted else {"aimed": False}
        shape = {"alpha_max": self.alpha_max, "eta": self.eta, "beta": self.beta}
        given = {"restarts": self.n_restarts, "steps": self.n_iter, "early_stop": self.early_stop}
        return self._attacked("fab", x, y, **given, **shape, **aimed)


@_part
class SquareAttack(_Part):
    """`square`."""

    predict: InitVar[Model]
    norm: str = "Linf"
    n_queries: int = 5000
    eps: float | None = None
    p_init: float = 0.8
    n_restarts: int = 1
    seed: float | None = 0
    verbose: bool = False
    targeted: bool = False
    loss: str = "margin"
    resc_schedule: InitVar[bool] = True
    device: torch.device | str | None = None

    def __post_init__(self, predict: Model, resc_schedule: bool) -> None:
        super().__post_init__(predict)
        self.rescale_schedule = resc_schedule

    def perturb(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Adversarial images; clean ones where the model is wrong already or nothing was found."""
        if self.targeted and y is None:
            raise ValueError("a targeted attack needs target labels y, got None")
        return self._attacked(
            "square", x, y, restarts=self.n_restarts, targeted=self.targeted, queries=self.n_queries,
            p_init=self.p_init, loss=self.loss, rescale=self.rescale_schedule,
        )  # fmt: skip


class AutoAttack:
    """AutoAttack over a set of images, in batches.

    Args:
        model: callable from pixels in [0, 1] to logits.
        attacks_to_run: for version="custom": "apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square".
        version: "standard", "plus", "rand" or "custom".
        device: the batches are moved there.
        log_path: file that the log lines are added to.
        alpha, iterations_apgd, use_rs: RobustVLM's fork: APGD's first step in radii, its steps, its random start.

    Attributes:
        apgd, apgd_targeted, fab, square: the parts; their attributes may be set: `adversary.apgd.n_restarts = 2`.
        attacks_to_run, seed, verbose, epsilon: as given; epsilon counts in the parts (`adversary.apgd.eps`).
    """

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        eps: float = 0.3,
        seed: float | None = None,
        verbose: bool = True,
        attacks_to_run: Sequence[str] = (),
        version: str = "standard",
        is_tf_model: bool = False,
        device: torch.device | str = "cuda",
        log_path: str | Path | None = None,
        alpha: float | None = None,
        iterations_apgd: int = 100,
        use_rs: bool = True,
    ) -> None:
        if is_tf_model:
            raise ValueError("is_tf_model=True: only PyTorch models can be attacked here")
        if version not in (*_VERSIONS, "custom"):
            raise ValueError(f"version must be one of {', '.join(map(repr, (*_VERSIONS, 'custom')))}, got {version!r}")
        if version != "custom" and attacks_to_run:
            raise ValueError("attacks_to_run will be overridden unless you use version='custom'")
        self.model, self.norm, self.epsilon, self.seed, self.verbose = model, norm, eps, seed, verbose
        self.attacks_to_run, self.version, self.device, self.log_path = list(attacks_to_run), version, device, log_path
        common = {"norm": norm, "eps": eps, "seed": seed, "device": device}
        forked = {"n_iter": iterations_apgd, "alpha": alpha, "use_rs": use_rs}
        self.apgd = APGDAttack(model, n_restarts=5, **common, **forked)
        self.apgd_targeted = APGDAttack_targeted(model, **common, **forked)
        self.fab = FABAttack_PT(model, n_restarts=5, **common)
        self.square = SquareAttack(model, resc_schedule=False, **common)
        for part in (self.apgd, self.apgd_targeted, self.fab):
            part.early_stop = "compact"
        if version != "custom":
            self.set_version(version)

    def set_version(self, version: str = "standard") -> None:
        """Sets attacks_to_run and the parts to those of "standard", "plus" or "rand"."""
        if self.verbose:
            print(f"setting parameters for {version} version")
        self.attacks_to_run = list(_VERSIONS[version])
        if version == "rand":
            self.apgd.n_restarts, self.apgd.eot_iter = 1, 20
            return
        in_l1 = version == "standard" and self.norm == "L1"
        self.apgd.n_restarts = 5 if version == "plus" or in_l1 else 1
        self.apgd.use_largereps = self.apgd_targeted.use_largereps = in_l1
        self.apgd_targeted.n_restarts, self.apgd_targeted.n_target_classes = 1, 5 if in_l1 else 9
        self.fab.n_restarts, self.fab.n_target_classes = 5 if version == "plus" else 1, 9
        self.square.n_queries = 5000

    def get_seed(self) -> float:
        return time.time() if self.seed is None else self.seed

    def get_logits(self, x: Tensor) -> Tensor:
        return self.model(x)

    def run_standard_evaluation(
        self,
        x_orig: Tensor,
        y_orig: Tensor,
        bs: int = 250,
        return_labels: bool = False,
        state_path: str | Path | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Runs the attacks, each on what the ones before left.

        Args:
            x_orig: images [N, ...] in [0, 1]; y_orig: labels [N].
            return_labels: also return the predicted classes of the result.
            state_path: file of verdicts that an evaluation which was killed goes on from; then only images of the
                current run are adversarial in what is returned.

        Returns:
            Adversarial images like x_orig; clean where nothing fooled the model.
        """
        x_adv, y_adv = self._evaluation(x_orig, y_orig, bs, state_path)
        return (x_adv, y_adv) if return_labels else x_adv

    @torch.no_grad()
    def _evaluation(
        self, x_orig: Tensor, y_orig: Tensor, bs: int, state_path: str | Path | None = None
    ) -> tuple[Tensor, Tensor]:
        if not 0 < len(x_orig) == len(y_orig):
            raise ValueError(f"expected images and as many labels, at least one, got {len(x_orig)} and {len(y_orig)}")
        state = _State(state_path, self.attacks_to_run)
        todo = [name for name in self.attacks_to_run if name not in state.run_attacks]
        self._log(f"using {self.version} version including {', '.join(todo)}.")
        y_adv = torch.cat([self._predicted(x) for x in x_orig.split(bs)]).to(y_orig.device)
        if state.robust_flags is None:
            state.robust_flags = y_adv == y_orig
            self._log(f"initial accuracy: {self._share(state.robust_flags)}")
        robust, x_adv, began = state.robust_flags.to(x_orig.device), x_orig.clone(), time.time()
        for attack in todo:
            batches = robust.nonzero().flatten().split(bs)
            if not batches[0].numel():
                break
            for number, rows in enumerate(batches):
                found = self._perturb(attack, x_orig[rows], y_orig[rows]).to(x_orig.device)
                pred = self._predicted(found).to(y_orig.device)
                hit = pred != y_orig[rows]
                x_adv[rows[hit]], y_adv[rows[hit]] = found[hit], pred[hit]
                robust[rows[hit]] = False
                many = f"{int(hit.sum())} out of {len(rows)} successfully perturbed"
                self._log(f"{attack} - {number + 1}/{len(batches)} - {many}")
            state.done(attack, robust)
            seconds = f"(total time {time.time() - began:.1f} s)"
            self._log(f"robust accuracy after {attack.upper()}: {self._share(robust)} {seconds}")
        order = {"Linf": torch.inf, "L2": 2, "L1": 1}[self.norm]
        largest = (x_adv - x_orig).flatten(1).norm(order, dim=1).max()
        self._log(
            f"max {self.norm} perturbation: {largest:.5f}, nan in tensor: {int(x_adv.isnan().sum())}, "
            f"max: {x_adv.max():.5f}, min: {x_adv.min():.5f}"
        )
        self._log(f"robust accuracy: {self._share(robust)}")
        return x_adv, y_adv

    def run_standard_evaluation_individual(
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False
    ) -> dict[str, Any]:
        """Every attack on all images: {name: images}, or {name: (images, predicted classes)}."""
        self._log(f"using {self.version} version including {', '.join(self.attacks_to_run)}")
        names, verbose, found = self.attacks_to_run, self.verbose, {}
        try:
            for name in names:
                self.attacks_to_run, self.verbose, began = [name], False, time.time()
                x_adv, y_adv = self._evaluation(x_orig, y_orig, bs)
                found[name] = (x_adv, y_adv) if return_labels else x_adv
                left, self.verbose = (y_adv == y_orig).double().mean().item(), verbose
                self._log(
                    f"robust accuracy by {name.upper()} \t {left:.2%} \t (time attack: {time.time() - began:.1f} s)"
                )
        finally:
            self.attacks_to_run, self.verbose = names, verbose
        return found

    @torch.no_grad()
    def clean_accuracy(self, x_orig: Tensor, y_orig: Tensor, bs: int = 250) -> float:
        """Share of the images that the model gets right."""
        pairs = zip(x_orig.split(bs), y_orig.split(bs), strict=True)
        right = sum(int((self._predicted(x) == y.to(self.device)).sum()) for x, y in pairs)
        if self.verbose:
            print(f"clean accuracy: {right / len(x_orig):.2%}")
        return right / len(x_orig)

    def _perturb(self, attack: str, x: Tensor, y: Tensor) -> Tensor:
        if attack not in _PARTS:
            raise ValueError(f"Attack not supported: {attack!r}; it must be one of {', '.join(_PARTS)}")
        name, settings = _PARTS[attack]
        part = getattr(self, name)
        vars(part).update(settings, seed=self.get_seed())
        return part.perturb(x.to(self.device), y.to(self.device))

    def _predicted(self, x: Tensor) -> Tensor:
        with untouched(self.model, "keep"):
            return self.get_logits(x.to(self.device)).argmax(1)

    def _share(self, flags: Tensor) -> str:
        return f"{flags.double().mean().item():.2%}"

    def _log(self, line: str) -> None:
        if not self.verbose:
            return
        print(line)
        if self.log_path is not None:
            with Path(self.log_path).open("a") as file:
                file.write(f"{line}\n")


_VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
_PARTS: dict[str, tuple[str, dict[str, Any]]] = {  # which part, and what is set before it runs
    "apgd-ce": ("apgd", {"loss": "ce"}),
    "apgd-dlr": ("apgd", {"loss": "dlr"}),
    "apgd-t": ("apgd_targeted", {}),
    "fab": ("fab", {"targeted": False}),
    "fab-t": ("fab", {"targeted": True, "n_restarts": 1}),
    "square": ("square", {}),
}


class _State:
    """Verdicts so far and the attacks that have given them, in a JSON file if there is a path."""

    def __init__(self, path: str | Path | None, attacks: Sequence[str]) -> None:
        self.path, self.attacks = None if path is None else Path(path), sorted(attacks)
        self.run_attacks: list[str] = []
        self.robust_flags: Tensor | None = None
        if self.path is not None and self.path.exists():
            kept = json.loads(self.path.read_text())
            if kept["attacks_to_run"] != self.attacks:
                raise ValueError(
                    f"{path} holds the state of other attacks, {', '.join(kept['attacks_to_run'])}: give another file"
                )
            self.run_attacks, self.robust_flags = kept["run_attacks"], torch.tensor(kept["robust_flags"])

    def done(self, attack: str, robust: Tensor) -> None:
        self.run_attacks.append(attack)
        self.robust_flags = robust.clone()
        if self.path is not None:
            kept = {"attacks_to_run": self.attacks, "run_attacks": self.run_attacks, "robust_flags": robust.tolist()}
            write_bytes(self.path, json.dumps(kept).encode())
