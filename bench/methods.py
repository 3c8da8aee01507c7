"""Every method on small real data: clean accuracy, white-box PGD-20 and AutoAttack, over seeds, as a table.

    python bench/methods.py --out docs/results/digits
    python bench/methods.py --out docs/results/cifar10 --data cifar10 --root FOLDER     # FOLDER: see TASKS

Each method fine-tunes a tiny ViT CLIP that was trained without a defence, once per seed (order of samples, attack
noise). Every run is a JSON file beside the table, with the command and commit that made it, and is not repeated. The
table is refused if AutoAttack leaves more than ten points less than PGD-20 on the same samples: then PGD was too weak
to be shown.
"""

import argparse
import dataclasses
import functools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from rvlm.attacks import Joint, pgd, scoring
from rvlm.attacks.stages import parse_attack
from rvlm.data import Data, load_data
from rvlm.evaluation import evaluate
from rvlm.evaluation.records import environment, write_json
from rvlm.files import cache_root, write_bytes
from rvlm.markdown import markdown_table
from rvlm.methods import build_method
from rvlm.models import Clip, Ensemble, ZeroShotClassifier, load_clip
from rvlm.training import train
from rvlm.units import Eps

ROWS = {
    "undefended": None,
    "ensemble with the proxy": None,
    "tecoa": ("tecoa", {}),
    "fare": ("fare", {}),
    "pmg_aft": ("pmg_aft", {}),
    "ard": ("ard", {}),
    "mmt_ard": ("mmt_ard", {}),
    "mmt_ard, fixed weights": ("mmt_ard", {"weights": "fixed"}),
    "mmt_ard, fixed weights, robust teacher on clean": ("mmt_ard", {"weights": "fixed", "robust_input": "clean"}),
    "mmt_ard, code weights": ("mmt_ard", {"weights": "code", "robust_weight": 50.0, "clean_weight": 5.0}),
    "hpt_gpd": ("hpt_gpd", {}),
    "hpt_gpd, HPT only": ("hpt_gpd", {"stages": "hpt"}),
    "hpt_gpd, GA only": ("hpt_gpd", {"stages": "ga"}),
    "hpt_gpd, clean distillation": ("hpt_gpd", {"stages": "clean"}),
    "advvp": ("advvp", {}),
    "r_adapt, filter only": ("r_adapt", {"anchor": "white", "alpha_anchor": 0.0}),
    "r_adapt, white": ("r_adapt", {"anchor": "white"}),
    "r_adapt, white, anchor only": ("r_adapt", {"anchor": "white", "cutoff": None}),
    "r_adapt, model": ("r_adapt", {"anchor": "model"}),
    "r_adapt, model, anchor only": ("r_adapt", {"anchor": "model", "cutoff": None}),
    "r_adapt, learned": ("r_adapt", {}),
    "r_adapt, learned, anchor only": ("r_adapt", {"cutoff": None}),
    # Few images, seen as often as it takes for as many steps.
    "r_adapt, learned, 130 images": ("r_adapt", {"epochs": 70}, 130),
    "r_adapt, learned, 13 images": ("r_adapt", {"epochs": 210}, 13),
    "fare, 130 images": ("fare", {"epochs": 140}, 130),
    "fare, 13 images": ("fare", {"epochs": 420}, 13),
    "ivlp, clean": ("ivlp", {}),
    "advvlp": ("advvlp", {}),
    "advmaple": ("advmaple", {}),
    "apt": ("apt", {}),
    "apt, constant": ("apt", {"adversary": "constant"}),
    "apt, perturbed": ("apt", {"adversary": "perturbed"}),
    "advpt": ("advpt", {}),
    "fap": ("fap", {}),
    "apd": ("apd", {}),
    "apd, no feedback": ("apd", {"beta": 0.0}),
    "apd, zero-shot teacher": ("apd", {"teacher": "zero_shot"}),
    "apd, fine-tuned teacher": ("apd", {"teacher": "fine_tuned"}),
    "apd, robust teacher": ("apd", {"teacher": "digits-vit-tecoa"}),
    "apd, visual only": ("apd", {"text_tokens": 0}),
    "apd, text only": ("apd", {"visual_tokens": 0}),
    "apd, beta 0.1": ("apd", {"beta": 0.1}),
    "apd, beta 0.5": ("apd", {"beta": 0.5}),
    "apd, beta 2": ("apd", {"beta": 2.0}),
    "apd, beta 6": ("apd", {"beta": 6.0}),
    "apd, beta 0.5 convex": ("apd", {"beta": 0.5, "beta_mode": "convex"}),
    "apd, inner KL to the teacher": ("apd", {"inner_loss": "kl_teacher"}),
    "apd, 1 step": ("apd", {"steps": 1}),
    "apd, 5 steps": ("apd", {"steps": 5}),
    "apd, 10 steps": ("apd", {"steps": 10}),
    "apd, 1 block": ("apd", {"visual_depth": 1, "text_depth": 1}),
    "apd, 2 blocks": ("apd", {"visual_depth": 2}),
    "apd, 2 visual tokens": ("apd", {"visual_tokens": 2}),
    "apd, 32 visual tokens": ("apd", {"visual_tokens": 32}),
}  # method, settings and, if not all, training images
PROMPTS = ("ivlp", "advvp", "advvlp", "advmaple", "apt", "advpt", "fap", "apd")
TITLES = {
    "prompts": "Prompts", "prompts-resnet": "Prompts of a ResNet", "prompts-sweep": "Settings of APD",
    "r_adapt": "R-Adapt",
}  # fmt: skip
WORSE = 0.10  # by which AutoAttack may lie below PGD-20
JOINT_STEPS = 20
LOW = 40 / 224  # cutoff of the low-frequency attack in DFT bins per pixel of an image's side: R-Adapt's filter


@dataclasses.dataclass(frozen=True)
class Task:
    """Data and the frozen or starting models: what a row needs beside its method."""

    train: Data
    test: Data
    student: Callable[[], Clip]
    proxy: Callable[[], Clip]
    robust: Callable[[], Clip]
    settings: dict[str, dict]  # of a method, on top of its preset
    shots: int | None = None  # training samples of a class, drawn by the seed; None takes all


def digits(root: str | None, images: int | None) -> Task:
    """The bundled scans, with the recipes' settings."""
    train_data, test = load_data("digits", "train", limit=images), load_data("digits", "test")
    names = ("digits-vit", "digits-rn", "digits-vit-tecoa")
    return Task(train_data, test, *(functools.partial(load_clip, name) for name in names), settings={})


def cifar10(root: str | None, images: int | None) -> Task:
    """CIFAR-10 photographs: ROOT/train20000_jpeg.zip (train/<class>/*.jpg) and ROOT/test2000.npz.

    Tiny CLIPs are trained there first, on all images and their mirror images, and kept in the cache; so is the robust
    teacher, TeCoA on all images. Methods get `images` of them (default 5,000) and as many epochs for each.
    """
    if root is None:
        raise FileNotFoundError("cifar10 needs --root, a folder with train20000_jpeg.zip and test2000.npz")
    everything = load_data(f"folder:{root}/train20000_jpeg.zip", "train")
    everything = dataclasses.replace(everything, read=everything.read(everything.index).__getitem__)  # decoded once
    kept = cache_root() / "bench" / f"cifar10-{everything.fingerprint}"
    vit, rn = (functools.partial(_made, kept / name, name, _mirrored(everything), "clip", {"epochs": 15})
               for name in ("tiny-vit", "tiny-rn"))  # fmt: skip
    robust = functools.partial(_made, kept / "tecoa", vit, everything, "tecoa", {"epochs": 10})
    epochs = {"epochs": 20}
    settings = dict.fromkeys(("tecoa", "fare", "pmg_aft", "ard", "mmt_ard"), epochs)
    settings["hpt_gpd"] = {"epochs": 10, "ga_epochs": 10}
    test = load_data(f"npz:{root}/test2000.npz", limit=1000)
    return Task(everything.limited(images or 5000), test, vit, rn, robust, settings)


def few_digits(root: str | None, images: int | None) -> Task:
    """16 scans of each class for the prompt methods, at 4/255: as many epochs as are published, the recipes' rates."""
    few = {"epochs": 50, "batch_size": 32, "eps": "4/255"}
    return dataclasses.replace(digits(root, images), settings=dict.fromkeys(PROMPTS, few), shots=16)


def few_digits_resnet(root: str | None, images: int | None) -> Task:
    """The same for a ResNet, which takes a context and no visual prompts; the ViT is its proxy."""
    task = few_digits(root, images)
    return dataclasses.replace(task, student=task.proxy, proxy=task.student)


TASKS = {
    "digits": digits, "digits-16-shots": few_digits, "digits-16-shots-resnet": few_digits_resnet, "cifar10": cifar10,
}  # fmt: skip


def _made(folder: Path, start: str | Callable[[], Clip], data: Data, method: str, settings: dict) -> Clip:
    """A model that is trained at first use and kept."""
    if not (folder / "open_clip_config.json").is_file():
        clip = load_clip(start) if isinstance(start, str) else start()
        train(clip, data, build_method(method, **settings)).student.save(folder)
    return load_clip(str(folder))


def _mirrored(data: Data) -> Data:
    """Twice the samples: the second half is flipped left to right."""
    n = int(data.index.max()) + 1

    def read(index: torch.Tensor) -> torch.Tensor:
        pixels = data.read(index % n)
        return torch.where((index >= n).view(-1, 1, 1, 1), pixels.flip(-1), pixels)

    index = torch.cat([data.index, data.index + n])
    return dataclasses.replace(data, y=data.y.repeat(2), index=index, read=read, index_rule="and mirrored")


def measure(task: Task, name: str, seed: int, args: argparse.Namespace) -> dict:
    """One row: accuracies on the test split, and the proxy's on the images that were made for the student."""
    student, proxy, robust = (make().to(args.device) for make in (task.student, task.proxy, task.robust))
    partner = None
    row = {"name": name, "seed": seed, "train_seconds": 0.0, "train_images": 0, "setup_seconds": 0.0, "images": 0}
    if ROWS[name] is not None:
        method, settings, *images = ROWS[name]
        learn = task.train if task.shots is None else task.train.few_shot(task.shots, seed)
        learn = learn.limited(*images, seed=seed) if images else learn
        teachers = {"hpt_gpd": {"proxy": proxy}, "ard": {"teacher": robust},
                    "mmt_ard": {"robust_teacher": robust, "clean_teacher": proxy},
                    "r_adapt": {"guide": robust}}.get(method, {})  # fmt: skip
        built = build_method(method, **(task.settings.get(method, {}) | teachers | settings))
        result = train(student, learn, built, seed=seed, progress=args.progress)
        row |= {
            "train_seconds": round(result.seconds, 1), "train_images": result.images,
            "setup_seconds": round(result.setup_seconds, 1), "images": len(learn) if result.images else 0,
            "trained": 0 if student.adapter is None else sum(p.numel() for p in student.adapter.parameters()),
        }  # fmt: skip
        partner = built.others.get("teacher")
    test, subset = task.test, task.test.limited(args.few)
    clips = (student, proxy, task.student().to(args.device))
    model, other, plain = (ZeroShotClassifier(clip, test.class_names, test.template).eval() for clip in clips)
    row |= {"samples": len(test), "few": len(subset)}
    if name == "ensemble with the proxy":
        model = Ensemble([model, other])
    partner = other if partner is None else ZeroShotClassifier(partner, test.class_names).eval()
    low_attack = f"pgd-{JOINT_STEPS}@lowfreq={LOW * test.batch(slice(0, 1))[0].shape[-1]:.1f}"
    place = {int(i): k for k, i in enumerate(test.index)}
    rows = [place[int(i)] for i in subset.index]
    for eps in args.radii:
        given = {"eps": eps, "seed": seed, "progress": args.progress, "device": args.device}
        weak = evaluate(model, test, attack=args.attack, **given)
        strong = evaluate(model, subset, attack=args.strong, **given)
        fooled = evaluate(other, test, source=model, attack=args.transfer, **given)
        moved = evaluate(model, test, source=plain, attack=args.transfer, **given)
        low = evaluate(model, test, attack=low_attack, **given)
        blind = evaluate(model, test, source=plain, attack="tifgsm-10", **given)
        row |= {
            "clean": weak.clean, f"pgd {eps}": weak.robust, f"autoattack {eps}": strong.robust,
            f"pgd {eps}, same samples": (weak.broken_by[rows] == -1).double().mean().item(),
            f"proxy on its images {eps}": fooled.robust, "proxy clean": fooled.clean, f"transfer {eps}": moved.robust,
            f"lowfreq {eps}": low.robust, f"tifgsm {eps}": blind.robust,
            f"joint {eps}": against_both(model, partner, test, eps, seed, args.device),
            f"failed checks {eps}": [c["id"] for c in [*weak.checks, *strong.checks] if not c["ok"]],
        }  # fmt: skip
    return row


def against_both(model, proxy, data: Data, eps: str, seed: int, device: str) -> float:
    """Accuracy under PGD that raises the student's and the proxy's (APD: the teacher's) cross-entropy together, as an
    attacker who knows how the student was trained might: losses added up, and gradients of equal length added up; the
    worse of the two."""
    right = 0
    for rows in torch.arange(len(data)).split(250):
        x, y, index = (t.to(device) for t in data.batch(rows))
        with scoring(model):
            holds = model(x).argmax(1) == y
        for rule in ("sum", "unit"):
            joint = Joint([model, proxy], gradients=rule)
            generator = torch.Generator().manual_seed(seed)
            x_adv = pgd(joint, x, y, loss=joint.loss, best="loss", eps=Eps(eps), steps=JOINT_STEPS,
                        generator=generator, sample_ids=index)  # fmt: skip
            with scoring(model):
                holds &= model(x_adv).argmax(1) == y
        right += int(holds.sum())
    return right / len(data)


def table(rows: list[dict], args: argparse.Namespace) -> str:
    """Means over seeds, with the spread (half of largest minus smallest) where there are several."""
    columns = {"clean": "clean"}
    for eps in args.radii:
        columns |= {f"pgd {eps}": f"{args.attack} {eps}", f"autoattack {eps}": f"{args.strong} {eps}"}
        columns |= {f"{name} {eps}": f"{name} {eps}" for name in ("transfer", "tifgsm", "lowfreq", "joint")}
        columns |= {f"proxy on its images {eps}": f"proxy {eps}"}
    # Some columns came later than some runs.
    columns = {key: heading for key, heading in columns.items() if any(key in row for row in rows)}
    counts = {
        "train_seconds": "train s",
        "setup_seconds": "setup s",
        "images": "images",
        "train_images": "seen",
        "trained": "numbers kept",
    }
    counts = {key: heading for key, heading in counts.items() if any(key in row for row in rows)}
    head = ["method", "seeds", *counts.values(), *columns.values()]
    lines = []
    for name in ROWS:
        mine = [row for row in rows if row["name"] == name]
        if not mine:
            continue
        cells = [name, str(len(mine))]
        for key in counts:
            known = [row[key] for row in mine if key in row]
            cells.append(f"{statistics.mean(known):.0f}" if known else "-")
        for key in columns:
            values = [100 * row[key] for row in mine if key in row]
            if not values:
                cells.append("-")
                continue
            spread = f" ±{(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(cells)
    return markdown_table(head, lines)


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
    parser.add_argument("--data", default="digits", choices=TASKS)
    parser.add_argument("--root", help="where the data lies, for data that is not bundled")
    parser.add_argument("--images", type=int, help="training images for the methods")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--eps", default="4/255,8/255")
    parser.add_argument("--attack", default="pgd-20")
    parser.add_argument("--transfer", help="attack of the columns transfer and proxy; --attack's if not given")
    parser.add_argument("--strong", default="autoattack")
    parser.add_argument("--few", type=int, default=50, help="samples of the strong attack")
    parser.add_argument("--only", default="", help="names of rows, separated by semicolons")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--collect", action="store_true", help="make the table of the runs that are there")
    parser.add_argument("--progress", action="store_true")
    args = parser.parse_args(argv)
    args.transfer = args.transfer or args.attack
    args.radii, only = args.eps.split(","), [name for name in args.only.split(";") if name]
    for attack in (args.attack, args.strong, args.transfer):
        parse_attack(attack)
    unknown = set(only) - set(ROWS)
    if unknown:
        parser.error(f"no such rows: {', '.join(sorted(unknown))}; there are {'; '.join(ROWS)}")
    given = list(sys.argv[1:] if argv is None else argv)
    if args.root:
        given = [part.replace(args.root, "FOLDER") for part in given]
    command = shlex.join(["python", "bench/methods.py", *given])
    make_task = functools.cache(functools.partial(TASKS[args.data], args.root, args.images))
    rows = []
    seeds = [int(seed) for seed in args.seeds.split(",")]
    for seed in seeds:
        for name in only or ROWS:
            if ROWS[name] is None and seed != seeds[0]:
                continue  # nothing is trained
            of = f"{args.images}-images " if args.images else ""
            stem = f"{name} {of}{args.attack} {args.strong}-{args.few} {args.eps} {seed}"
            stem = stem.translate(str.maketrans(" ,/", "---"))
            path = args.out / f"{stem}.json"
            if args.collect and not path.is_file():
                continue
            if not path.is_file():
                began = time.time()
                row = measure(make_task(), name, seed, args)
                about = {"command": command, "seconds": round(time.time() - began, 1), "env": environment()}
                write_json(path, {"schema": "rvlm.method/2", "data": args.data, "row": row, **about})
            rows.append(json.loads(path.read_text()))
    if not rows:
        parser.error(f"no runs with these settings in {args.out}")
    measured = [row["row"] for row in rows]
    if weak := too_weak(measured, args.radii):
        print("no table: PGD is too weak to be shown beside AutoAttack:", *weak, sep="\n  ", file=sys.stderr)
        return 4
    commits = sorted({str(row["env"]["git"])[:12] + ("+" if row["env"]["dirty"] else "") for row in rows})
    proxy = f"{100 * measured[0]['proxy clean']:.1f}"
    kind, other = ("Tiny ResNet", "ViT") if args.data.endswith("resnet") else ("Tiny ViT", "ResNet")
    title = "Methods" if args.out.name == args.data else TITLES.get(args.out.name, args.out.name)
    text = f"""# {title} on {args.data}

{kind} CLIP, white-box, Linf. Clean and {args.attack} on {measured[0]["samples"]} test images, {args.strong} on
{measured[0]["few"]} of them; means over seeds ± half the spread. Not white-box are: "transfer", {args.transfer} on the
undefended model, scored on the row's, and "tifgsm", tifgsm-10 there; "joint", PGD-{JOINT_STEPS} on student and proxy
together (for APD, its teacher), scored on the student; "proxy", a vanilla {other} CLIP ({proxy} clean) on the images
that {args.transfer} made for the student. "lowfreq" is PGD-{JOINT_STEPS} whose change passed R-Adapt's filter. "images"
are different training images, "seen" counts epochs, "numbers kept" are those of an adapter.

{table(measured, args)}

Made by `{command}`
at commit {", ".join(commits)} from the files in [{args.out.name}]({args.out.name}).
"""
    write_bytes(args.out.with_suffix(".md"), text.encode())
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
