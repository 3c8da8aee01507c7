"""Records: one JSON file per result, one npz file per result with a row per sample, and the summary made from them.

A record says everything that its numbers depend on, so that two of them can be compared, or seen to be incomparable:
which weights, which class names and prompts, which samples, which threat, which attack, and where it ran.
"""

import dataclasses
import functools
import importlib.metadata
import io
import json
import platform
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rvlm
from rvlm.data import Data, Fit
from rvlm.data.captions import Captions
from rvlm.data.images import Reader
from rvlm.data.prompts import fingerprint
from rvlm.evaluation.evaluate import Evaluation
from rvlm.evaluation.metrics import wilson
from rvlm.evaluation.resume import COLUMNS
from rvlm.evaluation.retrieval import Retrieval
from rvlm.evaluation.transfer import TransferMatrix
from rvlm.files import whole_file, write_bytes
from rvlm.models import Clip, ZeroShotClassifier
from rvlm.models.weights import differing, settings_of, weights_of, weights_sha
from rvlm.profiling import memory_peak
from rvlm.units import Eps

__all__ = [
    "environment", "measured_before", "packages", "record_rows", "record_stem", "summary_row", "write_evaluation",
    "write_json", "write_retrieval", "write_transfer",
]  # fmt: skip

SCHEMA, RETRIEVAL = "rvlm.result/1", "rvlm.retrieval/1"
TRANSFER, ANSWERS = "rvlm.transfer/1", "rvlm.answers/1"
SAMPLE_COLUMNS = ("index", "y", *COLUMNS)


def write_evaluation(
    folder: str | Path,
    name: str,
    evaluation: Evaluation,
    data: Data,
    classifier: Callable[[Tensor], Tensor],
    *,
    method: str | None = None,
    method_sha: str | None = None,
    processes: int = 1,
    source: Callable[[Tensor], Tensor] | None = None,
    protocol: Mapping[str, str] | None = None,
    examples: int | None = None,
) -> dict[str, Any]:
    """Writes FOLDER/result/NAME.json and FOLDER/samples/NAME.npz, each whole or not at all.

    If the evaluation has kept images, its first samples are also in FOLDER/samples/NAME-images.npz (clean, uint8
    [K, 3, H, W], and change, float16), and the model's likeliest words for them in the record.

    The record's "perf" is what this evaluation took. "shared_forward_images" in it, and of retrieval "shared_captions",
    were taken over from an earlier one (`clean` of `evaluate` and `retrieve`) and are in none of the other figures.

    Args:
        folder: run folder.
        name: what the row is called in the summary; the file names come from it, the attack and eps.
        evaluation: what was found.
        data: what it was found on; a cut one makes the record "partial".
        classifier: what was evaluated.
        method: how it was trained, if that is known.
        method_sha: hash of the method's file, if it is not rvlm's.
        processes: how many shared the work.
        source: what the images were crafted on, for transfer.
        protocol: {"name", "sha", "status"} if it is a part of one; then the file names hold the data's name, too.
        examples: how many of the kept images, at most; None: all of them.

    Returns:
        The summary row: name, data, clean, robust, their intervals, eps, attack, target, samples, seconds, record.
    """
    folder = Path(folder)
    place = [name, data.name] if protocol else [name]
    stem = record_stem(*place, evaluation.target, evaluation.attack, str(evaluation.eps))
    with whole_file(folder / "samples" / f"{stem}.npz") as file:
        np.savez_compressed(file, **{column: getattr(evaluation, column).numpy() for column in SAMPLE_COLUMNS})
    n, attacked = len(evaluation), max(evaluation.n_clean, 1)
    about = _describe(classifier, data, evaluation.resolution, method)
    about["model"]["method_sha"] = method_sha
    per_stage = dict.fromkeys((stage.name for stage in evaluation.stages), 0)
    for k, stage in enumerate(evaluation.stages):
        per_stage[stage.name] += int((evaluation.broken_by == k).sum())
    record = {
        "schema": SCHEMA,
        "status": _status(data, protocol),
        "name": name,
        "protocol": _protocol(protocol),
        **about,
        "source": _source(evaluation, data, source),
        "data": _describe_data(data),
        "threat": _threat(evaluation.norm, evaluation.eps, evaluation.target),
        "images": evaluation.images and evaluation.images.facts,
        "attack": {
            "name": evaluation.attack,
            "stages": evaluation.stage_records(),
            "refused": evaluation.refused,
            "seed": evaluation.seed,
            "batch": evaluation.batch_size,
            "quantize": evaluation.quantize,
            "precision": evaluation.precision,
            "disagreement": evaluation.disagreement,
        },
        "metrics": {
            "clean_acc": {"v": evaluation.clean, "ci95": evaluation.clean_ci, "n": n},
            "robust_acc": {"v": evaluation.robust, "ci95": evaluation.robust_ci, "n": n},
            "asr": (evaluation.n_clean - evaluation.n_robust) / attacked,
            "per_stage": per_stage,
            "over_steps": [evaluation.over_steps(k) for k in range(len(evaluation.stages))],
            "calibration": evaluation.calibration(),
        },
        "examples": _examples(folder, f"samples/{stem}-images.npz", evaluation, data, examples),
        "checks": evaluation.checks,
        "perf": {
            "wall_s": evaluation.seconds,
            "img_per_s": n / max(evaluation.seconds, 1e-9),
            "forward_images": evaluation.forwards,
            "backward_images": evaluation.backwards,
            "shared_forward_images": evaluation.cost.shared,
            "peak_mb": _peak_megabytes(),
            "processes": processes,
        },
        "cost": {"predicted": evaluation.cost.record()},
        "env": environment(),
        "samples": f"samples/{stem}.npz",
    }
    write_json(folder / "result" / f"{stem}.json", record)
    return summary_row(record, f"result/{stem}.json")


def _examples(folder: Path, name: str, evaluation: Evaluation, data: Data, most: int | None) -> dict[str, Any] | None:
    """Writes the first images of an evaluation; what the record says of them, None without images."""
    if evaluation.x_adv is None or most == 0:
        return None
    few = slice(0, len(evaluation.x_adv[:most]))
    clean, names, buffer = data.batch(few)[0], dict(enumerate(data.class_names)), io.BytesIO()
    change = (evaluation.x_adv[few] - clean).half().numpy()
    np.savez_compressed(buffer, clean=(clean * 255).round().to(torch.uint8).numpy(), change=change)
    write_bytes(folder / name, buffer.getvalue())

    def words(top: Tensor, prob: Tensor) -> list[list[tuple[str, float]]]:
        return [
            [(names.get(c, str(c)), p) for c, p in zip(*pair, strict=True) if c >= 0]
            for pair in zip(top[few].tolist(), prob[few].tolist(), strict=True)
        ]

    return {
        "images": name,
        "rule": f"the first {len(clean)} samples",
        "index": evaluation.index[few].tolist(),
        "labels": [names[c] for c in evaluation.y[few].tolist()],
        "clean": words(evaluation.top_clean, evaluation.prob_clean),
        "adversarial": words(evaluation.top_adv, evaluation.prob_adv),
    }


def write_transfer(
    folder: str | Path, matrix: TransferMatrix, data: Data, models: Mapping[str, Callable[[Tensor], Tensor]]
) -> list[dict[str, Any]]:
    """Writes FOLDER/result/transfer.json and FOLDER/samples/transfer.npz (index; right, correct of `TransferMatrix`).

    Args:
        folder: run folder.
        matrix: what was found.
        data: what it was found on.
        models: sources and targets by name.

    Returns:
        A summary row for each cell: name is the target, source the model whose images it saw.
    """
    folder = Path(folder)
    with whole_file(folder / "samples" / "transfer.npz") as file:
        np.savez_compressed(
            file, index=data.index.numpy(), right=matrix.right.numpy(), correct=matrix.correct.numpy()
        )  # fmt: skip
    resolution = list(data.batch(slice(0, 1))[0].shape[-2:])
    record = {
        "schema": TRANSFER,
        "status": _status(data),
        "models": {name: _describe(model, data, resolution, None) for name, model in models.items()},
        "data": _describe_data(data),
        "threat": _threat(matrix.norm, Eps(matrix.eps), "transfer"),
        "attack": {
            "name": matrix.attack,
            "seed": matrix.seed,
            "batch": matrix.batch_size,
            "stages": matrix.stage_records(),
        },
        "sources": matrix.sources,
        "targets": matrix.targets,
        "clean_acc": matrix.clean.tolist(),
        "robust_acc": matrix.robust.tolist(),
        "checks": matrix.checks,
        "perf": {"wall_s": matrix.seconds},
        "env": environment(),
        "samples": "samples/transfer.npz",
    }
    write_json(folder / "result" / "transfer.json", record)
    return record_rows(record, "result/transfer.json")


def write_retrieval(
    folder: str | Path,
    name: str,
    found: Retrieval,
    data: Captions,
    clip: Clip,
    *,
    method: str | None = None,
    processes: int = 1,
    source: Clip | None = None,
    protocol: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Writes FOLDER/result/NAME.json and FOLDER/samples/NAME.npz, as `write_evaluation` does.

    Returns:
        The summary row.
    """
    folder = Path(folder)
    place = [name, data.name] if protocol else [name]
    stem = record_stem(*place, found.target, found.attack, str(found.eps))
    columns = ("text_clean", "text_adv", "image_clean", "image_adv", "linf", "distance")
    ranks = {column: getattr(found, column).numpy() for column in columns}
    with whole_file(folder / "samples" / f"{stem}.npz") as file:
        np.savez_compressed(file, index=data.index.numpy(), owner=data.owner.numpy(), **ranks)
    record = {
        "schema": RETRIEVAL,
        "status": _status(data, protocol),
        "name": name,
        "protocol": _protocol(protocol),
        **_describe_clip(clip, found.resolution, method),
        "source": source and _describe_clip(source, found.resolution, None)["model"],
        "data": _describe_data(data) | {"captions": len(data.texts)},
        "threat": _threat(found.norm, found.eps, found.target),
        "attack": {"name": found.attack, "seed": found.seed, "batch": found.batch_size, "precision": "fp32"},
        "metrics": found.metrics,
        "checks": found.checks,
        "perf": {
            "wall_s": found.seconds,
            "shared_forward_images": found.cost.shared,
            "shared_captions": found.shared_captions,
            "peak_mb": _peak_megabytes(),
            "processes": processes,
        },
        "cost": {"predicted": found.cost.record()},
        "env": environment(),
        "samples": f"samples/{stem}.npz",
    }
    write_json(folder / "result" / f"{stem}.json", record)
    return summary_row(record, f"result/{stem}.json")


def measured_before(
    folder: Path,
    stem: str,
    data: Data,
    model: Callable[[Tensor], Tensor],
    source: Callable[[Tensor], Tensor] | None,
    protocol: Mapping[str, str],
) -> dict[str, Any] | None:
    """The summary row of FOLDER/result/STEM.json, if it is of these samples, models, prompts and protocol."""
    path = Path(folder) / "result" / f"{stem}.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    there = [
        record["status"], record["protocol"], record["data"]["fingerprint"],
        record["data"].get("first_image", data.first_image), record["model"]["sha256"],
        (record.get("source") or {}).get("sha256"), (record.get("text") or {}).get("templates"),
    ]  # fmt: skip
    here = [
        protocol["status"], _protocol(protocol), data.fingerprint, data.first_image, weights_of(model),
        weights_of(source), getattr(model, "templates", None),
    ]  # fmt: skip
    same = there == here and not any(
        differing(recorded_settings(record, role), one) for role, one in (("model", model), ("source", source))
    )
    return summary_row(record, f"result/{stem}.json") if same else None


def recorded_settings(record: Mapping[str, Any], role: str = "model") -> dict[str, Any]:
    """What a record says of its model or source beside the weights; of records before `settings`, the normalisation."""
    told = record.get(role) or {}
    if "settings" in told or role == "source" or told.get("source") == "callable":
        return told.get("settings", {})
    prefix = "clip." if record["schema"] == SCHEMA else ""
    return {prefix + name: record["input"][name] for name in ("mean", "std")}


def record_stem(*parts: str) -> str:
    """What the files of a record are called: NAME[-DATA]-TARGET-ATTACK-EPS."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).lstrip("-")  # a path must not read as a flag


def _status(data: Data, protocol: Mapping[str, str] | None = None) -> str:
    return protocol["status"] if protocol else "complete" if data.index_rule == "all" else "partial"


def _protocol(protocol: Mapping[str, str] | None) -> dict[str, str] | None:
    return protocol and {"name": protocol["name"], "sha": protocol["sha"]}


def _describe_data(data: Data) -> dict[str, Any]:
    return {
        "name": data.name,
        "split": data.split,
        "n_total": data.n_total,
        "n_used": len(data),
        "index_rule": data.index_rule,
        "index_sha": data.index_sha,
        "fingerprint": data.fingerprint,
        "first_image": data.first_image,
        "file_sha": data.file_sha,
        "resized": _resized(data),
    }


def _resized(data: Data) -> dict[str, Any] | None:
    """How images are brought to one size before anything else; None where they are left as they are."""
    fit = data.read.size if isinstance(data.read, Reader) else None
    return fit and dataclasses.asdict(fit if isinstance(fit, Fit) else Fit(fit))


def _source(evaluation: Evaluation, data: Data, source: Callable[[Tensor], Tensor] | None) -> dict[str, Any] | None:
    """What the images were made on, if it is not what was evaluated."""
    if evaluation.images is not None and evaluation.target == "transfer":
        facts = evaluation.images.facts
        return {"source": "images", "name": facts["model"], "sha256": facts["sha256"]}
    return source and _describe(source, data, evaluation.resolution, None)["model"]


def _threat(norm: str, eps: Eps, target: str) -> dict[str, Any]:
    return {"norm": norm, "eps": float(eps), "eps_str": str(eps), "space": "pixel[0,1]", "target": target}


def _describe(
    classifier: Callable[[Tensor], Tensor], data: Data, resolution: list[int], method: str | None
) -> dict[str, Any]:
    """The sections model, input and text of a record; what cannot be seen of a foreign callable is None."""
    names = fingerprint(data.class_names)
    if not isinstance(classifier, ZeroShotClassifier):
        name = getattr(classifier, "__qualname__", type(classifier).__name__)
        model = {"source": "callable", "name": name, "sha256": weights_of(classifier), "method": method}
        model |= {"settings": settings_of(classifier)}
        return {"model": model, "input": {"attack_res": resolution}, "text": {"classnames_sha": names}}
    clip = classifier.clip
    return _describe_clip(classifier, resolution, method) | {
        "text": {
            "classnames_sha": names,
            "templates": classifier.templates,
            "n_templates": len(classifier.templates),
            "templates_sha": fingerprint(classifier.templates),
            "logit_scale": clip.logit_scale.item(),
        },
    }


def _describe_clip(classifier: ZeroShotClassifier | Clip, resolution: list[int], method: str | None) -> dict[str, Any]:
    """The sections model and input, of a classifier or of the Clip itself."""
    clip = getattr(classifier, "clip", classifier)
    settings = clip.settings
    return {
        "model": {
            "source": "open_clip",
            "name": clip.name,
            "sha256": weights_sha(clip),
            "method": method,
            "quick_gelu": settings.pop("quick_gelu"),
            "settings": settings_of(classifier),
        },
        "input": settings
        | {
            "size": [clip.size, clip.size],
            "norm_in_graph": True,
            "attack_res": resolution,
            "resize_in_graph": resolution != [clip.size, clip.size],
        },
    }


def summary_row(record: dict[str, Any], path: str) -> dict[str, Any]:
    """The row of a record in summary.json and in tables. Of retrieval, clean and robust are text recall@1."""
    retrieval = record["schema"] == RETRIEVAL
    metrics = record["metrics"]
    clean, robust = (
        (metrics[which]["text_r@1"] for which in ("clean", "robust"))
        if retrieval
        else (metrics["clean_acc"], metrics["robust_acc"])
    )
    return {
        "name": record["name"],
        "data": record["data"]["name"],
        "metric": "text_r@1" if retrieval else "accuracy",
        "clean": clean["v"],
        "clean_ci": list(clean["ci95"]),
        "robust": robust["v"],
        "robust_ci": list(robust["ci95"]),
        "eps": record["threat"]["eps_str"],
        "norm": record["threat"]["norm"],
        "attack": record["attack"]["name"],
        "target": record["threat"]["target"],
        "samples": record["data"]["n_used"],
        "seconds": round(record["perf"]["wall_s"], 2),
        "record": path,
    }


def record_rows(record: dict[str, Any], path: str) -> list[dict[str, Any]]:
    """All summary rows of a record: one, or of a transfer matrix one for each cell.

    Raises:
        ValueError: a record of another kind, which has no clean and robust figure.
    """
    if record["schema"] in (SCHEMA, RETRIEVAL):
        return [summary_row(record, path)]
    if record["schema"] == TRANSFER:
        return _transfer_rows(record, path)
    if record["schema"] == ANSWERS:
        keys = ("name", "clean", "robust", "eps", "norm", "attack", "target", "samples", "seconds")
        row = {"data": record["data"]["name"], "metric": record["score"], "record": path}
        intervals = {key: list(record[key]) for key in ("clean_ci", "robust_ci") if key in record}
        return [row | {key: record[key] for key in keys} | intervals]
    raise ValueError(f"{record['schema']} has no clean and robust figure")


def _transfer_rows(record: dict[str, Any], path: str) -> list[dict[str, Any]]:
    """A row for each cell: name is the target, source the model whose images it saw."""
    n, clean, robust = record["data"]["n_used"], record["clean_acc"], record["robust_acc"]
    return [
        {
            "name": target,
            "source": source,
            "data": record["data"]["name"],
            "metric": "accuracy",
            "clean": clean[t],
            "clean_ci": list(wilson(round(clean[t] * n), n)),
            "robust": robust[s][t],
            "robust_ci": list(wilson(round(robust[s][t] * n), n)),
            "eps": record["threat"]["eps_str"],
            "norm": record["threat"]["norm"],
            "attack": record["attack"]["name"],
            "target": "white-box" if source == target else "transfer",
            "samples": n,
            "seconds": round(record["perf"]["wall_s"], 2),
            "record": path,
        }
        for s, source in enumerate(record["sources"])
        for t, target in enumerate(record["targets"])
    ]


def environment() -> dict[str, Any]:
    """Versions and switches that numbers depend on."""
    return {
        "rvlm": rvlm.__version__,
        **_git(),
        "torch": torch.__version__,
        "open_clip": importlib.metadata.version("open_clip_torch"),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
        "tf32": torch.backends.cuda.matmul.fp32_precision == "tf32",
        "mha_fastpath": False,
        "tf32_convolutions": torch.backends.cudnn.conv.fp32_precision == "tf32",
        "cudnn": {name: getattr(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic")},
        "sdpa": {
            name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")()
            for name in ("flash", "mem_efficient", "math", "cudnn")
        },
    }


def packages() -> list[str]:
    """What is installed, as NAME==VERSION in the order of names."""
    found = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    return [f"{name}=={found[name]}" for name in sorted(filter(None, found), key=str.lower)]


@functools.cache
def _git() -> dict[str, Any]:
    """Commit of the checkout that rvlm runs from, and whether it has changes; None where it is installed otherwise."""
    root = Path(rvlm.__file__).parents[1]
    if not (root / ".git").exists():
        return {"git": None, "dirty": None}
    try:
        run = functools.partial(subprocess.run, cwd=root, check=True, capture_output=True, text=True)
        commit = run(["git", "rev-parse", "HEAD"]).stdout.strip()
        return {"git": commit, "dirty": bool(run(["git", "status", "--porcelain", "-uno"]).stdout)}
    except (OSError, subprocess.CalledProcessError):
        return {"git": None, "dirty": None}


def _peak_megabytes() -> float | None:
    """Peak memory so far: of the device where there is one, else of this process."""
    peak = memory_peak("cuda" if torch.cuda.is_available() else "cpu")
    return None if peak is None else peak / 2**20


def write_json(path: str | Path, content: Any) -> Path:
    """Writes a file at once or not at all, readable by people."""
    return write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())
