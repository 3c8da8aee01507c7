"""What every command takes: its settings with their defaults and explanations, and the exit codes. No torch here."""

import dataclasses
from pathlib import Path

from rvlm.units import Eps

USAGE, DATA_MISSING, CHECK_FAILED = 2, 3, 4


class Arguments:
    """What the settings of all commands have in common."""

    config_text = ""  # all settings as YAML, for the run folder; set by the parser, not a setting itself


@dataclasses.dataclass(kw_only=True)
class DemoArgs(Arguments):
    """Train a small CLIP, break it, defend it, and write a report. Offline, about two minutes on two cores."""

    out: str = "rvlm-demo"
    """Folder for the report, records and images."""
    seed: int = 0
    """Seed of weights, data order and attack noise."""
    quick: bool = False
    """A shorter story (about 30 s): fewer epochs and samples, the same attacks."""


@dataclasses.dataclass(kw_only=True)
class InfoArgs(Arguments):
    """Versions, device, what was built, the backend of every op, and the reason for anything missing."""

    json: bool = False
    """Print JSON."""


@dataclasses.dataclass(kw_only=True)
class LsArgs(Arguments):
    """List what can be named: models, methods, attacks, datasets, templates, protocols, recipes."""

    what: str = "all"
    """One of those words, or all."""


@dataclasses.dataclass(kw_only=True)
class DataToolArgs(Arguments):
    """Data sets on disk: check NAME...|all looks through them, get NAME says where they come from and fetches what
    torchvision can, make-wds SPEC OUT writes any of them as WebDataset shards."""

    what: str = "check"
    """check, get or make-wds."""
    names: list[str] = dataclasses.field(default_factory=lambda: ["all"])
    """Names of `rvlm ls datasets` (all: every one), or other data specs; for make-wds a data spec and a folder."""
    root: str | None = None
    """Where the named sets lie; default $RVLM_DATA, or ./data."""
    split: str = "test"
    """For check and make-wds: split of the data."""
    images: bool = True
    """For check: decode every image."""
    download: bool = True
    """For get: let torchvision fetch what it can of the sets that are named (all fetches nothing)."""
    size: int | None = None
    """For make-wds: resize the shorter side to this and crop the centre; without, files go in as they are."""
    limit: int | None = None
    """For make-wds: this many samples, drawn with a fixed seed."""


@dataclasses.dataclass(kw_only=True)
class DataArgs(Arguments):
    data: str = "digits"
    """digits, a name of `rvlm ls datasets`, npz:PATH, folder:PATH, wds:PATH, parquet:PATH, torchvision:NAME:ROOT, or
    FILE.py:NAME, a callable (split, size) that returns Data."""
    split: str = "test"
    """Split of the data."""
    size: int | None = None
    """Resize the shorter side to this and crop the centre."""
    limit: int | None = None
    """Use this many samples, drawn with a fixed seed; marks results as partial."""
    templates: str = "auto"
    """Id of the prompt templates, or auto for the data set's own."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto."""
    seed: int = 0
    """Seed of the attack's random starts."""
    batch_size: int = 100
    """Images per forward."""


@dataclasses.dataclass(kw_only=True)
class ModelArgs(DataArgs):
    model: str = "digits-vit"
    """ARCH[:PRETRAINED] of open_clip, hf-hub:ORG/NAME, hf:PATH_OR_NAME (a CLIPModel of transformers), a checkpoint or
    run folder, digits-vit, digits-rn, digits-vit-tecoa, any of these with +weights=FILE (what another training script
    saved of it), or FILE.py:NAME, a callable from pixels in [0, 1] to logits."""


@dataclasses.dataclass(kw_only=True)
class CheckArgs(ModelArgs):
    """A report card on a model: pixel range, eval mode, determinism, probabilities, gradients, saturation."""

    limit: int | None = 64
    """Samples to look at."""


@dataclasses.dataclass(kw_only=True)
class AttackArgs(ModelArgs):
    """Attack a model and keep the adversarial images."""

    attack: str = "pgd-10"
    """pgd-N, autoattack, or another of `rvlm ls attacks`, or FILE.py:NAME, a callable (model, x, y, *, eps, ...);
    several with commas, each sees what the others left."""
    eps: Eps = Eps("8/255")
    """Radius in pixel units: 8/255 or 0.031."""
    norm: str = "linf"
    """linf, l2 or l1."""
    source: str | None = None
    """Craft the images on this model instead (transfer)."""
    format: str = "safetensors"
    """How the images are kept, for rvlm eval --images: safetensors, npz, or wds (tars of PNGs, valid uint8 by the
    attack)."""
    save_png: bool = False
    """Also write PNGs of the images that fool the model (valid uint8 by the attack) and score them as read back."""
    out: str | None = None
    """Run folder; default runs/attack-DATE."""


@dataclasses.dataclass(kw_only=True)
class EvalArgs(ModelArgs):
    """Clean and robust accuracy, with intervals, a record and a row per sample; on images with captions (flickr30k,
    coco, captions:FILE.json), recall at 1, 5 and 10 in both directions."""

    attack: str = "pgd-10"
    """pgd-N, autoattack, or another of `rvlm ls attacks`, or FILE.py:NAME, a callable (model, x, y, *, eps, ...);
    several with commas, each sees what the others left. On captions sga-N, coattack-N or pgd-N."""
    eps: str = "8/255"
    """Radii in pixel units, separated by commas: 4/255,8/255."""
    norm: str = "linf"
    """linf, l2 or l1."""
    precision: str = "fp32"
    """Of the attack: fp32, tf32, bf16, or cascade (search in bf16, verdicts in fp32, where the rest goes on)."""
    source: str | None = None
    """Craft the images on this model instead (transfer)."""
    images: str | None = None
    """Score images that rvlm attack saved, instead of attacking: FILE.safetensors, FILE.npz or a folder of tars."""
    protocol: str | None = None
    """Measure on all data sets of a protocol (`rvlm ls protocols`, or a YAML file), which then says what is attacked
    and how."""
    root: str | None = None
    """Where a protocol's data sets lie; default $RVLM_DATA, or ./data."""
    examples: int = 4
    """Of classifications, keep so many images, the first of the samples, for rvlm report; 0: none."""
    dry_run: bool = False
    """Say what it will cost, in passes through the model and in time, and end."""
    out: str | None = None
    """Run folder; default runs/eval-DATE. Give the folder of a run that was killed to go on with it."""


@dataclasses.dataclass(kw_only=True)
class AnalyzeArgs(DataArgs):
    """Look into models. transfer: who is fooled by whose images. Of a base and a robust tower: cka, how alike layers
    are; replace, accuracy while one's modules take the other's place; spectrum, attention, insensitivity, drift."""

    what: str = "transfer"
    """transfer, cka, replace, spectrum, attention, insensitivity or drift."""
    models: str | None = None
    """Models, separated by commas, each as --model elsewhere; for all but transfer two CLIPs, the base first. Default
    digits-vit,digits-rn for transfer and digits-vit,digits-vit-tecoa for the others."""
    targets: str | None = None
    """Score the images on these instead, separated by commas; default the models themselves."""
    attack: str = "pgd-10"
    """pgd-N, tifgsm-N, or another of `rvlm ls attacks`; several with commas."""
    eps: Eps = Eps("8/255")
    """Radius in pixel units: 8/255 or 0.031."""
    norm: str = "linf"
    """linf, l2 or l1."""
    tokens: str = "cls"
    """For cka: cls, mean or all."""
    unbiased: bool = False
    """For cka: the unbiased estimator."""
    single: bool = False
    """For replace: one unit at a time instead of all up to it."""
    normalise: str = "relative"
    """For spectrum: relative or raw."""
    block: int = 0
    """For attention and insensitivity: number of the block, from 0."""
    reduce: str = "cls"
    """For attention: what the class token looks at (cls), or how much each patch is looked at (received)."""
    out: str | None = None
    """Run folder; default runs/analyze-DATE."""


@dataclasses.dataclass(kw_only=True)
class TrainArgs(Arguments):
    """Train a model with a method; `rvlm train METHOD --help` lists the method's own settings too."""

    method: str = ""
    """Name of the method (rvlm ls methods), or FILE.py:NAME, a class; also the first word after train."""
    preset: str = "rvlm"
    """Settings to start from: paper, code or rvlm."""
    student: str = "digits-vit"
    """Model to train: as --model elsewhere, or tiny-vit, tiny-rn (random weights)."""
    data: str = "digits"
    """digits, a name of `rvlm ls datasets`, npz:PATH, folder:PATH, wds:PATH, parquet:PATH, torchvision:NAME:ROOT, or
    FILE.py:NAME, a callable (split, size) that returns Data."""
    split: str = "train"
    """Split to train on."""
    size: int | None = None
    """Resize the shorter side to this and crop the centre."""
    limit: int | None = None
    """Train on this many samples."""
    shots: int | None = None
    """Train on this many samples of every class instead, drawn with the seed."""
    draw: str = "rvlm"
    """Who draws them: rvlm, or coop for the samples that CoOp trains on with this seed (sets in its layout)."""
    validate: int = 0
    """Hold out this many training samples, report on them after every epoch and keep the best model in best/."""
    eval_data: str | None = None
    """Data to evaluate on before and after; default the same data, split test."""
    eval_attack: str = "pgd-10"
    """Attack of that evaluation (white-box, at the method's eps)."""
    eval_limit: int | None = None
    """Samples of that evaluation."""
    seed: int = 0
    """Seed of weights, data order and attack noise."""
    parallel: str = "ddp"
    """What the processes of torchrun do: ddp, or fsdp to cut up a vision tower that is too large for one device."""
    tensorboard: bool = False
    """Also write the log for TensorBoard (pip install "rvlm[tensorboard]")."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto."""
    out: str | None = None
    """Run folder; default runs/train-DATE."""


@dataclasses.dataclass(kw_only=True)
class ProfileArgs(Arguments):
    """Where the time goes, per phase, with FLOPs and memory. train: an epoch of each stage of a method; attack: an
    attack on images in memory; eval: an evaluation, from reading images to the record; infer: forward passes of a model
    and of defended ones beside it."""

    what: str = "train"
    """train, attack, eval or infer."""
    method: str = "tecoa"
    """For train: name of the method (rvlm ls methods)."""
    preset: str = "rvlm"
    """For train: its settings."""
    model: str = "digits-vit"
    """The model that is trained, attacked or asked, as --model elsewhere; for infer the plain one."""
    defended: str | None = None
    """For infer: models to compare with it, separated by commas, each as --model elsewhere."""
    batch_sizes: str = "1,32"
    """For infer: images of a forward pass, separated by commas."""
    twin: str | None = None
    """For train: FILE.py:NAME of another loop to compare with, as bench/peers/train.py:epoch: called with the method,
    the model and the data, it returns a function that trains a copy for an epoch and returns the images that it saw."""
    rounds: int | None = None
    """How often both are timed, in turn: with --twin 3 times, by infer 20 times, unless this says otherwise."""
    attack: str = "pgd-10"
    """For attack and eval: as rvlm eval --attack."""
    eps: Eps = Eps("8/255")
    """For attack and eval: radius in pixel units, 8/255 or 0.031."""
    norm: str = "linf"
    """For attack and eval: linf, l2 or l1."""
    precision: str = "fp32"
    """For attack and eval, of the attack: fp32, tf32, bf16 or cascade."""
    engine: str = "auto"
    """For attack: auto, eager, compile or cudagraph."""
    batch_size: int = 100
    """For attack and eval: images per forward."""
    data: str = "digits"
    """digits, a name of `rvlm ls datasets`, npz:PATH, folder:PATH, wds:PATH, parquet:PATH, torchvision:NAME:ROOT, or
    FILE.py:NAME, a callable (split, size) that returns Data."""
    size: int | None = None
    """Resize the shorter side to this and crop the centre."""
    limit: int = 256
    """Samples."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto."""
    trace: str | None = None
    """For train, attack and eval: FILE.json or FILE.json.gz for a Chrome trace of one batch more, phases over ops."""
    flame: str | None = None
    """The same as a flame chart: FILE.html, which needs nothing from outside."""
    json: bool | str = False
    """Print JSON; with FILE.json, write it there and print the table."""


@dataclasses.dataclass(kw_only=True)
class BenchArgs(ModelArgs):
    """The benchmarks of a source checkout, by name or all, compared with a run that was saved. With --mine your own
    PGD: is it correct (ball, box, the model left as it was, strength), and how fast is it beside rvlm's."""

    suites: list[str] = dataclasses.field(default_factory=list)
    """Files of bench/ without bench_ and .py: steps, pgd, ...; none for all."""
    only: str | None = None
    """For suites: cells whose names fit, as pytest -k."""
    save: str | None = None
    """For suites: keep the run, machine and versions under this name, in .benchmarks."""
    compare: str | None = None
    """For suites: name of a run that was saved, or a JSON file of pytest-benchmark, to compare with cell by cell."""
    fail_above: float | None = None
    """With --compare: fail (exit code 4) if a cell's median is more than this many per cent longer, and its quartiles
    do not overlap with those before."""
    mine: str = ""
    """FILE.py:NAME, a callable (model, images, labels, ...) that returns adversarial images. Of eps, alpha and steps it
    is passed those that it takes, also under names such as epsilon, step_size, num_steps."""
    eps: Eps = Eps("8/255")
    """Radius in pixel units: 8/255 or 0.031."""
    alpha: Eps | None = None
    """Step size in pixel units; default 2.5 eps / steps."""
    steps: int = 10
    """Steps of both attacks."""
    norm: str = "linf"
    """linf, l2 or l1."""
    rounds: int = 5
    """How often both are timed, in turn."""
    limit: int | None = 64
    """Samples."""
    json: bool = False
    """Print JSON."""


@dataclasses.dataclass(kw_only=True)
class CompareArgs(Arguments):
    """Compare two records of the same samples and the same threat: differences, and whether chance explains them."""

    a: str = ""
    """A record: RUN/result/NAME.json."""
    b: str = ""
    """Another one."""
    json: bool = False
    """Print JSON."""


@dataclasses.dataclass(kw_only=True)
class ReportArgs(Arguments):
    """Tables and figures of runs: one HTML file that needs nothing from outside, Markdown, CSV or LaTeX."""

    runs: list[str] = dataclasses.field(default_factory=list)
    """Run folders, folders of runs or of records, records (RUN/result/NAME.json), summary.json, metrics.jsonl."""
    out: str | None = None
    """FILE.html, .md, .csv or .tex; figures lie beside it in FILE-figures. Without, tables are printed as Markdown."""
    title: str | None = None
    """Heading."""
    leaderboard: bool = False
    """Rank the models of one folder of records, with what its *.yaml say of them (see rvlm/report/leaderboard.py)."""
    published: bool = False
    """Published figures, each with its source and how far to trust it, and those of the runs beside them."""


@dataclasses.dataclass(kw_only=True)
class ReproArgs(Arguments):
    """Rerun the evaluation of a record and say whether it holds; other weights or samples than its own are refused."""

    record: str = ""
    """RUN/result/NAME.json, of eval, attack, train, analyze transfer or lvlm."""
    model: str | None = None
    """Where its model is now, as --model elsewhere; default where it was. Of a transfer matrix all, with commas."""
    source: str | None = None
    """The same of the model that its images were made on."""
    adapter: str | None = None
    """The same of an LVLM's adapter."""
    data: str | None = None
    """The same of its data, as --data elsewhere."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto."""
    json: bool = False
    """Print JSON."""
    out: str | None = None
    """Run folder of the new record; default runs/repro-DATE."""


@dataclasses.dataclass(kw_only=True)
class ConvertArgs(Arguments):
    """Write a CLIP for another library, with a model card: open_clip, hf (a CLIPModel of transformers), or visual (the
    vision tower alone, as RobustVLM loads it)."""

    src: str = ""
    """A model as --model elsewhere; or, with --base, a checkpoint file of another training script."""
    dst: str = ""
    """Folder to write; it must be empty, or not be there."""
    to: str = "open_clip"
    """open_clip, hf or visual."""
    base: str | None = None
    """The CLIP that the weights of a file belong onto, such as ViT-B-32:openai; the same as BASE+weights=FILE."""
    runs: str | None = None
    """Run folders, separated by commas, whose records of these weights the card shows; default SRC, if it is one."""


@dataclasses.dataclass(kw_only=True)
class LvlmArgs(Arguments):
    """Attack what an LVLM says about images, and score its answers before and after; with an adapter, those too."""

    model: str = ""
    """LLaVA-1.5, Qwen2.5-VL or Qwen3-VL of transformers: a folder or a name on the hub."""
    data: str = ""
    """File of JSON lines {"image": PATH, "question": TEXT, "answers": [TEXT, ...]}. Without a question a caption is
    asked for; without answers the model's own, to the clean image, is what the attack is to change. Or a benchmark,
    coco-captions, vqav2 or pope-adversarial, -popular, -random, each with :ROOT (see rvlm/lvlm/layouts.py)."""
    protocol: str | None = None
    """Ask all that a protocol asks of LVLMs (`rvlm ls protocols`, or a YAML file), which then says what is attacked and
    how."""
    root: str | None = None
    """Where a protocol's data sets lie; default $RVLM_DATA, or ./data."""
    adapter: str | None = None
    """Also evaluate the model with an adapter: white (R-Adapt without training), or a folder."""
    attack: str = "pgd-10"
    """pgd-STEPS or apgd-STEPS, Linf, on the likelihood of the answer that is given most often."""
    eps: Eps = Eps("4/255")
    """Radius in pixel units: 4/255 or 0.016."""
    aim: str | None = None
    """An answer that the attack is to make the model give, instead of any other than the first."""
    score: str = "f1"
    """f1 (words in common with the best answer), vqa (VQA accuracy) or cider (CIDEr-D, of captions)."""
    max_tokens: int = 20
    """Of an answer."""
    size: int | None = None
    """Height and width of the images; default the tower's own, or 448 for Qwen-VL."""
    limit: int | None = None
    """Only the first so many lines."""
    batch_size: int = 8
    """Images per forward."""
    dtype: str = "auto"
    """fp32, bf16, or auto: as the model is stored, and bf16 where that is fp16."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto."""
    seed: int = 0
    """Seed of the attack's random starts."""
    save_png: bool = False
    """Also write the adversarial images as PNGs (valid uint8 by the attack); such a run begins anew when killed."""
    out: str | None = None
    """Run folder; default runs/lvlm-DATE. Give the folder of a run that was killed to go on with it."""


COMMANDS: dict[str, type] = {
    "demo": DemoArgs,
    "info": InfoArgs,
    "ls": LsArgs,
    "data": DataToolArgs,
    "attack": AttackArgs,
    "eval": EvalArgs,
    "check": CheckArgs,
    "compare": CompareArgs,
    "convert": ConvertArgs,
    "repro": ReproArgs,
    "analyze": AnalyzeArgs,
    "train": TrainArgs,
    "profile": ProfileArgs,
    "bench": BenchArgs,
    "lvlm": LvlmArgs,
    "report": ReportArgs,
}


def recipes() -> list[str]:
    """Names of the bundled recipes."""
    root = Path(__file__).parent / "recipes"
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))
