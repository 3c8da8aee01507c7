"""What torchattacks' classes have in common: modes, normalisation, device, saving."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from rvlm.attacks.contract import scoring, untouched
from rvlm.compat.common import Preprocessed

__all__ = ["Attack", "Model", "settings"]

Model = Callable[[Tensor], Tensor]
settings = dataclasses.dataclass(repr=False, eq=False)  # of the attacks: fields are arguments and attributes


class Attack:
    """Base class: a model, a mode, a normalisation. Subclasses are dataclasses (`settings`); the model comes first.

    Attributes:
        device: images and labels are moved there; None leaves them where they are.
        attack_mode, targeted, normalization_used: set by the methods of those names.
    """

    supported_mode: Sequence[str] = ("default", "targeted")

    model: Model

    def __post_init__(self) -> None:
        self.attack = type(self).__name__
        self.set_model(self.model)
        parameters = self.model.parameters() if isinstance(self.model, torch.nn.Module) else iter(())
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
