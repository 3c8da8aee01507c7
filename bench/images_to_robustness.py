"""How many images and seconds MMT-ARD needs to be as robust as its single-teacher baseline ends, on the digits.

    python bench/images_to_robustness.py --out docs/results/efficiency

The paper's abstract claims 2.3 times the training efficiency of one teacher. Here both methods train with their digits
recipes on 1,000 images, and after every epoch PGD-20 (white-box, the recipes' 8/255) is run on 297 held-out ones. The
goal is ARD's robust accuracy after its last epoch; counted is the first epoch that reaches it, of MMT-ARD and of ARD
itself. Seconds are those of runs without the evaluations, teachers loaded, with cached and with uncached teachers (what
a cold cache costs is counted apart).
"""

import argparse
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

from rvlm.data import load_data
from rvlm.evaluation.records import environment, write_json
from rvlm.files import write_bytes
from rvlm.markdown import markdown_table
from rvlm.methods import build_method
from rvlm.models import load_clip
from rvlm.training import train

HELD_OUT = 297
ATTACK = "pgd-20"


def measure(seed: int, epochs: int, limit: int | None, progress: bool) -> dict:
    """One seed: epochs to the goal, and seconds per epoch."""
    learn, held_out = load_data("digits", "train", limit=limit).held_out(HELD_OUT if limit is None else limit // 4)
    row = {"seed": seed, "images": len(learn), "held_out": len(held_out), "epochs": epochs}
    curves = {}
    for name in ("ard", "mmt_ard"):
        result = train(
            load_clip("digits-vit"), learn, build_method(name, epochs=epochs), seed=seed, progress=progress,
            validation=held_out, validation_attack=ATTACK,
        )  # fmt: skip
        curves[name] = [epoch["val_robust"] for epoch in result.history]
        row |= {f"{name} robust": curves[name], f"{name} clean": [epoch["val_clean"] for epoch in result.history]}
    goal = row["goal"] = curves["ard"][-1]
    for name, curve in curves.items():
        row[f"{name} reached after"] = next((k + 1 for k, robust in enumerate(curve) if robust >= goal), None)
    for name, cached in (("ard", True), ("ard", False), ("mmt_ard", True), ("mmt_ard", False)):
        row[f"{name} seconds, {'cached' if cached else 'uncached'}"] = _seconds(name, cached, learn, seed)
    row["seconds to fill the cache"] = _cold(learn)
    return row


def _seconds(name: str, cached: bool, learn, seed: int) -> float:
    """Of one epoch: the median of three."""
    runs = [
        train(load_clip("digits-vit"), learn, build_method(name, epochs=1, cache_teachers=cached), seed=seed,
              progress=False).seconds
        for _ in range(3)
    ]  # fmt: skip
    return statistics.median(runs)


def _cold(learn) -> float:
    """What the clean teacher's rows of all training images cost once."""
    teacher = load_clip("digits-rn")
    began = time.perf_counter()
    with torch.no_grad():
        for rows in torch.arange(len(learn)).split(256):
            teacher(learn.batch(rows)[0])
    return time.perf_counter() - began


def page(rows: list[dict], command: str, commit: str, record: str) -> str:
    head = [
        "seed", "goal (ARD's last)", "ARD, epochs", "MMT-ARD, epochs", "images", "seconds, cached", "seconds, uncached",
    ]  # fmt: skip
    lines = []
    for row in rows:
        whole, needed = row["epochs"], row["mmt_ard reached after"]
        cells = [str(row["seed"]), f"{100 * row['goal']:.1f}", f"{row['ard reached after']} (of {whole})"]
        if needed is None:
            best = 100 * max(row["mmt_ard robust"])
            cells += [f"not in {whole} (best {best:.1f})", "-", "-", "-"]
        else:
            first = row["ard reached after"]
            cells += [str(needed), f"{first / needed:.2f}x"]
            for kind in ("cached", "uncached"):
                ratio = first * row[f"ard seconds, {kind}"] / (needed * row[f"mmt_ard seconds, {kind}"])
                cells.append(f"{ratio:.2f}x")
        lines.append(cells)
    fill = statistics.median(row["seconds to fill the cache"] for row in rows)
    spent = "; ".join(
        f"{title} {statistics.median(row[f'{name} seconds, cached'] for row in rows):.1f} with cached teachers, "
        f"{statistics.median(row[f'{name} seconds, uncached'] for row in rows):.1f} without"
        for title, name in (("ARD", "ard"), ("MMT-ARD", "mmt_ard"))
    )
    return f"""# Images and seconds to the single teacher's robustness

Digits, {rows[0]["images"]} training images, {rows[0]["held_out"]} held out; {ATTACK} at 8/255 (Linf, white-box) after
every epoch. "epochs" is the first epoch whose robust accuracy is at least ARD's after its last; "images" and "seconds"
are ARD's over MMT-ARD's up to there. Seconds an epoch, medians over seeds: {spent}.
Filling the cache takes {fill:.1f} s once, in no column.

{markdown_table(head, lines)}

Made by `{command}` at commit {commit} from [{record}]({record}).
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="OUT.json and OUT.md are written")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--limit", type=int, help="training and held-out images")
    parser.add_argument("--progress", action="store_true")
    args = parser.parse_args(argv)
    command = shlex.join(["python", "bench/images_to_robustness.py", *(sys.argv[1:] if argv is None else argv)])
    rows = [measure(int(seed), args.epochs, args.limit, args.progress) for seed in args.seeds.split(",")]
    about = environment()
    record = args.out.with_suffix(".json")
    write_json(record, {"schema": "rvlm.efficiency/1", "command": command, "rows": rows, "env": about})
    commit = str(about["git"])[:12] + ("+" if about["dirty"] else "")
    text = page(rows, command, commit, record.name)
    write_bytes(args.out.with_suffix(".md"), text.encode())
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
