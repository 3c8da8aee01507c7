"""Image-text retrieval under attack: recall at 1, 5 and 10, from images to captions and from captions to images.

    text recall@k    the share of images with a caption of their own among the k nearest captions
    image recall@k   the share of captions whose image is among the k nearest images

The captions of an image stand or fall together, so that intervals of image recall are Wilson's at the effective number
of captions, with a variance clustered by image (`rvlm.evaluation.metrics.effective_size`); those of text recall, with
one answer for each image, are Wilson's.

The attack moves every image away from its own captions; then all images of the gallery are adversarial ones. Ties, and
embeddings with NaN, count against the model. `white-box`: made on the model that is measured. `transfer`: made on
another one, `source`.
"""

import dataclasses
import re
import time
from typing import Any

import torch
from torch import Tensor

from rvlm.attacks import scoring
from rvlm.attacks.ball import ORDER, rounding
from rvlm.attacks.objective import Passes
from rvlm.attacks.retrieval import SGA, CoAttack, caption_sets, coattack, sga
from rvlm.data.captions import Captions
from rvlm.evaluation.cost import Cost
from rvlm.evaluation.evaluate import progress_bar
from rvlm.evaluation.metrics import clustered_share
from rvlm.markdown import markdown_table
from rvlm.models import Clip
from rvlm.ranks import Ranks
from rvlm.units import Eps

__all__ = ["KS", "Retrieval", "parse_retrieval_attack", "retrieval_cost", "retrieve"]

KS = (1, 5, 10)
TEXTS = 256  # captions that are encoded at once
ROWS = 1024  # of the matrix of similarities that is held at once


@dataclasses.dataclass
class Retrieval:
    """What `retrieve` found.

    Attributes:
        text_clean, text_adv: int64 [N], how many captions of others lie nearer to an image than its own nearest one.
        image_clean, image_adv: int64 [T], how many other images lie nearer to a caption than its own.
        rows: int64 [T], row of the image that a caption is of.
        linf, distance: |x_adv - x| [N], the largest pixel and in the threat's norm, in float64.
        outside: how far a pixel lies outside [0, 1].
        nonfinite: images whose embedding has NaN, clean or adversarial.
        cost: what was predicted that it costs, but for the captions.
        embedded: of the clean images [N, D] and of the captions [T, D], "images" and "texts", of the captions by the
            source, if there was one, "source_texts"; what another evaluation may take over.
        shared_captions: how many encodings of captions were taken over.
    """

    attack: str
    eps: Eps
    norm: str
    target: str
    seed: int
    batch_size: int
    resolution: list[int]
    text_clean: Tensor
    text_adv: Tensor
    image_clean: Tensor
    image_adv: Tensor
    rows: Tensor
    linf: Tensor
    distance: Tensor
    outside: float
    nonfinite: int
    seconds: float
    cost: Cost | None = None
    embedded: dict[str, Tensor] = dataclasses.field(default_factory=dict, repr=False)
    shared_captions: int = 0

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """{"clean"|"robust": {"text_r@1": {"v", "ci95", "n", "n_eff"}, ..., "image_r@10": ...}}.

        n_eff: what the interval takes for n.
        """
        found = {"clean": (self.text_clean, self.image_clean), "robust": (self.text_adv, self.image_adv)}
        return {
            which: {
                f"{kind}_r@{k}": _share(ranks < k, clusters)
                for kind, ranks, clusters in zip(("text", "image"), both, (None, self.rows), strict=True)
                for k in KS
            }
            for which, both in found.items()
        }

    @property
    def checks(self) -> list[dict]:
        slack = rounding(self.norm, 3 * self.resolution[0] * self.resolution[1])
        over = (self.distance - float(self.eps)).max().item()
        return [
            {"id": "eps_respected", "ok": over <= slack, "detail": f"largest excess over eps {over:.2e}"},
            {"id": "box_respected", "ok": self.outside <= 0, "detail": f"largest distance outside {self.outside:.2e}"},
            {
                "id": "embeddings_finite",
                "ok": not self.nonfinite,
                "detail": f"{self.nonfinite} images with NaN, ranked last",
            },
        ]

    def markdown(self, name: str) -> str:
        """A table in per cent."""
        titles = {"clean": "clean", "robust": f"{self.attack}, {self.norm} {self.eps}, {self.target}"}
        return markdown_table(
            [name, *self.metrics["clean"]],
            [
                [titles[which], *(f"{100 * m['v']:.1f}" for m in found.values())]
                for which, found in self.metrics.items()
            ],
        )


def parse_retrieval_attack(name: str) -> tuple[str, int]:
    """ "sga-10", "coattack-10" or "pgd-10" (SGA without scales) -> its name and its steps."""
    match = re.fullmatch(r"(pgd|sga|coattack)-(\d+)", name)
    if match is None:
        raise ValueError(f"unknown attack {name!r} on retrieval: expected pgd-STEPS, sga-STEPS or coattack-STEPS")
    return match[1], int(match[2])


def retrieval_cost(images: int, attack: str) -> Cost:
    """The cost of `retrieve`, but for encoding the captions once: every image is attacked, and seen clean and after."""
    kind, steps = parse_retrieval_attack(attack)
    settings = {"scales": ()} if kind == "pgd" else {}
    passes = CoAttack.passes(0, steps=steps) if kind == "coattack" else SGA.passes(0, steps=steps, **settings)
    passes += Passes(-1)  # nobody asks for the loss at the end
    return Cost(images, attack, ((attack, passes),), 0, (1.0,), "every image is attacked")


def retrieve(
    clip: Clip,
    data: Captions,
    *,
    attack: str = "sga-10",
    eps: str | float = "2/255",
    norm: str = "linf",
    source: Clip | None = None,
    batch_size: int = 100,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
    cost: Cost | None = None,
    clean: Retrieval | None = None,
) -> Retrieval:
    """Measures recall on clean and on adversarial images.

    Args:
        clip: the model.
        data: images with captions; the gallery is all of them. In a process group every process takes its share.
        attack: see `parse_retrieval_attack`.
        eps, norm, batch_size, seed, device, progress: as in `evaluate`.
        source: craft the images on this model instead (transfer).
        cost: what was predicted, for the result; None: what `retrieval_cost` says, without seconds.
        clean: a result of these models on these images and captions, of another radius, attack or target, whose
            embeddings of captions and clean images are taken over. The result is the same but for what it cost.

    Raises:
        ValueError: no images, a bad attack or eps, or `clean` of other images or captions.
    """
    if not len(data):
        raise ValueError(f"{data.name} has no images to evaluate")
    kind, steps = parse_retrieval_attack(attack)
    eps, ranks, began, n = Eps(eps).check(norm), Ranks(), time.perf_counter(), len(data)
    cost = cost or retrieval_cost(n, attack)
    resolution = list(data.batch(slice(0, 1))[0].shape[-2:])
    rows, made_on = data.rows, clip if source is None else source
    if clean is not None and (len(clean.linf) != n or not torch.equal(clean.rows, rows)):
        raise ValueError(f"clean must be of the {n} images and {len(rows)} captions of {data.name}, got other ones")
    embedded, shared = dict(clean.embedded) if clean is not None else {}, 0
    for role, model in (("texts", clip), ("source_texts", source)):
        if role in embedded and model is not None:
            shared += len(rows)
        elif model is not None:
            embedded[role] = _encode_texts(model, data.texts)
    texts = embedded["texts"]
    sets = caption_sets(texts if source is None else embedded["source_texts"], rows.to(texts.device), n)
    settings = {"scales": ()} if kind == "pgd" else {}
    parts: list[tuple[Tensor, ...]] = []
    mine = torch.arange(n).split(batch_size)[ranks.rank :: ranks.size]
    with progress_bar(progress and ranks.first, sum(map(len, mine)), attack) as bar:
        for chunk in mine:
            x, _, index = data.batch(chunk)
            x = x.to(device)
            x_adv = (coattack if kind == "coattack" else sga)(
                made_on.encode_pixels, x, sets[chunk.to(sets.device)], eps=float(eps), steps=steps, norm=norm,
                generator=torch.Generator().manual_seed(seed * 1000), sample_ids=index, **settings,
            )  # fmt: skip
            with scoring(clip):
                plain = clip.encode_pixels(x).float() if clean is None else embedded["images"][chunk]
                adv = clip.encode_pixels(x_adv).float()
            delta = (x_adv.double() - x.double()).flatten(1).cpu()
            outside = torch.stack([-x_adv.amin((1, 2, 3)), x_adv.amax((1, 2, 3)) - 1]).amax(0)
            moved = delta.abs().amax(1), delta.norm(ORDER[norm], dim=1), outside.cpu()
            parts.append((chunk, plain.cpu(), adv.cpu(), *moved))
            bar.update(len(chunk))
    everything = [part for theirs in ranks.gather(parts) for part in theirs]
    order, *columns = (torch.cat(column) for column in zip(*everything, strict=True))
    embedded["images"], adv, linf, distance, outside = (column[order.argsort()] for column in columns)
    texts = texts.float().cpu()
    text_clean, image_clean = _ranks(embedded["images"], texts, rows)
    text_adv, image_adv = _ranks(adv, texts, rows)
    return Retrieval(
        attack, eps, norm, "white-box" if source is None else "transfer", seed, batch_size, resolution,
        text_clean, text_adv, image_clean, image_adv, rows, linf, distance, max(outside.max().item(), 0.0),
        int((embedded["images"].isnan() | adv.isnan()).any(1).sum()), time.perf_counter() - began,
        dataclasses.replace(cost, shared=0 if clean is None else cost.clean), embedded, shared,
    )  # fmt: skip


def _encode_texts(clip: Clip, texts: list[str]) -> Tensor:
    with scoring(clip):
        return torch.cat([clip.encode_text(texts[t : t + TEXTS]) for t in range(0, len(texts), TEXTS)])


def _ranks(images: Tensor, texts: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of embeddings [N, D], [T, D]: how many captions of others lie nearer than the own ones [N], and how many other
    images nearer than the own [T]. "Not farther" instead of "nearer" is what makes ties, and NaN, count against it."""
    of_images, of_texts = [], []
    for chunk in torch.arange(len(images)).split(ROWS):
        similar, own = images[chunk] @ texts.T, rows == chunk[:, None]
        best = similar.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        of_images.append((~(similar < best) & ~own).sum(1))
    for chunk in torch.arange(len(texts)).split(ROWS):
        similar = texts[chunk] @ images.T
        own = similar.gather(1, rows[chunk, None])
        of_texts.append((~(similar < own)).sum(1) - 1)
    return torch.cat(of_images), torch.cat(of_texts)


def _share(right: Tensor, clusters: Tensor | None) -> dict[str, Any]:
    share, interval, size = clustered_share(right, clusters)
    return {"v": share, "ci95": interval, "n": len(right), "n_eff": size}
