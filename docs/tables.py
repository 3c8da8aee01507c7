"""Writes the generated parts of docs/methods: what the code, its presets and the measured runs say.

    python docs/tables.py

A part stands between <!-- KIND: WHAT --> and <!-- end -->, and is never edited by hand:

    methods                         all methods in one table
    settings: METHOD                settings that are the method's own: default, range, what the paper has, meaning
    settings: shared | prompts      those of all methods; of all prompt methods
    presets: METHOD                 where presets, or the method's own defaults, differ from the usual
    results: FOLDER | ROW; ROW      rows of docs/results/FOLDER by seed, as means
    results: FOLDER + proxy, joint | ...     with these columns, too

tests/docs/test_methods.py fails where a page is not what this writes, or the code is not what the tables below say.
"""

import ast
import dataclasses
import inspect
import json
import re
import statistics
import textwrap
from pathlib import Path
from typing import Any

from rvlm.markdown import markdown_table
from rvlm.methods import MethodConfig, list_methods, method_class
from rvlm.methods.prompts import PromptConfig
from rvlm.units import Eps

DOCS = Path(__file__).parent
PART = re.compile(r"(<!-- (methods|settings|presets|results)(?:: (.*?))? -->\n).*?(<!-- end -->)", re.S)

# method -> page, what learns, what labels are for, passes of a training image (through the student's tower, and through
# others') with two steps of the attack, source. The passes are measured by the test.
METHODS = {
    "clip": ("clip", "both towers, logit scale", "loss", (1, 0), "Radford et al. 2021"),
    "tecoa": ("tecoa", "vision tower", "attack, loss", (3, 0), "arXiv 2212.07016"),
    "fare": ("fare", "vision tower", "none", (3, 0), "arXiv 2402.12336"),
    "pmg_aft": ("pmg_aft", "vision tower", "attack, loss", (4, 1), "arXiv 2401.04350"),
    "ard": ("ard", "vision tower", "none", (3, 0), "arXiv 1905.09747"),
    "hpt_gpd": ("hpt_gpd", "vision tower, or all", "attack", (3, 0.5), "arXiv 2601.12865"),
    "mmt_ard": ("mmt_ard", "vision tower, or low-rank corrections", "row weights", (4, 1), "arXiv 2511.17448"),
    "r_adapt": ("r_adapt", "nothing, or one anchor", "offline attack", (2, 0), "arXiv 2603.12799"),
    "apd": ("apd", "two sets of prompts", "attack, teacher's loss", (3, 1), "arXiv 2411.15244"),
    "advvp": ("prompts", "visual prompts", "attack, loss", (3, 0), "Mao et al. 2023, Jia et al. 2022"),
    "advvlp": ("prompts", "prompts in both towers", "attack, loss", (3, 0), "labs' configurations"),
    "advmaple": ("prompts", "coupled prompts in both towers", "attack, loss", (3, 0), "Khattak et al. 2023"),
    "ivlp": ("prompts", "prompts in both towers", "loss", (1, 0), "Khattak et al. 2023"),
    "apt": ("prompts", "a text context", "attack, loss", (3, 0), "Li et al. 2024"),
    "advpt": ("prompts", "a text context", "offline attack, loss", (0, 0), "Zhang et al. 2024"),
    "fap": ("prompts", "coupled prompts in both towers", "loss", (5, 0), "Zhou et al. 2024"),
}

YES_NO, OURS, MODEL = "true, false", "ours", "a model"
CACHE = (YES_NO, "ours; changes no result")
# method -> setting -> range (words, an interval, or what it is), and what the paper or its code has.
SETTINGS = {
    "clip": {},
    "tecoa": {},
    "fare": {
        "distance": ("l2, cosine", "l2"),
        "clean_weight": ("[0, 1]", "0 (a flag of the code)"),
        "trades": (YES_NO, "false (a flag of the code)"),
        "cache_teachers": CACHE,
    },
    "pmg_aft": {
        "logit_scale": ("positive, or null", "1 (code)"),
        "general_weight": ("a number", "1"),
        "clean_weight": ("a number", "1"),
        "reduction": ("mean, sum", "sum (code)"),
        "detach_clean": (YES_NO, "false (code)"),
    },
    "ard": {
        "teacher": (MODEL, "a robust ViT-L/14, not released"),
        "temperature": ("positive", "1 (code)"),
        "cache_teachers": CACHE,
    },
    "hpt_gpd": {
        "proxy": (MODEL, "CLIP ViT-B/16 for a ViT-B/32; ResNets and ALIGN compared"),
        "stages": ("both, hpt, ga, clean", "both; the others are rows of its tables"),
        "trains": ("vision, all", "open: equations and first upload all, later code vision"),
        "ga_epochs": (">= 1, or null", "10; whether per stage is not said"),
        "ga_lr": ("a rate", "5e-5"),
        "logit_scale": ("positive, or null", "1 in the first upload; inferred for the published figures"),
        "direction": ("student_first, teacher_first", "student_first; the code teacher_first"),
        "reduction": ("mean, sum", "mean; the code sum"),
        "temperature": ("positive", "1"),
        "ce_weight": ("a number", "0; a commented line of the code has 1"),
        "anchor_weight": ("a number", "0; the first upload 0.001"),
        "gamma": ("[0, 1]", "0.9"),
        "beta": ("[0, 1]", "0.5"),
        "pull_first": (YES_NO, "false; commented lines of the code true"),
        "start_from_ema": (YES_NO, "false"),
        "cache_teachers": CACHE,
    },
    "mmt_ard": {
        "robust_teacher": (MODEL, "a robust ViT-L/14, not released"),
        "clean_teacher": (MODEL, "ViT-L/14 tuned on clean ImageNet, not released"),
        "origin": ("a model, or null", "computed and not used (code)"),
        "origin_weight": ("a number", "0 (code)"),
        "weights": ("code, fixed, mtard, sigmoid, hard", "code is the code's; sigmoid and hard are inferred, by us"),
        "robust_weight": ("a number", "50 (code)"),
        "clean_weight": ("a number", "5 (code)"),
        "per_class": (YES_NO, "true (code)"),
        "confidence": ("cosine, prob", "cosine (code); prob is ours"),
        "kappa": ("a number", OURS),
        "offset": ("a number", OURS),
        "mtard_rate": ("a number", "0.025, commented out (code)"),
        "mtard_power": ("a number", "1, commented out (code)"),
        "inner_loss": ("clean, robust, ce", "clean (code)"),
        "robust_input": ("adv, clean", "adv (code)"),
        "temperature": ("positive", "1 (code)"),
        "lora_rank": (">= 0", "0 or 16 (code)"),
        "lora_alpha": ("positive", "16 (code)"),
        "lora_dropout": ("[0, 1)", "0.1, for each token (code)"),
        "lora_targets": ("all, qkv, out", "all (code)"),
        "cache_teachers": CACHE,
    },
    "r_adapt": {
        "anchor": ("white, model, learned", "all three"),
        "guide": (MODEL, "TeCoA, TGA or FARE"),
        "init": ("white, model, zero", "inferred from a figure"),
        "alpha_anchor": ("a number, or null", "read off figures: 1.2 (model), 0.8 (learned); white is ours"),
        "mix": ("add, lerp, normadd", "a linear combination; add is inferred"),
        "site": ("out, heads, map", "inferred from a figure: out"),
        "block": (">= 0", "the first, 0"),
        "cutoff": ("positive, or null", "read off figures: 40, of 10 to 60"),
        "cutoff_at": ("pixels, or null", "224"),
        "clamp": (YES_NO, OURS),
        "loss": ("l2_feat, cos_feat, ce, kl_zs", "not published: ours"),
        "clean_weight": (">= 0", "not published: ours"),
        "adversary": ("offline, online", "not published; offline is inferred from '2k adversarial images'"),
    },
    "apd": {
        "teacher": ("online, zero_shot, fine_tuned, or a model", "online; the others are its ablations"),
        "teacher_epochs": (">= 1, or null", "not known: ours"),
        "same_start": (YES_NO, OURS),
        "beta": (">= 0, or null", "not known to us; too much of it costs clean accuracy"),
        "beta_mode": ("add, convex", "not known: add is ours"),
        "student_kl": ("teacher_first, student_first", "not known: ours"),
        "feedback_kl": ("student_first, teacher_first", "not known: ours"),
        "detach": ("both, none", "not known: ours"),
        "inner_loss": ("ce, kl_teacher, kl_self", "not known: ce as in the lab's other code"),
        "temperature": ("positive", OURS),
        "ce_weight": (">= 0", "0"),
        "clean_weight": (">= 0", "0"),
    },
    "advvp": {},
    "advvlp": {},
    "advmaple": {},
    "ivlp": {},
    "apt": {
        "adversary": ("onfly, constant, perturbed", "all three"),
        "prompt_step": ("a number", "inferred, by us"),
    },
    "advpt": {},
    "fap": {"trade_off": (">= 0", "1.5")},
}
PROMPTS = {
    "visual_tokens": (">= 0", "2 (labs)"),
    "visual_depth": (">= 1", "9 (labs)"),
    "text_tokens": (">= 0", "2 (labs), 16 (APT)"),
    "text_depth": (">= 1", "9 (labs), 1 (APT, AdvPT)"),
    "words": ("words", "a photo of a"),
    "sentence": ("words with {}", "a photo of a {}."),
    "coupling": ("independent, text_to_vision, vision_to_text", "by method"),
    "init_std": ("a number", "0.02"),
    "text_chunk": (">= 1, or null", "ours; changes no result"),
}
SHARED = {
    "epochs": ">= 1", "batch_size": ">= 1", "accumulate": ">= 1", "optimizer": "adamw, sgd", "lr": "a rate",
    "weight_decay": "a number", "warmup_steps": "steps", "clip_grad": "a norm, or null", "ema": "[0, 1)",
    "eps": "[0, 1)", "alpha": "a step, or null", "steps": ">= 1", "random_start": YES_NO, "momentum": "[0, 1)",
    "precision": "fp32, bf16, fp16", "teacher_precision": "auto, fp32, bf16",
    "templates": "an id of `rvlm ls templates`",
}  # fmt: skip

# folder -> attack, strong attack, as bench/methods.py ran them, and on what.
RUNS = {
    "digits": ("pgd-20", "autoattack", "Digits, all 1,297 scans"),
    "cifar10": ("pgd-20", "autoattack", "CIFAR-10, 2,500 images"),
    "prompts": ("pgd-100", "autoattack", "Digits, 16 scans a class"),
    "prompts-sweep": ("pgd-100", "apgd-ce-20", "Digits, 16 scans a class"),
    "prompts-resnet": ("apgd-t-20", "autoattack", "Digits, 16 scans a class, a ResNet CLIP"),
    "r_adapt": ("apgd-ce-20", "apgd-ce,apgd-t", "Digits"),
}


def page(text: str) -> str:
    """The page with its parts written anew."""
    write = {"methods": lambda what: methods(), "settings": settings, "presets": presets, "results": results}
    return PART.sub(lambda found: f"{found[1]}\n{write[found[2]](found[3])}\n\n{found[4]}", text)


def methods() -> str:
    rows = []
    for name in METHODS:
        where, learns, labels, (student, others), source = METHODS[name]
        more = f" and {others:g} of others" if others else ""
        rows.append([f"[{name}]({where}.md)", learns, labels, f"{student}{more}", f"{student / 3:.2f}", source])
    head = ["method", "what learns", "labels are needed for", "passes of a tower", "to TeCoA's", "source"]
    return markdown_table(head, rows)


def settings(what: str) -> str:
    """Defaults by the code, meanings by its docstrings."""
    if what == "shared":
        known = {name: (limits, None) for name, limits in SHARED.items()}
        return _settings(MethodConfig, known, paper=False)
    return _settings(*(PromptConfig, PROMPTS) if what == "prompts" else (method_class(what).Config, SETTINGS[what]))


def _settings(config: type, known: dict[str, tuple[str, str]], paper: bool = True) -> str:
    said, fields = meanings(config), {field.name: field for field in dataclasses.fields(config)}
    rows = []
    for name, (limits, has) in known.items():
        default = value(name, fields[name].default)
        rows.append([f"`{name}`", default, limits, *([has] if paper else []), said[name]])
    return markdown_table(["setting", "default", "range", *(["in the paper"] if paper else []), "what it is"], rows)


def presets(name: str) -> str:
    """Settings of which a preset, or the method itself, has another value than the config that it inherits from."""
    cls = method_class(name)
    parent = PromptConfig if issubclass(cls.Config, PromptConfig) else MethodConfig
    usual = {field.name: field.default for field in dataclasses.fields(parent)}
    fields = {field.name: field.default for field in dataclasses.fields(cls.Config)}
    differ = [
        key
        for key in fields
        if fields[key] != usual.get(key, fields[key]) or any(key in preset for preset in cls.presets.values())
    ]
    rows = [
        [
            f"`{key}`",
            value(key, fields[key]),
            *(value(key, given[key]) if key in given else "" for given in cls.presets.values()),
        ]
        for key in differ
    ]
    return markdown_table(["setting", "default", *(f"`{preset}`" for preset in cls.presets)], rows)


def results(what: str) -> str:
    """Means over seeds, plus or minus half of largest minus smallest, and what they are of."""
    folder, _, names = what.partition(" | ")
    folder, _, more = folder.partition(" + ")
    attack, strong, data = RUNS[folder]
    rows = runs(folder)
    radii = sorted({key.partition(" ")[2] for row in rows for key in row if re.fullmatch(r"pgd \S+", key)}, key=Eps)
    columns = {"clean": "clean"}
    for eps in radii:
        columns |= {f"pgd {eps}": f"{attack} {eps}", f"autoattack {eps}": f"{strong} {eps}"}
        for extra in ["transfer", *filter(None, more.split(", "))]:
            columns["proxy on its images " + eps if extra == "proxy" else f"{extra} {eps}"] = f"{extra} {eps}"
    wanted = [name.strip() for name in names.split(";")]
    mine = {name: [row for row in rows if row["name"] == name] for name in wanted}
    if missing := [name for name, found in mine.items() if not found]:
        raise ValueError(f"docs/results/{folder} has no row {', '.join(missing)}")
    columns = {
        key: title for key, title in columns.items() if any(key in row for found in mine.values() for row in found)
    }
    body = [
        [
            name,
            ", ".join(str(seed) for seed in sorted(row["seed"] for row in found)),
            *(_mean(found, key) for key in columns),
        ]
        for name, found in mine.items()
    ]
    n, few = ({row[key] for found in mine.values() for row in found} for key in ("samples", "few"))
    (n,), (few,) = n, few
    note = (
        f"{data}: clean accuracy and {attack} on {n} test images, {strong} on {few} of them, Linf, white-box, in per "
        "cent; means over seeds ± half the spread."
    )
    if any(title.startswith("transfer") for title in columns.values()):
        note += " transfer: images made on the undefended model."
    if "proxy" in more:
        note += " proxy: the proxy on images made for the student."
    if "joint" in more:
        note += " joint: PGD-20 on student and proxy (APD: its teacher) together."
    note += f" All columns: [{folder}](../results/{folder}.md)."
    note = textwrap.fill(note, 120, break_on_hyphens=False, break_long_words=False)
    return f"{note}\n\n" + markdown_table(["method", "seeds", *columns.values()], body)


def runs(folder: str) -> list[dict[str, Any]]:
    """The rows of a folder of runs, which must be of the attacks that RUNS says."""
    attack, strong, _ = RUNS[folder]
    rows = []
    for path in sorted((DOCS / "results" / folder).glob("*.json")):
        row = json.loads(path.read_text())["row"]
        told = f"{attack} {strong}-{row['few']}".translate(str.maketrans(" ,/", "---"))
        if f"-{told}-" not in path.name:
            raise ValueError(f"{path} is not of {attack} and {strong}")
        rows.append(row)
    return rows


def meanings(config: type) -> dict[str, str]:
    """The sentences under the fields of a config and of those that it inherits from."""
    said: dict[str, str] = {}
    for cls in reversed(config.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        for field, after in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                said[field.target.id] = " ".join(str(after.value.value).split())
    return said


def value(key: str, given: Any) -> str:
    if given is None:
        return "null"
    if key == "alpha":
        return f"{round(given * 255, 6):g}/255"
    if isinstance(given, float) and key != "eps":
        return f"{given:g}"
    return str(given).lower() if isinstance(given, bool) else str(given) or "empty"


def _mean(rows: list[dict[str, Any]], key: str) -> str:
    found = [100 * row[key] for row in rows if key in row]
    if not found:
        return "-"
    return f"{statistics.mean(found):.1f}" + (f" ±{(max(found) - min(found)) / 2:.1f}" if len(found) > 1 else "")


def main() -> None:
    if set(METHODS) != set(list_methods()):
        raise ValueError(f"METHODS has {sorted(METHODS)}, rvlm has {list_methods()}")
    for path in sorted((DOCS / "methods").glob("*.md")):
        path.write_text(page(path.read_text()))


if __name__ == "__main__":
    main()
