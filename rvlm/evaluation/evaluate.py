"""Clean and robust accuracy of a classifier on a data set, in stages that see survivors only.

`white-box`: the attack sees all of the classifier that is scored. `transfer`: it sees another one, `source`, and its
images are scored on the classifier. A sample is robust if it is classified correctly when clean and after every stage.

Diagnostics act and stand in the record's checks: a stage on cross-entropy that meets gradients of exactly zero is
repeated on the margin loss, and a black-box stage that finds what gradients did not find is named.

Samples are cut into chunks of a fixed size, which for stages that keep their batches full may be several batches. Under
torchrun every process takes one chunk of a wave, and after the wave all know all results: how many processes there are
changes nothing but the time.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from rvlm import profiling
from rvlm.attacks import AttackResult, scoring
from rvlm.attacks.ball import ORDER, rounding
from rvlm.attacks.checks import are_probabilities
from rvlm.attacks.losses import margin
from rvlm.attacks.objective import Passes
from rvlm.attacks.search import PRECISIONS, check_choices
from rvlm.attacks.stages import Stage, parse_attack, usable
from rvlm.data import Data
from rvlm.evaluation.cost import Cost, Forecast, estimate
from rvlm.evaluation.metrics import reliability, wilson
from rvlm.evaluation.resume import Keeper, Tally
from rvlm.evaluation.saved import SavedImages
from rvlm.ranks import Ranks
from rvlm.units import Eps

__all__ = ["Evaluation", "evaluate", "parse_attack"]

ZERO_GRADIENTS = 0.1  # share of a stage's gradients above which it is repeated on the margin loss; the record says so
BLACK_BOX_GAIN = 0.002  # AutoAttack's threshold
AHEAD, CHUNKS = 4, 4  # batches of a chunk at most, and as many chunks at least, so that processes can share them
RANDOM = 1e-4  # of the largest logit, by which two passes of a deterministic model may differ
TOP = 3  # likeliest classes that are kept of every image
POINTS = 100  # intervals of a curve over steps, at most


@dataclasses.dataclass
class Evaluation:
    """What `evaluate` found: per-sample tensors [N], and what was spent. Rates are properties.

    Attributes:
        refused: sentences on stages that the number of classes rules out.
        resolution: [H, W] of the images that were attacked; the model may resize them in its graph.
        index, y: sample numbers and labels.
        pred_clean, pred_adv: predicted classes, -1 where the logits are NaN; pred_adv equals pred_clean where no stage
            attacked the sample.
        broken_by: number of the stage that fooled it, -1 robust, -2 wrong when clean.
        fooled_at: step of that stage whose iterate did so first (`rvlm.attacks.trace`), -1 where no stage
            did or its attack climbs no loss, and by transfer, where the attack does not see the classifier.
        top_clean, top_adv: the three likeliest classes [N, 3], likeliest first, -1 beyond the model's; of x_adv as
            pred_adv is.
        prob_clean, prob_adv: their probabilities [N, 3], a softmax of the logits; 0 where the logits are NaN.
        linf: largest |x_adv - x| of the sample, in float64.
        distance: |x_adv - x| in the threat's norm, in float64. Not the least that fools the model: stages of fab end a
            sample with its first image within eps.
        margin: largest other logit minus the label's, on x_adv.
        x_adv: adversarial images [K, 3, H, W] of the first K samples, all of them if they were asked for, None if none
            were (clean ones where no stage attacked).
        losses: for every stage its loss at every step, summed over the samples that it began with; a fooled sample
            keeps its loss of then. Empty where fooled_at is -1 for all.
        checks: list of {"id", "ok", "detail"}.
        quantize: levels of the images' grid, None: floats.
        cost: what was predicted that it costs, with the passes over clean images that another evaluation made.
        images: that were made before, if there was no attack.
        precision: of the attack; verdicts are in the classifier's own.
        disagreement: {"fooled_in_bf16_only", "fooled_in_fp32_only"}, of the images that searches in bf16 have kept.
        tally: sums over the samples.
    """

    attack: str
    stages: list[Stage]
    refused: list[str]
    eps: Eps
    norm: str
    target: str
    seed: int
    batch_size: int
    resolution: list[int]
    index: Tensor
    y: Tensor
    pred_clean: Tensor
    pred_adv: Tensor
    broken_by: Tensor
    fooled_at: Tensor
    top_clean: Tensor
    top_adv: Tensor
    prob_clean: Tensor
    prob_adv: Tensor
    linf: Tensor
    distance: Tensor
    margin: Tensor
    x_adv: Tensor | None
    checks: list[dict]
    forwards: int
    backwards: int
    seconds: float
    losses: list[list[float]] = dataclasses.field(default_factory=list)
    quantize: int | None = None
    images: SavedImages | None = None
    precision: str = "fp32"
    disagreement: dict[str, int] | None = None
    cost: Cost | None = None
    tally: Tally | None = None

    def __len__(self) -> int:
        return len(self.y)

    def stage_records(self) -> list[dict]:
        """The stages in a record; of a cascade, each with the precision that it ran in."""
        if self.precision != "cascade":
            return [stage.record() for stage in self.stages]
        return [stage.record() | {"precision": stage.precision("cascade")} for stage in self.stages]

    @property
    def n_clean(self) -> int:
        return int((self.broken_by != -2).sum())

    @property
    def n_robust(self) -> int:
        return int((self.broken_by == -1).sum())

    @property
    def clean(self) -> float:
        return self.n_clean / len(self)

    @property
    def robust(self) -> float:
        return self.n_robust / len(self)

    @property
    def clean_ci(self) -> tuple[float, float]:
        return wilson(self.n_clean, len(self))

    @property
    def robust_ci(self) -> tuple[float, float]:
        return wilson(self.n_robust, len(self))

    def over_steps(self, number: int) -> dict:
        """The curve of a stage.

        Returns:
            {"stage": its name, "loss": of its attack (None for fab, whose losses here are margins), "samples": that it
            began with, "broken": by it, "steps", and for each of those "fooled": how many were at that step or before,
            "mean_loss": over the samples, None where it is not finite}. At most 101 steps, evenly spaced, the start
            and the end among them; none where fooled_at is -1 for all.
        """
        losses = self.losses[number] if number < len(self.losses) else []
        stage, mine, last = self.stages[number], self.broken_by == number, len(losses) - 1
        n = int((mine | (self.broken_by > number) | (self.broken_by == -1)).sum())
        steps = sorted({round(last * k / POINTS) for k in range(POINTS + 1)}) if losses else []
        fooled = self.fooled_at[mine & (self.fooled_at >= 0)].bincount(minlength=len(losses)).cumsum(0)
        return {
            "stage": stage.name,
            "loss": stage.every_setting().get("loss") if losses else None,
            "samples": n,
            "broken": int(mine.sum()),
            "steps": steps,
            "fooled": fooled[steps].tolist(),
            "mean_loss": [losses[k] / n if math.isfinite(losses[k]) else None for k in steps],
        }

    def calibration(self) -> dict[str, dict]:
        """`reliability` of the clean and of the attacked images: the largest probability against the accuracy.

        A white-box attack ends where it fools the model, so that its images are not the most confidently wrong ones.
        """
        both = {"clean": (self.prob_clean, self.pred_clean), "robust": (self.prob_adv, self.pred_adv)}
        return {which: reliability(prob[:, 0], pred == self.y) for which, (prob, pred) in both.items()}


def evaluate(
    classifier: Callable[[Tensor], Tensor],
    data: Data,
    *,
    attack: str = "pgd-10",
    eps: str | float = "8/255",
    norm: str = "linf",
    source: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 100,
    seed: int = 0,
    device: str | torch.device = "cpu",
    keep_images: bool | int | str | Path = False,
    quantize: int | None = None,
    precision: str = "fp32",
    progress: bool = True,
    state: str | Path | None = None,
    images: SavedImages | None = None,
    cost: Cost | None = None,
    clean: Evaluation | None = None,
) -> Evaluation:
    """Evaluates a classifier under an attack.

    Args:
        classifier: pixels [B, 3, H, W] in [0, 1] -> logits [B, C].
        data: what to evaluate on.
        attack: name of an attack or several, "pgd-10", "autoattack", "apgd-ce,apgd-t"; see `rvlm.attacks.stages`.
        eps: radius in pixel units, "8/255" or 0.031.
        norm: "linf", "l2" or "l1".
        source: craft the images on this classifier instead (transfer).
        batch_size: images per forward. Verdicts of borderline samples may depend on it in fp32.
        seed: of the random starts, which are keyed by sample number.
        keep_images: keep x_adv in memory and return it; a number: of so many samples, the first of the data; a path: of
            all, in that file instead, which x_adv is a view of, and by the first process alone.
        quantize: 255 makes every adversarial image valid uint8.
        precision: of the attack: "fp32", "tf32", "bf16" or "cascade" (see `rvlm.attacks.pgd`). Images are scored by the
            classifier as it is.
        progress: show a bar.
        state: file to save progress in, at every chunk of a stage (at most once a second); an evaluation that finds
            one goes on there, with the same result. Delete it when it is no longer needed.
        images: score these, which were saved (`rvlm.evaluation.load_images`), instead of attacking; their facts say
            what attack, eps, norm, seed and quantize are. "white-box" if they were made on the classifier so, else
            "transfer". data are their samples (`SavedImages.samples`).
        cost: what was predicted, for the result; None: what `rvlm.evaluation.cost.estimate` says, without seconds.
        clean: an evaluation of this classifier on these samples, of another radius or attack, whose pass over the clean
            images is taken over. The result is the same but for what it cost: `Evaluation.forwards` lacks those passes.

    In a process group (see `rvlm.ranks`) every process calls this with the same arguments and gets the same result.

    Raises:
        ValueError: empty data, bad attack or eps, a classifier with fewer outputs than classes, a state file of
            another evaluation, or `clean` of other samples or batches.
    """
    check_choices(precision=(precision, [name for name in PRECISIONS if name is not None]))
    if not len(data):
        raise ValueError(f"{data.name} has no samples to evaluate")
    whole = keep_images is True or isinstance(keep_images, str | Path)
    if state is not None and whole:
        raise ValueError("keep_images holds images, which a state file does not save: choose one")
    if not whole and keep_images < 0:
        raise ValueError(f"keep_images must be True, False or a number of samples, or a path, got {keep_images}")
    if images is not None and (state is not None or source is not None):
        raise ValueError("saved images have their source already, and are scored too fast to need a state file")
    if clean is not None:
        same = len(clean) == len(data) and torch.equal(clean.index, data.index) and torch.equal(clean.y, data.y)
        if not same or clean.batch_size != batch_size:
            raise ValueError(
                f"clean must be of these {len(data)} samples in batches of {batch_size}, got an evaluation of "
                f"{'the same' if same else 'other'} samples in batches of {clean.batch_size}"
            )
    if images is None:
        stages, white_box = parse_attack(attack, norm), source is None
    else:
        stages, white_box = [images], images.white_box_of(classifier)
        attack, eps, norm, seed = (images.facts[name] for name in ("attack", "eps", "norm", "seed"))
        seed, quantize = int(seed), int(images.facts["quantize"]) or None
    eps = Eps(eps).check(norm)
    n, target = len(data), "white-box" if white_box else "transfer"
    shape = data.batch(slice(0, 1))[0].shape[1:]
    keep = n if whole else min(int(keep_images), n)
    none, nowhere = torch.full((n,), -1), torch.full((n, TOP), -1)
    cost = cost or estimate(n, attack, stages, len(data.class_names), norm, batch_size=batch_size)
    ranks = Ranks()
    result = Evaluation(
        attack, stages, [], eps, norm, target, seed, batch_size, list(shape[-2:]),
        data.index, data.y, pred_clean=none.clone(), pred_adv=none.clone(), broken_by=none.clone(),
        fooled_at=none.clone(), top_clean=nowhere.clone(), top_adv=nowhere.clone(),
        prob_clean=torch.zeros(n, TOP), prob_adv=torch.zeros(n, TOP),
        linf=torch.zeros(n, dtype=torch.float64), distance=torch.zeros(n, dtype=torch.float64), margin=torch.zeros(n),
        x_adv=_room(keep_images, (keep, *shape), ranks), checks=[], forwards=0, backwards=0, seconds=0.0,
        quantize=quantize, images=images, precision=precision,
    )  # fmt: skip
    keeper = Keeper(
        state if ranks.first else None, result, data, {"classifier": classifier, "source": source},
        {"quantize": quantize, "precision": precision, "kept_images": keep},
    )  # fmt: skip
    keeper.adopt(ranks.share(keeper.known()))
    tally, classes = keeper.tally, len(data.class_names)
    result.tally = tally

    def in_waves(chunks: Sequence[Tensor], work: Callable[[Tensor], _Part]) -> None:
        """The chunks that are left of a stage."""
        survived = sum(int((result.broken_by[rows] == -1).sum()) for rows in chunks[: tally.chunk])
        forecast.begin(tally.stage + 1, sum(map(len, chunks[tally.chunk :])), survived)
        bar.total = round(bar.n + forecast.left)
        while wave := chunks[tally.chunk : tally.chunk + ranks.size]:
            mine = work(wave[ranks.rank]) if ranks.rank < len(wave) else None
            with profiling.phase("bookkeeping", sum(map(len, wave))):
                for part in ranks.gather(mine)[: len(wave)]:
                    part.enter(result, tally)
                    forecast.saw(len(part.rows), part.units, int((~part.wrong).sum()))
                    bar.update(part.units)
                tally.chunk += len(wave)
                bar.total = round(bar.n + forecast.left)
                keeper.save_now_and_then()

    def looked(rows: Tensor) -> _Part:
        x, y, _ = data.batch(rows)
        first = not rows[0]  # the chunk on which the model itself is looked at
        return _scored(classifier, rows, x, x.to(device), y, norm, classes, keep, batch_size, look=first)

    def attacked(rows: Tensor) -> _Part:
        x, y, index = data.batch(rows)
        with profiling.phase(stage.name, len(rows)):
            found = stage(
                source or classifier,
                x.to(device),
                y.to(device),
                transfer=not white_box,
                slots=batch_size,
                repeats=tally.varies == 0,
                eps=float(eps),
                norm=norm,
                # One seed per restart; stages that differ in the loss alone start from the same points.
                generator=torch.Generator().manual_seed(seed * 1000 + stage.restart),
                sample_ids=index,
                quantize=quantize,
                precision=None if precision == "fp32" else precision,
            )
        part = _scored(classifier, rows, x, found.x_adv, y, norm, classes, keep, batch_size)
        part.spent(found)
        if white_box:
            part.follow(found)
            part.disagreements = int(((part.pred != y) != found.success.cpu()).sum())
        return part

    def units(stages: list[Stage]) -> list[int]:
        """Of an image in each stage, with the pass that scores it; the clean pass first."""
        return [1, *(stage.passes(tally.classes or classes, norm).units + 1 for stage in stages)]

    forecast = Forecast(units(tally.stages or stages))
    already = Passes(result.forwards, result.backwards).units
    with progress_bar(progress and ranks.first, n * sum(forecast.costs), attack, already) as bar:
        if tally.stage < 0:
            if clean is not None and not tally.chunk:
                _take_over(result, clean, data, cost.clean)
            else:
                in_waves(torch.arange(n).split(batch_size), looked)
                tally.clean_nonfinite = tally.nonfinite
            tally.stages, result.refused = usable(stages, tally.classes)
            tally.stage, tally.chunk = 0, 0
            keeper.save()
        result.stages = tally.stages
        forecast.costs = units(tally.stages)
        while tally.stage < len(tally.stages):
            stage = tally.stages[tally.stage]
            # Those that this stage has broken already were its survivors, too.
            survivors = ((result.broken_by == -1) | (result.broken_by == tally.stage)).nonzero().flatten()
            batches = min(AHEAD, max(1, len(survivors) // (CHUNKS * batch_size))) if stage.refills else 1
            # split gives one empty chunk of none
            chunks = survivors.split(batches * batch_size) if len(survivors) else ()
            in_waves(chunks, attacked)
            if tally.zeros > ZERO_GRADIENTS * tally.gradients:
                tally.vanished.append(f"{stage.name}: {tally.zeros / tally.gradients:.0%}")
                if (switched := _on_the_margin(stage)) is not None:
                    tally.stages.insert(tally.stage + 1, switched)
                    forecast.costs = units(tally.stages)
            tally.stage, tally.chunk, tally.zeros, tally.gradients = tally.stage + 1, 0, 0, 0
            keeper.save()
            bar.set_postfix({"clean": f"{result.clean:.1%}", "robust": f"{result.robust:.1%}"})
        bar.total = bar.n
    result.losses, result.cost = tally.losses, dataclasses.replace(cost, shared=tally.shared)
    result.checks = _checks(result, tally, rounding(norm, shape.numel()))
    if images is not None and not white_box:
        result.checks.append(images.as_transfer(result.broken_by != -2))
    if precision in ("bf16", "cascade"):
        result.disagreement = {"fooled_in_bf16_only": tally.bf16_only, "fooled_in_fp32_only": tally.fp32_only}
    result.seconds = keeper.seconds()
    return result


@dataclasses.dataclass
class _Part:
    """What one process found on one chunk; tensors are on the CPU."""

    rows: Tensor
    pred: Tensor
    wrong: Tensor
    top: Tensor
    prob: Tensor
    margin: Tensor
    linf: Tensor
    distance: Tensor
    x_adv: Tensor
    classes: int
    outside: float
    nonfinite: int
    forwards: int
    backwards: int = 0
    zeros: int = 0
    disagreements: int = 0
    bf16_only: int = 0
    fp32_only: int = 0
    varies: float = 0.0
    probabilities: bool = False
    fooled_at: Tensor | int = -1
    losses: list[float] = dataclasses.field(default_factory=list)

    @property
    def units(self) -> int:
        return Passes(self.forwards, self.backwards).units

    def look_at_the_model(self, logits: Tensor, again: Tensor) -> None:
        """Whether two passes over the same images agree, and whether the outputs are probabilities."""
        first, second = logits.nan_to_num(0, 0, 0), again.nan_to_num(0, 0, 0)
        self.forwards += len(first)
        self.varies = (first - second).abs().max().item() / max(1.0, first.abs().max().item())
        self.probabilities = are_probabilities(first)

    def spent(self, found: AttackResult) -> None:
        """Adds what the attack cost."""
        self.forwards += found.forwards
        self.backwards, self.zeros = found.backwards, found.zero_gradients
        self.bf16_only, self.fp32_only = found.fooled_in_bf16_only, found.fooled_in_fp32_only

    def follow(self, found: AttackResult) -> None:
        """Takes over which step fooled whom, and the losses; a verdict that re-scoring made is the last step's."""
        if found.trace is None:
            return
        self.losses = found.trace.sums().tolist()
        at = found.trace.fooled_at.cpu()
        self.fooled_at = torch.where(self.wrong, torch.where(at < 0, len(self.losses) - 1, at), -1)

    def enter(self, result: Evaluation, tally: Tally) -> None:
        """Writes it into what is known so far."""
        rows = self.rows
        if tally.stage < 0:
            tally.classes, result.pred_clean[rows] = self.classes, self.pred
            result.top_clean[rows], result.prob_clean[rows] = self.top, self.prob
            tally.varies = max(tally.varies, self.varies)
            tally.probabilities |= self.probabilities
        result.pred_adv[rows], result.margin[rows] = self.pred, self.margin
        result.linf[rows], result.distance[rows] = self.linf, self.distance
        result.broken_by[rows] = torch.where(self.wrong, tally.stage if tally.stage >= 0 else -2, -1)
        result.fooled_at[rows], result.top_adv[rows], result.prob_adv[rows] = self.fooled_at, self.top, self.prob
        if result.x_adv is not None and len(self.x_adv):
            result.x_adv[rows[rows < len(result.x_adv)]] = self.x_adv
        if tally.stage >= 0:
            tally.add_losses(self.losses)
        result.forwards += self.forwards
        result.backwards += self.backwards
        tally.gradients, tally.zeros = tally.gradients + self.backwards, tally.zeros + self.zeros
        tally.nonfinite += self.nonfinite
        tally.disagreements += self.disagreements
        tally.bf16_only, tally.fp32_only = tally.bf16_only + self.bf16_only, tally.fp32_only + self.fp32_only
        tally.over = max(tally.over, (self.distance - float(result.eps)).max().item())
        tally.outside = max(tally.outside, self.outside)


def _take_over(result: Evaluation, clean: Evaluation, data: Data, passes: int) -> None:
    """The pass over clean images from another evaluation. Of samples that are right the margin is of an attacked image,
    and the first stage replaces it."""
    for column in ("pred", "top", "prob"):
        found = getattr(clean, f"{column}_clean")
        getattr(result, f"{column}_clean").copy_(found)
        getattr(result, f"{column}_adv").copy_(found)
    result.margin.copy_(clean.margin)
    result.broken_by.copy_(clean.broken_by.clamp(max=-1))
    if result.x_adv is not None:
        for rows in torch.arange(len(result.x_adv)).split(result.batch_size):
            result.x_adv[rows] = data.batch(rows)[0]
    tally, theirs = result.tally, clean.tally
    tally.classes, tally.varies, tally.probabilities = theirs.classes, theirs.varies, theirs.probabilities
    tally.nonfinite = tally.clean_nonfinite = theirs.clean_nonfinite
    tally.shared = passes


def _room(keep_images: bool | int | str | Path, shape: tuple[int, ...], ranks: Ranks) -> Tensor | None:
    """For images fp32, in memory or in a file, whose place on the disk is taken at once; None for none of them."""
    if not isinstance(keep_images, str | Path):
        return torch.zeros(shape) if shape[0] else None
    if not ranks.first:
        return None
    with open(keep_images, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, 4 * math.prod(shape))
    return torch.from_file(str(keep_images), shared=True, size=math.prod(shape)).view(shape)


def _scored(
    classifier,
    rows: Tensor,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    norm: str,
    classes: int,
    keep: int,
    batch_size: int,
    look: bool = False,
) -> _Part:
    """Scores images (x itself, or what an attack made of it) on the classifier."""
    with profiling.phase("scoring", len(rows)):
        logits = torch.cat([logits_of(classifier, batch, classes) for batch in x_adv.split(batch_size)])
        again = logits_of(classifier, x_adv, classes) if look else None
        x_adv = x_adv.cpu()
        pred, nonfinite = predictions(logits)
        delta = (x_adv.double() - x.double()).flatten(1)
        part = _Part(
            rows, pred, pred != y, *_likeliest(logits), margin(logits, y), delta.abs().amax(1),
            delta.norm(ORDER[norm], dim=1), x_adv[rows < keep], classes=logits.shape[1],
            outside=max(-x_adv.min().item(), x_adv.max().item() - 1), nonfinite=nonfinite, forwards=len(rows),
        )  # fmt: skip
        if look:
            part.look_at_the_model(logits, again)
        return part


def _checks(result: Evaluation, tally: Tally, slack: float) -> list[dict]:
    vanished = ", ".join(tally.vanished)
    hidden = ": something hides them, so attack with BPDA or a black box"
    lines = [
        ("eps_respected", tally.over <= slack, f"largest excess over eps {tally.over:.2e}"),
        ("box_respected", tally.outside <= 0, f"largest distance outside [0, 1] {max(tally.outside, 0.0):.2e}"),
        ("logits_finite", tally.nonfinite == 0, f"{tally.nonfinite} images with NaN logits, counted as wrong"),
        (
            "deterministic",
            tally.varies <= RANDOM,
            f"two passes over the same images differ by {tally.varies:.1g} of the largest logit"
            + ("" if tally.varies <= RANDOM else ": attack its mean (autoattack-rand), else it looks robust"),
        ),
        (
            "outputs_are_logits",
            not tally.probabilities,
            "outputs are probabilities: a softmax inside the model hides gradients"
            if tally.probabilities
            else "outputs are no probabilities",
        ),
        ("verdict_rescored", not tally.disagreements, f"{tally.disagreements} verdicts changed when re-scored"),
        (
            "gradients_nonzero",
            not vanished,
            f"gradients that are zero in every pixel, {vanished or 'hardly any'}" + (hidden if vanished else ""),
        ),
    ]
    return [*({"id": id, "ok": ok, "detail": detail} for id, ok, detail in lines), _black_box(result)]


def _on_the_margin(stage: Stage) -> Stage | None:
    """The stage again on the margin loss, whose gradient does not vanish where a softmax is certain."""
    if stage.attack not in ("pgd", "mifgsm", "apgd") or stage.settings.get("loss", "ce") != "ce":
        return None
    return dataclasses.replace(stage, name=f"{stage.name}-margin", settings=stage.settings | {"loss": "margin"})


def _black_box(result: Evaluation) -> dict:
    """Square must find next to nothing that gradients did not: AutoAttack's sign of gradients that mislead."""
    seen, gain = False, 0
    for number, stage in enumerate(result.stages):
        if stage.attack == "square":
            gain += int((result.broken_by == number).sum()) if seen else 0
        else:
            seen = True
    share = gain / len(result)
    detail = f"a black-box attack broke {share:.1%} of the samples that attacks with gradients had left"
    return {"id": "black_box_gain", "ok": share <= BLACK_BOX_GAIN, "detail": detail}


def logits_of(classifier: Callable[[Tensor], Tensor], x: Tensor, classes: int) -> Tensor:
    with scoring(classifier), profiling.phase("forward", len(x)):
        logits = classifier(x)
    if logits.dim() != 2 or len(logits) != len(x) or logits.shape[1] < classes:
        raise ValueError(f"the classifier must return logits [{len(x)}, {classes}], got {list(logits.shape)}")
    return logits.float().cpu()


def predictions(logits: Tensor) -> tuple[Tensor, int]:
    """Classes [B], -1 (so never right) where a logit is NaN, and how many of those. -inf is a masked class."""
    broken = logits.isnan().any(1)
    return torch.where(broken, -1, logits.argmax(1)), int(broken.sum())


def _likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Classes [B, TOP] and their probabilities; -1 and 0 where there are no more, or a logit is NaN."""
    prob, top = logits.softmax(1).topk(min(TOP, logits.shape[1]))
    known, lacking = prob.isfinite(), (0, TOP - prob.shape[1])
    return F.pad(torch.where(known, top, -1), lacking, value=-1), F.pad(torch.where(known, prob, 0.0), lacking)


def progress_bar(shown: bool, total: int, title: str, already: int = 0):
    """Counts passes through the model (`Passes.units`), so that the time left follows from their measured rate."""
    from tqdm import tqdm

    return tqdm(
        total=total, initial=already, desc=title, disable=not shown, unit="pass", unit_scale=True, mininterval=0.5
    )
