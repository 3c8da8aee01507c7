"""Figures. Each writes its numbers as CSV beside the PNG. Colours are Okabe and Ito's, safe for the colour-blind."""

import csv
import io
import math
import textwrap
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from rvlm.evaluation.transfer import TransferMatrix
from rvlm.files import write_bytes
from rvlm.units import Eps

__all__ = [
    "accuracy_over_eps", "accuracy_over_steps", "bars", "heat_map", "hypervolume", "image_grid", "maps", "pareto",
    "reliability_curves", "training_curves", "transfer_heat_map", "words_grid",
]  # fmt: skip

PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
RIGHT, WRONG = "#00704F", "#B34700"
MARKERS = "osD^vPX"
PLAIN_TEXT = {"text.parse_math": False}  # a "$" in a class or model name is a dollar sign, not a formula


@rc_context(PLAIN_TEXT)
def accuracy_over_eps(
    path: str | Path, curves: dict[str, list[tuple[str, float, float, float]]], title: str = "Accuracy under attack"
) -> Path:
    """Robust accuracy over the radius, with intervals.

    Args:
        path: PNG to write.
        curves: name -> points (eps as text, accuracy, lower, upper), fractions; bounds may be NaN.
        title: heading.
    """
    figure = Figure(figsize=(6.4, 4.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    ticks = sorted({point[0] for points in curves.values() for point in points}, key=Eps)
    for k, (name, points) in enumerate(curves.items()):
        points = sorted(points, key=lambda point: Eps(point[0]))
        x = [float(Eps(point[0])) for point in points]
        mean, low, high = ([100 * point[j] for point in points] for j in (1, 2, 3))
        colour, marker = _look(k)
        axes.plot(x, mean, color=colour, marker=marker, label=_short(name), linewidth=2)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xticks([float(Eps(tick)) for tick in ticks], ticks)
    axes.set(xlabel="eps (pixel range [0, 1])", ylabel="accuracy, %", ylim=(-3, 103))
    _finish(title, axes)
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    rows = [[name, *point] for name, points in curves.items() for point in points]
    return _write(path, figure, ["name", "eps", "accuracy", "ci_low", "ci_high"], rows)


@rc_context(PLAIN_TEXT)
def accuracy_over_steps(path: str | Path, curves: dict[str, list[tuple]], title: str = "Accuracy over steps") -> Path:
    """Robust accuracy and the attack's loss over its steps, counted on through its stages.

    Args:
        path: PNG to write.
        curves: name -> points (stage, step, accuracy, mean loss); accuracies are fractions, losses may be NaN. Losses
            of two stages are not joined, since each stage has its own.
        title: heading.
    """
    figure = Figure(figsize=(6.4, 6.4), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for k, (name, points) in enumerate(curves.items()):
        colour, marker = _look(k)
        look = dict(color=colour, marker=marker, markersize=4, markevery=max(1, len(points) // 12))
        upper.plot([p[1] for p in points], [100 * p[2] for p in points], label=_short(name), linewidth=2, **look)
        for stage in dict.fromkeys(p[0] for p in points):
            own = [p for p in points if p[0] == stage]
            lower.plot([p[1] for p in own], [p[3] for p in own], linewidth=1.5, **look)
    upper.set(ylabel="accuracy, %", ylim=(-3, 103))
    lower.set(xlabel="steps of the attack", ylabel="mean loss")
    upper.xaxis.get_major_locator().set_params(integer=True)  # lower shares it
    _finish(title, upper, lower)
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    rows = [[name, *point] for name, points in curves.items() for point in points]
    return _write(path, figure, ["name", "stage", "step", "accuracy", "mean_loss"], rows)


@rc_context(PLAIN_TEXT)
def reliability_curves(
    path: str | Path, found: dict[str, dict[str, dict]], title: str = "Confidence and accuracy"
) -> Path:
    """Accuracy against confidence on clean and on attacked images; on the diagonal a model is as right as it is sure.

    Args:
        path: PNG to write.
        found: name -> {"clean", "robust"}, each as `rvlm.evaluation.metrics.reliability` gives it.
        title: heading.
    """
    figure = Figure(figsize=(6.4, 4.0 + 0.2 * len(found)), dpi=150, layout="constrained")
    both = {"clean": "clean", "robust": "attacked"}
    rows = []
    for axes, (which, heading) in zip(figure.subplots(1, 2, sharey=True), both.items(), strict=True):
        axes.plot([0, 100], [0, 100], color="#888888", linewidth=1)
        for k, (name, bins) in enumerate((name, own[which]) for name, own in found.items()):
            columns = zip(bins["n"], bins["right"], bins["confidence"], strict=True)
            points = [(sure / n, right / n, n) for n, right, sure in columns if n]
            colour, marker = _look(k)
            x, y = ([100 * point[j] for point in points] for j in (0, 1))
            axes.plot(x, y, color=colour, marker=marker, markersize=5)
            rows += [[name, heading, bins["ece"], *point] for point in points]
        axes.set(xlabel="confidence, %", xlim=(-3, 103), ylim=(-3, 103))
        axes.set_title(heading, fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for k, (name, own) in enumerate(found.items()):
        errors = ", ".join(f"{heading} {100 * own[which]['ece']:.1f} %" for which, heading in both.items())
        colour, marker = _look(k)
        figure.axes[0].plot([], [], color=colour, marker=marker, label=f"{_short(name)}: ECE {errors}")
    figure.axes[0].set_ylabel("accuracy, %")
    figure.suptitle(_lines(title), fontsize=11, x=0.01, ha="left")
    figure.legend(frameon=False, loc="outside lower center", fontsize=9)
    return _write(path, figure, ["name", "images", "ece", "confidence", "accuracy", "samples"], rows)


@rc_context(PLAIN_TEXT)
def words_grid(
    path: str | Path, clean: Tensor, change: Tensor, labels: list[str], words_clean: list, words_adversarial: list,
    title: str = "Images and words",
) -> Path:  # fmt: skip
    """A row for each image: clean, its change magnified around grey, adversarial, with the model's likeliest words.

    Args:
        path: PNG to write.
        clean, change: pixels [N, 3, H, W] in [0, 1], and what the attack adds to them.
        labels: N true classes.
        words_clean, words_adversarial: N lists of (word, probability), likeliest first.
        title: heading; the factor on the change, one for all, stands over its column.
    """
    magnified, factor = _magnified(change)
    figure = Figure(figsize=(6.4, 0.9 + 2.6 * len(clean)), dpi=110, layout="constrained")  # noise makes large files
    grid = figure.subplots(len(clean), 3, squeeze=False)
    for k, axes_of_row in enumerate(grid):
        pictures = (clean[k], magnified[k], clean[k] + change[k])
        for axes, picture, words in zip(
            axes_of_row, pictures, (words_clean[k], None, words_adversarial[k]), strict=True
        ):
            _show(axes, picture)
            if words is None:
                label = f"label: {textwrap.shorten(labels[k], 24, placeholder='…')}"
                axes.set_xlabel(label if change[k].any() else f"{label}\n(not changed)", fontsize=10)
            else:
                said = [f"{100 * p:.1f} % {textwrap.shorten(word, 20, placeholder='…')}" for word, p in words]
                right = bool(words) and words[0][0] == labels[k]
                text = "\n".join([f"{'✓' if right else '✗'} {said[0] if said else 'no answer'}", *said[1:]])
                axes.set_xlabel(text, fontsize=10, color=RIGHT if right else WRONG)
    for axes, heading in zip(grid[0], ("clean", f"change × {factor}", "adversarial"), strict=True):
        axes.set_title(heading, fontsize=10)
    figure.suptitle(_lines(title), fontsize=11, x=0.01, ha="left")
    rows = [
        [k, labels[k], which, place + 1, word, p]
        for k in range(len(clean))
        for which, words in (("clean", words_clean[k]), ("adversarial", words_adversarial[k]))
        for place, (word, p) in enumerate(words)
    ]
    return _write(path, figure, ["image", "label", "which", "place", "word", "probability"], rows)


@rc_context(PLAIN_TEXT)
def image_grid(
    path: str | Path,
    clean: Tensor,
    adversarial: Tensor,
    labels: list[str],
    words_clean: list[str],
    words_adversarial: list[str],
    magnify: float | None = None,
) -> Path:
    """Rows of clean image, magnified perturbation and adversarial image, with what the model says to each.

    Args:
        path: PNG to write.
        clean, adversarial: pixels [N, 3, H, W] in [0, 1].
        labels: N true classes.
        words_clean, words_adversarial: N answers of the model; a word that equals the label counts as right.
        magnify: factor on the perturbation, shown around grey; None fills the range.
    """
    n = len(clean)
    if clean.shape != adversarial.shape or not 0 < n == len(labels) == len(words_clean) == len(words_adversarial):
        raise ValueError(
            f"image_grid needs as many adversarial images, labels and words as clean images, and at least one: got "
            f"clean {list(clean.shape)}, adversarial {list(adversarial.shape)}, {len(labels)} labels, "
            f"{len(words_clean)} and {len(words_adversarial)} words"
        )
    magnified, factor = _magnified(adversarial - clean, magnify)
    columns = [clean, magnified, adversarial]
    titles = ["clean", f"perturbation × {factor}", "adversarial"]
    figure = Figure(figsize=(1.35 * n + 0.6, 5.0), dpi=150, layout="constrained")
    grid = figure.subplots(3, n, squeeze=False)
    for row, (pixels, title) in enumerate(zip(columns, titles, strict=True)):
        for k in range(n):
            axes = grid[row][k]
            _show(axes, pixels[k])
            if k == 0:
                axes.set_ylabel(title, fontsize=10)
            if row != 1:
                word = (words_clean if row == 0 else words_adversarial)[k]
                right = word == labels[k]
                axes.set_xlabel(_answer(word, right), fontsize=10, color=RIGHT if right else WRONG)
    rows = list(zip(labels, words_clean, words_adversarial, strict=True))
    return _write(path, figure, ["label", "clean", "adversarial"], rows)


@rc_context(PLAIN_TEXT)
def transfer_heat_map(path: str | Path, matrix: TransferMatrix) -> Path:
    """Accuracy of every target (columns) on clean images and on those of every source (rows), in per cent."""
    shares = torch.cat([matrix.clean[None], matrix.robust])
    return heat_map(
        path, shares, ["(clean)", *matrix.sources], matrix.targets, ylabel="images of", xlabel="scored on",
        title=f"accuracy %, {matrix.attack}, {matrix.norm} {matrix.eps}", percent=True,
    )  # fmt: skip


@rc_context(PLAIN_TEXT)
def heat_map(
    path: str | Path, values: Tensor, rows: list[str], columns: list[str], *, ylabel: str, xlabel: str, title: str,
    percent: bool = False,
) -> Path:  # fmt: skip
    """A matrix with its numbers in its cells. percent: shares are shown as per cent, 0 to 100."""
    shown = (100 * values if percent else values).float()
    known = shown[shown.isfinite()] if shown.isfinite().any() else torch.zeros(1)
    low, high = (0.0, 100.0) if percent else (float(known.min()), float(known.max()))
    wide = 1.1 if len(columns) <= 8 else 0.6
    figure = Figure(figsize=(3.0 + wide * len(columns), 2.0 + wide / 2 * len(rows)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shown.numpy(), cmap="cividis", vmin=low, vmax=high, aspect="auto")
    for row, line in enumerate(shown.tolist()):
        for column, value in enumerate(line):
            colour = "white" if value <= (low + high) / 2 else "black"  # black for NaN
            text = f"{value:.1f}" if percent else f"{value:.2f}"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=10 if wide > 1 else 8)
    axes.set_xticks(range(len(columns)), [_short(name) for name in columns], rotation=20, ha="right")
    axes.set_yticks(range(len(rows)), [_short(name) for name in rows])
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(_lines(title), loc="left", fontsize=11)
    axes.spines[:].set_visible(False)
    table = [[name, *line] for name, line in zip(rows, values.tolist(), strict=True)]
    return _write(path, figure, [ylabel, *columns], table)


@rc_context(PLAIN_TEXT)
def bars(path: str | Path, values: dict[str, list[float]], names: list[str], title: str, ylabel: str) -> Path:
    """Groups of bars: a group for each of `names`, a colour for each key of `values`."""
    wide = max(4.5, 2.5 + 0.55 * len(names) * max(1, len(values) / 2))
    figure = Figure(figsize=(wide, 4.0), dpi=150, layout="constrained")
    axes, width = figure.add_subplot(), 0.8 / len(values)
    for k, (label, heights) in enumerate(values.items()):
        places = [j + (k - (len(values) - 1) / 2) * width for j in range(len(names))]
        hatch = "//" if k // len(PALETTE) % 2 else None
        axes.bar(places, heights, width, color=_look(k)[0], edgecolor="white", hatch=hatch, label=_short(label))
    axes.set_xticks(range(len(names)), [_short(name) for name in names], rotation=20, ha="right")
    axes.set(ylabel=ylabel)
    _finish(title, axes, grid="y")
    if len(values) > 1:
        figure.legend(frameon=False, loc="outside lower center", ncols=min(len(values), 4))
    rows = [[name, *(heights[j] for heights in values.values())] for j, name in enumerate(names)]
    return _write(path, figure, ["", *values], rows)


@rc_context(PLAIN_TEXT)
def pareto(path: str | Path, points: dict[str, tuple[float, float]], title: str) -> Path:
    """Clean against robust accuracy, with names; a line joins those that no other beats in both, and the area under it
    from 0 on, the hypervolume, is said below.

    Args:
        path: PNG to write.
        points: name -> (clean, robust), fractions.
        title: heading.
    """
    figure = Figure(figsize=(6.4, 4.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    best = sorted(point for point in points.values() if not any(_beats(other, point) for other in points.values()))
    axes.step(
        *([100 * point[j] for point in best] for j in (0, 1)), where="pre", color="#888888", linewidth=1, zorder=1
    )
    for k, (name, (clean, robust)) in enumerate(points.items()):
        colour, marker = _look(k)
        axes.plot(100 * clean, 100 * robust, marker, color=colour, markersize=8, label=_short(name))
    axes.set(xlabel=f"clean, %\n(hypervolume {hypervolume(best):.3f})", ylabel="robust, %")
    axes.margins(0.12)
    _finish(title, axes)
    figure.legend(frameon=False, loc="outside lower center", ncols=2, fontsize=9)
    rows = [[name, *point, point in best] for name, point in points.items()]
    return _write(path, figure, ["name", "clean", "robust", "undominated"], rows)


def hypervolume(points: list[tuple[float, float]]) -> float:
    """The area that points (clean, robust), fractions, dominate from (0, 0) on: 1 is both everywhere right."""
    area, reached = 0.0, 0.0
    for clean, robust in sorted(points, key=lambda point: -point[1]):
        area += max(clean - reached, 0.0) * robust
        reached = max(reached, clean)
    return area


def _beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a != b and a[0] >= b[0] and a[1] >= b[1]


@rc_context(PLAIN_TEXT)
def training_curves(path: str | Path, histories: dict[str, list[dict]], title: str = "Training") -> Path:
    """Loss and accuracies by epoch, counted through all stages of a run.

    Args:
        path: PNG to write.
        histories: name of a run -> rows of its metrics.jsonl.
        title: heading.
    """
    figure = Figure(figsize=(6.4, 6.4), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    styles = {"robust_acc": "-", "clean_acc": "--", "val_robust": "-.", "val_clean": ":"}
    seen = [key for key in styles if any(key in row for rows in histories.values() for row in rows)]
    for k, (name, history) in enumerate(histories.items()):
        colour, marker = _look(k)
        x = range(1, len(history) + 1)
        losses = [row.get("loss", math.nan) for row in history]
        upper.plot(x, losses, color=colour, marker=marker, markersize=4, label=_short(name))
        for key in seen:
            y = [100 * row.get(key, math.nan) for row in history]
            lower.plot(x, y, styles[key], color=colour, marker=marker, markersize=4)
    for key in seen:
        lower.plot([], [], styles[key], color="#555555", label=key)
    upper.set(ylabel="loss")
    lower.set(xlabel="epoch", ylabel="accuracy, %", ylim=(-3, 103))
    upper.xaxis.get_major_locator().set_params(integer=True)  # lower shares it
    _finish(title, upper, lower)
    figure.legend(frameon=False, loc="outside lower center", ncols=4, fontsize=9)
    rows = [
        [name, j + 1, row.get("name", row.get("stage", "")), row.get("loss"), *(row.get(key) for key in seen)]
        for name, history in histories.items()
        for j, row in enumerate(history)
    ]
    return _write(path, figure, ["name", "epoch", "stage", "loss", *seen], rows)


@rc_context(PLAIN_TEXT)
def maps(path: str | Path, rows: dict[str, list[Tensor]], columns: list[str], title: str) -> Path:
    """Pictures in a grid: [h, w] in false colours, each row on one scale, or [3, h, w] as images."""
    figure = Figure(figsize=(1.5 * len(columns) + 1.2, 1.6 * len(rows) + 0.6), dpi=150, layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    table = []
    for axes_of_row, (name, pictures) in zip(grid, rows.items(), strict=True):
        flat = [p for p in pictures if p.dim() == 2]
        low, high = (float(torch.stack(flat).min()), float(torch.stack(flat).max())) if flat else (0.0, 1.0)
        for axes, picture, column in zip(axes_of_row, pictures, columns, strict=True):
            if picture.dim() == 3:
                _show(axes, picture)
            else:
                axes.imshow(picture.numpy(), cmap="cividis", vmin=low, vmax=high, interpolation="nearest")
                table += [[name, column, h, *line] for h, line in enumerate(picture.tolist())]
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        axes_of_row[0].set_ylabel(name, fontsize=9)
    for axes, column in zip(grid[0], columns, strict=True):
        axes.set_title(column, fontsize=9)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return _write(path, figure, ["row", "column", "line", "values"], table)


def _finish(title: str, *axes: Axes, grid: str = "both") -> None:
    """A title over the first, on all of them a light grid and no frame above and on the right."""
    axes[0].set_title(_lines(title), loc="left", fontsize=11)
    for own in axes:
        own.grid(alpha=0.3, axis=grid)
        own.spines[["top", "right"]].set_visible(False)


def _look(k: int) -> tuple[str, str]:
    """Colour and marker of the k-th curve; the 8th has the first colour again, and another marker."""
    return PALETTE[k % len(PALETTE)], MARKERS[(k + k // len(PALETTE)) % len(MARKERS)]


def _lines(title: str) -> str:
    """A title in lines that fit the narrowest figure."""
    return textwrap.fill(title, width=68, break_on_hyphens=False)


def _short(name: str) -> str:
    """The end of a long name, which tells folders apart."""
    return name if len(name) <= 24 else "…" + name[-23:]


def pick_rows(broken_by: Tensor, y: Tensor, most: int = 8) -> Tensor:
    """Up to `most` rows for a picture: fooled ones first, of different classes as far as there are."""
    order = torch.cat([(broken_by >= 0).nonzero().flatten(), (broken_by == -1).nonzero().flatten()]).tolist()
    seen: set[int] = set()
    first = [row for row in order if not (int(y[row]) in seen or seen.add(int(y[row])))]
    return torch.tensor((first + [row for row in order if row not in set(first)])[:most], dtype=torch.int64)


def class_words(class_names: list[str], classes: Tensor) -> list[str]:
    """Names of predicted classes; an output beyond the names, or -1 for no answer, is shown as its number."""
    return [class_names[c] if 0 <= c < len(class_names) else str(c) for c in classes.tolist()]


def _magnified(change: Tensor, factor: float | None = None) -> tuple[Tensor, str]:
    """Changes around grey, all by one factor, and that factor in words; None fills the range."""
    factor = 0.5 / (change.abs().max().item() or 0.5) if factor is None else factor
    return 0.5 + factor * change, f"{round(factor, 0 if factor >= 10 else 1):g}"


def _show(axes: Axes, pixels: Tensor) -> None:
    """An image [3, H, W], cut to [0, 1], without a frame."""
    axes.imshow(pixels.clamp(0, 1).permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _answer(word: str, right: bool) -> str:
    """A word with its sign, in at most two lines that are as narrow as an image; the CSV has it in full."""
    return textwrap.fill(f"{'✓' if right else '✗'} {word}", width=17, max_lines=2, placeholder="…")


def _write(png: str | Path, figure: Figure, header: list[str], rows: list) -> Path:
    """Writes the figure and, beside it, its numbers."""
    picture, table = io.BytesIO(), io.StringIO(newline="")
    figure.savefig(picture, format="png")
    csv.writer(table).writerows([header, *rows])
    write_bytes(Path(png).with_suffix(".csv"), table.getvalue().encode())
    return write_bytes(png, picture.getvalue())
