"""The figures of "What eps means": drawn when the site is built, from no data but the bundled scans of digits."""

from pathlib import Path

import matplotlib
import torch

from rvlm.data import load_data

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

__all__ = ["write_figures"]

BLUE, GREY = "#2962a3", "#bbbbbb"


def write_figures(folder: Path) -> None:
    """Writes those that are not there."""
    for draw, name in ((_balls, "balls.svg"), (_looks, "looks.png")):
        if not (folder / name).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            figure = draw()
            figure.savefig(folder / name, dpi=150, bbox_inches="tight", facecolor="white")
            plt.close(figure)


def _balls():
    """Three balls of one radius around an image of two pixels, the second of which is nearly black."""
    figure, axes = plt.subplots(1, 3, figsize=(8, 2.8), sharey=True)
    clean, eps = (0.5, 0.12), 0.3
    shapes = {
        "linf": plt.Rectangle((clean[0] - eps, clean[1] - eps), 2 * eps, 2 * eps),
        "l2": plt.Circle(clean, eps),
        "l1": plt.Polygon([(clean[0] + a * eps, clean[1] + b * eps) for a, b in ((1, 0), (0, 1), (-1, 0), (0, -1))]),
    }
    for axis, (norm, shape) in zip(axes, shapes.items(), strict=True):
        box = plt.Rectangle((0, 0), 1, 1, fill=False, edgecolor=GREY)
        axis.add_patch(box)
        axis.add_patch(shape)
        shape.set(facecolor=BLUE, alpha=0.35, edgecolor=BLUE)
        shape.set_clip_path(box)
        axis.plot(*clean, "o", color="black", markersize=4)
        axis.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05), aspect="equal", title=norm, xlabel="first pixel")
    axes[0].set_ylabel("second pixel")
    return figure


def _looks():
    """A scan and a grey patch with the largest noise that a radius allows: every pixel moved by eps, at random."""
    scan, _, _ = load_data("digits", "test").batch(slice(0, 1))
    noise = torch.randn(scan.shape, generator=torch.Generator().manual_seed(0)).sign()
    levels = (0, 1, 2, 4, 8, 16, 32)
    figure, axes = plt.subplots(2, len(levels), figsize=(8, 2.5))
    for k, level in enumerate(levels):
        for axis, image in zip(axes[:, k], (scan, torch.full_like(scan, 0.5)), strict=True):
            axis.imshow((image + noise * level / 255).clamp(0, 1)[0].permute(1, 2, 0).numpy(), vmin=0, vmax=1)
            axis.set_axis_off()
        axes[0, k].set_title(f"{level}/255" if level else "clean", fontsize=9)
    return figure
