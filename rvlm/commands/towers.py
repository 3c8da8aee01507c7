"""What `rvlm analyze` says of two towers: figures for the record, a text, and a picture."""

from pathlib import Path
from typing import TYPE_CHECKING

from rvlm.arguments import AnalyzeArgs
from rvlm.markdown import markdown_table

if TYPE_CHECKING:
    from rvlm.data import Data
    from rvlm.models import Clip

__all__ = ["TOWERS"]


def _cka(args: AnalyzeArgs, base: "Clip", robust: "Clip", data: "Data", picture: Path) -> tuple[dict, str]:
    from rvlm.analysis import cka_matrix
    from rvlm.report import heat_map

    values, ours, theirs = cka_matrix(base, robust, data, args.tokens, args.unbiased, args.batch_size)
    title = f"linear CKA, {args.tokens} tokens{', unbiased' if args.unbiased else ''}, {len(data)} images"
    heat_map(picture, values, ours, theirs, ylabel=base.name, xlabel=robust.name, title=title)
    rows = [[name, *(f"{v:.3f}" for v in row)] for name, row in zip(ours, values.tolist(), strict=True)]
    found = {"tokens": args.tokens, "unbiased": args.unbiased, "rows": ours, "columns": theirs, "cka": values.tolist()}
    return found, markdown_table([base.name, *theirs], rows)


def _replace(args: AnalyzeArgs, base: "Clip", robust: "Clip", data: "Data", picture: Path) -> tuple[dict, str]:
    from rvlm.analysis import replacements
    from rvlm.report import bars

    templates = data.template if args.templates == "auto" else args.templates
    found = replacements(
        base, robust, data, cumulative=not args.single, attack=args.attack, eps=args.eps, templates=templates,
        seed=args.seed, batch_size=args.batch_size,
    )  # fmt: skip
    columns = {
        "clean": [100 * e.clean for e in found.white_box],
        "robust, white-box": [100 * e.robust for e in found.white_box],
        "robust, transfer from the base": [100 * e.robust for e in found.transfer],
    }
    how = "one unit replaced" if args.single else "replaced up to"
    bars(picture, columns, found.steps, f"{how}: {base.name} by {robust.name}, {args.attack} {args.eps}", "accuracy, %")
    rows = [[step, *(f"{v[k]:.1f}" for v in columns.values())] for k, step in enumerate(found.steps)]
    threat = {"attack": args.attack, "eps": str(args.eps), "norm": "linf", "seed": args.seed}
    return {"cumulative": not args.single, **threat, "steps": found.steps, "accuracy": columns}, markdown_table(
        [how, *columns], rows
    )


def _spectrum(args: AnalyzeArgs, base: "Clip", robust: "Clip", data: "Data", picture: Path) -> tuple[dict, str]:
    from rvlm.analysis import spectral_shift
    from rvlm.report import maps

    shift = spectral_shift(base, robust, args.normalise)
    maps(
        picture, {args.normalise: [shift]}, [f"{robust.name} - {base.name}"], "shift of the patch embedding's spectrum"
    )
    centre = shift[len(shift) // 2, shift.shape[1] // 2]
    text = f"{args.normalise} shift of the patch embedding: frequency 0 {centre:+.3f}, corner {shift[0, 0]:+.3f}"
    return {"normalise": args.normalise, "shift": shift.tolist()}, text


def _attention(args: AnalyzeArgs, base: "Clip", robust: "Clip", data: "Data", picture: Path) -> tuple[dict, str]:
    from rvlm.analysis import attention_map
    from rvlm.report import maps

    x, y, index = data.limited(6).batch(slice(None))
    rows = {
        clip.name: list(attention_map(clip, x.to(clip.device), args.block, args.reduce).cpu())
        for clip in (base, robust)
    }
    maps(
        picture,
        {"image": list(x), **rows},
        [data.class_names[c] for c in y.tolist()],
        f"attention of block {args.block}",
    )
    found = {"block": args.block, "reduce": args.reduce, "index": index.tolist()}
    found["maps"] = {name: [m.tolist() for m in row] for name, row in rows.items()}
    return found, f"attention of block {args.block} on {len(x)} images: {picture}"


def _insensitivity(args: AnalyzeArgs, base: "Clip", robust: "Clip", data: "Data", picture: Path) -> tuple[dict, str]:
    from rvlm.analysis import insensitivity
    from rvlm.report import bars

    scores = {clip.name: insensitivity(clip, data, args.block, args.batch_size) for clip in (base, robust)}
    title = f"share of block {args.block}'s attention output that no image changes"
    bars(picture, {"insensitivity": list(scores.values())}, list(scores), title, "|E O|^2 / E |O|^2")
    return {"block": args.block, "insensitivity": scores}, "\n".join(
        f"{name}: {score:.3f}" for name, score in scores.items()
    )


def _drift(args: AnalyzeArgs, base: "Clip", robust: "Clip", data: "Data", picture: Path) -> tuple[dict, str]:
    from rvlm.analysis import drift
    from rvlm.report import bars

    moved = drift(base, robust)
    bars(picture, {"drift": list(moved.values())}, list(moved), f"{base.name} to {robust.name}", "|w' - w| / |w|")
    return {"drift": moved}, "\n".join(f"{unit}: {value:.4f}" for unit, value in moved.items())


TOWERS = {
    "cka": _cka,
    "replace": _replace,
    "spectrum": _spectrum,
    "attention": _attention,
    "insensitivity": _insensitivity,
    "drift": _drift,
}
