"""Figures. Each writes its numbers as CSV beside the PNG. Colours are Okabe and Ito's, safe for the colour-blind."""

import csv
import io
import textwrap
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from rvlm.evaluation.transfer import TransferMatrix
from rvlm.files import write_bytes
from rvlm.units import Eps

__all__ = ["accuracy_over_eps", "image_grid", "transfer_heat_map"]

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
        curves: name -> points (eps as text, accuracy, lower, upper), fractions.
        title: heading.
    """
    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    ticks = sorted({point[0] for points in curves.values() for point in points}, key=Eps)
    for k, (name, points) in enumerate(curves.items()):
        points = sorted(points, key=lambda point: Eps(point[0]))
        x = [float(Eps(point[0])) for point in points]
        mean, low, high = ([100 * point[j] for point in points] for j in (1, 2, 3))
        colour = PALETTE[k % len(PALETTE)]
        axes.plot(x, mean, color=colour, marker=MARKERS[k % len(MARKERS)], label=name, linewidth=2)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xticks([float(Eps(tick)) for tick in ticks], ticks)
    axes.set(xlabel="eps (pixel range [0, 1])", ylabel="accuracy, %", ylim=(-3, 103))
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    rows = [[name, *point] for name, points in curves.items() for point in points]
    return _write(path, figure, ["name", "eps", "accuracy", "ci_low", "ci_high"], rows)


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
    delta = adversarial - clean
    if magnify is None:
        magnify = 0.5 / (delta.abs().max().item() or 0.5)
    columns = [clean, 0.5 + magnify * delta, adversarial]
    titles = ["clean", f"perturbation × {round(magnify, 0 if magnify >= 10 else 1):g}", "adversarial"]
    figure = Figure(figsize=(1.35 * n + 0.6, 5.0), dpi=150, layout="constrained")
    grid = figure.subplots(3, n, squeeze=False)
    for row, (pixels, title) in enumerate(zip(columns, titles, strict=True)):
        for k in range(n):
            axes = grid[row][k]
            axes.imshow(pixels[k].clamp(0, 1).permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
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
    shares = 100 * torch.cat([matrix.clean[None], matrix.robust])
    names = ["(clean)", *matrix.sources]
    short = [name if len(name) <= 24 else "…" + name[-23:] for name in [*matrix.targets, *names]]
    figure = Figure(figsize=(3.0 + 1.1 * len(matrix.targets), 2.0 + 0.55 * len(names)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares.numpy(), cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for row, line in enumerate(shares.tolist()):
        for column, share in enumerate(line):
            colour = "black" if share > 50 else "white"
            axes.text(column, row, f"{share:.1f}", ha="center", va="center", color=colour, fontsize=10)
    axes.set_xticks(range(len(matrix.targets)), short[: len(matrix.targets)], rotation=20, ha="right")
    axes.set_yticks(range(len(names)), short[len(matrix.targets) :])
    axes.set(xlabel="scored on", ylabel="images of")
    axes.set_title(f"accuracy %, {matrix.attack}, {matrix.norm} {matrix.eps}", loc="left", fontsize=11)
    axes.spines[:].set_visible(False)
    rows = [[name, *line] for name, line in zip(names, (shares / 100).tolist(), strict=True)]
    return _write(path, figure, ["images of", *matrix.targets], rows)


def pick_rows(broken_by: Tensor, y: Tensor, most: int = 8) -> Tensor:
    """Up to `most` rows for a picture: fooled ones first, of different classes as far as there are."""
    order = torch.cat([(broken_by >= 0).nonzero().flatten(), (broken_by == -1).nonzero().flatten()]).tolist()
    seen: set[int] = set()
    first = [row for row in order if not (int(y[row]) in seen or seen.add(int(y[row])))]
    return torch.tensor((first + [row for row in order if row not in set(first)])[:most], dtype=torch.int64)


def class_words(class_names: list[str], classes: Tensor) -> list[str]:
    """Names of predicted classes; an output beyond the names, or -1 for no answer, is shown as its number."""
    return [class_names[c] if 0 <= c < len(class_names) else str(c) for c in classes.tolist()]


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
