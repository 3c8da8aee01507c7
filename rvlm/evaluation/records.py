"""Records: one JSON file per result, one npz file per result with a row per sample, and the summary made from them."""

import hashlib
import io
import json
import platform
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rvlm
from rvlm.data import Data
from rvlm.evaluation.evaluate import Evaluation
from rvlm.files import write_bytes

__all__ = ["environment", "summary_row", "write_evaluation", "write_json"]

SCHEMA = "rvlm.result/1"


def write_evaluation(
    folder: str | Path, name: str, evaluation: Evaluation, data: Data, model: dict[str, Any], *, partial: bool = False
) -> dict[str, Any]:
    """Writes FOLDER/result/NAME.json and FOLDER/samples/NAME.npz, each atomically.

    Args:
        folder: run folder.
        name: what the row is called in the summary; the file names come from it, the attack and eps.
        evaluation: what was found.
        data: what it was found on.
        model: facts about the model for the record.
        partial: the data were cut by --limit.

    Returns:
        The summary row: name, clean, robust, their intervals, eps, attack, target, samples, seconds, record.
    """
    folder = Path(folder)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{name}-{evaluation.target}-{evaluation.attack}-{evaluation.eps}")
    samples = {
        key: getattr(evaluation, key).numpy()
        for key in ("index", "y", "pred_clean", "pred_adv", "broken_by", "linf", "margin")
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **samples)
    write_bytes(folder / "samples" / f"{stem}.npz", buffer.getvalue())
    record = {
        "schema": SCHEMA,
        "status": "partial" if partial else "complete",
        "name": name,
        "model": model,
        "data": {
            "name": data.name,
            "split": data.split,
            "n_total": data.n_total,
            "n_used": len(data),
            "index_rule": data.index_rule,
            "fingerprint": data.fingerprint,
            "classnames_sha": hashlib.sha256(json.dumps(data.class_names).encode()).hexdigest()[:16],
        },
        "threat": {
            "norm": evaluation.norm,
            "eps": float(evaluation.eps),
            "eps_str": str(evaluation.eps),
            "space": "pixel[0,1]",
            "target": evaluation.target,
        },
        "attack": {
            "name": evaluation.attack,
            "stages": [vars(stage) for stage in evaluation.stages],
            "seed": evaluation.seed,
            "precision": "fp32",
        },
        "metrics": {
            "clean_acc": {"v": evaluation.clean, "ci95": evaluation.clean_ci, "n": len(evaluation)},
            "robust_acc": {"v": evaluation.robust, "ci95": evaluation.robust_ci, "n": len(evaluation)},
            "per_stage": {
                stage.name: int((evaluation.broken_by == k).sum()) for k, stage in enumerate(evaluation.stages)
            },
        },
        "checks": evaluation.checks,
        "perf": {
            "wall_s": evaluation.seconds,
            "img_per_s": len(evaluation) / max(evaluation.seconds, 1e-9),
            "forward_images": evaluation.forwards,
            "backward_images": evaluation.backwards,
        },
        "env": environment(),
        "samples": f"samples/{stem}.npz",
    }
    write_json(folder / "result" / f"{stem}.json", record)
    return summary_row(record, f"result/{stem}.json")


def summary_row(record: dict[str, Any], path: str) -> dict[str, Any]:
    """The row of a record in summary.json and in tables."""
    clean, robust = record["metrics"]["clean_acc"], record["metrics"]["robust_acc"]
    return {
        "name": record["name"],
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


def environment() -> dict[str, Any]:
    """Versions and switches that numbers depend on."""
    return {
        "rvlm": rvlm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "mha_fastpath": False,
    }


def write_json(path: str | Path, content: Any) -> Path:
    return write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())
