"""Every method on the bundled digits: clean accuracy, white-box PGD-20 and AutoAttack, over seeds, as a table.

    python bench/methods_on_digits.py --out docs/results/digits --seeds 0,1,2

Each method fine-tunes digits-vit with its digits recipe, once per seed (order of samples, attack noise). Every run is a
JSON file beside the table, with the command and commit that made it, and is not repeated. The table is refused if
AutoAttack leaves more than ten points less than PGD-20 on the same samples: then PGD was too weak to be shown.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path

from rvlm.attacks.stages import parse_attack
from rvlm.data import load_data
from rvlm.evaluation import evaluate
from rvlm.evaluation.records import environment, write_json
from rvlm.files import write_bytes
from rvlm.methods import build_method
from rvlm.models import ZeroShotClassifier, load_clip
from rvlm.training import train

ROWS = {
    "undefended": None,
    "tecoa": ("tecoa", {}),
    "fare": ("fare", {}),
    "pmg_aft": ("pmg_aft", {}),
    "ard": ("ard", {}),
    "mmt_ard": ("mmt_ard", {}),
    "hpt_gpd": ("hpt_gpd", {}),
    "hpt_gpd, HPT only": ("hpt_gpd", {"stages": "hpt"}),
    "hpt_gpd, GA only": ("hpt_gpd", {"stages": "ga"}),
    "hpt_gpd, clean distillation": ("hpt_gpd", {"stages": "clean"}),
}
PROXY = "digits-rn"
WORSE = 0.10  # by which AutoAttack may lie below PGD-20


def measure(name: str, seed: int, radii: list[str], pgd: str, few: int, strong: str, progress: bool) -> dict:
    """One row: accuracies on the test split, and the proxy's on the images that were made for the student."""
    student, seconds = load_clip("digits-vit"), 0.0
    if ROWS[name] is not None:
        method, settings = ROWS[name]
        result = train(
            student, load_data("digits", "train"), build_method(method, **settings), seed=seed, progress=progress
        )
        seconds = result.seconds
    test = load_data("digits", "test")
    subset = test.limited(few)
    model, proxy = (ZeroShotClassifier(c, test.class_names, test.template) for c in (student, load_clip(PROXY)))
    row = {"name": name, "seed": seed, "train_seconds": round(seconds, 1), "samples": len(test), "few": len(subset)}
    for eps in radii:
        weak = evaluate(model, test, attack=pgd, eps=eps, seed=seed, progress=progress)
        full = evaluate(model, subset, attack=strong, eps=eps, seed=seed, progress=progress)
        other = evaluate(proxy, test, source=model, attack=pgd, eps=eps, seed=seed, progress=progress)
        chosen = {int(i): k for k, i in enumerate(test.index)}
        rows = [chosen[int(i)] for i in subset.index]
        row |= {
            "clean": weak.clean, f"pgd {eps}": weak.robust, f"autoattack {eps}": full.robust,
            f"pgd {eps}, same samples": (weak.broken_by[rows] == -1).double().mean().item(),
            f"proxy on its images {eps}": other.robust, "proxy clean": other.clean,
            f"failed checks {eps}": [c["id"] for c in [*weak.checks, *full.checks] if not c["ok"]],
        }  # fmt: skip
    return row


def table(rows: list[dict], radii: list[str], pgd: str, strong: str) -> str:
    """Means over seeds, with the spread (largest minus smallest) where there are several."""
    columns = {"clean": "clean"}
    for eps in radii:
        columns |= {f"pgd {eps}": f"{pgd} {eps}", f"autoattack {eps}": f"{strong} {eps}"}
        columns |= {f"proxy on its images {eps}": f"proxy on its {pgd} images {eps}"}
    lines = ["| method | seeds | train s | " + " | ".join(columns.values()) + " |", "| --- " * (3 + len(columns)) + "|"]
    for name in ROWS:
        mine = [row for row in rows if row["name"] == name]
        if not mine:
            continue
        cells = [name, str(len(mine)), f"{statistics.mean(row['train_seconds'] for row in mine):.0f}"]
        for key in columns:
            values = [100 * row[key] for row in mine]
            spread = f" ±{(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def too_weak(rows: list[dict], radii: list[str]) -> list[str]:
    """Rows in which AutoAttack found much that PGD had not."""
    return [
        f"{row['name']} (seed {row['seed']}, eps {eps}): PGD leaves {row[f'pgd {eps}, same samples']:.1%}, AutoAttack "
        f"{row[f'autoattack {eps}']:.1%} of the same samples"
        for row in rows
        for eps in radii
        if row[f"autoattack {eps}"] < row[f"pgd {eps}, same samples"] - WORSE
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs; the table is OUT.md")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--eps", default="4/255,8/255")
    parser.add_argument("--attack", default="pgd-20")
    parser.add_argument("--strong", default="autoattack")
    parser.add_argument("--few", type=int, default=100, help="samples of the strong attack")
    parser.add_argument("--only", default="", help="names of rows, separated by semicolons")
    parser.add_argument("--progress", action="store_true")
    args = parser.parse_args(argv)
    radii, only = args.eps.split(","), [name for name in args.only.split(";") if name]
    for attack in (args.attack, args.strong):
        parse_attack(attack)
    unknown = set(only) - set(ROWS)
    if unknown:
        parser.error(f"no such rows: {', '.join(sorted(unknown))}; there are {'; '.join(ROWS)}")
    command = shlex.join(["python", "bench/methods_on_digits.py", *(sys.argv[1:] if argv is None else argv)])
    rows = []
    seeds = [int(seed) for seed in args.seeds.split(",")]
    for seed in seeds:
        for name in only or ROWS:
            if name == "undefended" and seed != seeds[0]:
                continue  # nothing is trained
            stem = f"{name} {args.attack} {args.strong}-{args.few} {args.eps} {seed}".translate(
                str.maketrans(" ,/", "---")
            )
            path = args.out / f"{stem}.json"
            if not path.is_file():
                began = time.time()
                row = measure(name, seed, radii, args.attack, args.few, args.strong, args.progress)
                about = {"command": command, "seconds": round(time.time() - began, 1), "env": environment()}
                write_json(path, {"schema": "rvlm.method/1", "row": row, **about})
            rows.append(json.loads(path.read_text()) | {"path": path.name})
    measured = [row["row"] for row in rows]
    if weak := too_weak(measured, radii):
        print("no table: PGD is too weak to be shown beside AutoAttack:", *weak, sep="\n  ", file=sys.stderr)
        return 4
    commits = sorted({str(row["env"]["git"])[:12] + ("+" if row["env"]["dirty"] else "") for row in rows})
    text = f"""# Methods on the digits

Tiny ViT CLIP (digits-vit), white-box, Linf. Clean and {args.attack} on {measured[0]["samples"]} test images,
{args.strong} on {measured[0]["few"]} of them; means over seeds ± half the spread. "proxy" is {PROXY}, a vanilla ResNet
CLIP, on the images that {args.attack} made for the student (transfer).

{table(measured, radii, args.attack, args.strong)}

Made by `{command}` at commit {", ".join(commits)} from the files in [{args.out.name}]({args.out.name}).
"""
    write_bytes(args.out.with_suffix(".md"), text.encode())
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
