"""Records of answers: RUN/result/NAME.json, and the answers themselves beside it as JSON lines."""

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rvlm.evaluation.records import ANSWERS, environment, record_stem, write_json
from rvlm.files import write_bytes
from rvlm.lvlm.evaluate import AnswerScores
from rvlm.lvlm.model import Lvlm
from rvlm.lvlm.questions import Questions
from rvlm.models import Adapter
from rvlm.models.weights import settings_of, weights_sha

__all__ = ["answers_environment", "write_answers"]


def write_answers(
    folder: Path, results: list[AnswerScores], lvlm: Lvlm, data: Questions, adapter: Adapter | None,
    settings: Mapping[str, Any], *, eps: str, seconds: float, partial: bool,
    protocol: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Writes a record for each result of `evaluate_answers`, each whole or not at all.

    Args:
        folder: run folder.
        lvlm, data, adapter: what was evaluated, without the adapter and with it.
        settings: attack, aim, max_tokens, batch_size, seed and quantize, as `evaluate_answers` was given them.
        eps: as it is to be shown.
        partial: whether the data were cut.
        protocol: {"name", "sha"} if it is a part of one; then the file names hold the data's name, attack and eps, too.

    Returns:
        The summary rows.
    """
    rows, weights, beside, fingerprint = [], weights_sha(lvlm), settings_of(lvlm), data.fingerprint
    for result in results:
        place = [data.name, settings["attack"], eps] if protocol else []
        stem = record_stem(*place, result.name, result.target)
        row = {
            "name": result.name, "data": data.name, "clean": result.mean("score_clean"),
            "clean_ci": result.interval("score_clean"), "robust": result.mean("score_adv"),
            "robust_ci": result.interval("score_adv"), "relative_clean": result.relative("score_clean"),
            "relative_robust": result.relative("score_adv"), "loss_clean": result.mean("loss_clean"),
            "loss_robust": result.mean("loss_adv"), "score": result.score, "eps": eps, "attack": settings["attack"],
            "target": result.target, "samples": len(result.rows), "seconds": seconds, "record": f"result/{stem}.json",
        }  # fmt: skip
        if settings["aim"] is not None:
            row["aimed"] = result.mean("aim_adv")
        own = None if result.name == "before" else adapter
        record = {
            "schema": ANSWERS, "status": "partial" if partial else "complete", "protocol": protocol, **row,
            **settings, "norm": "linf", "model": lvlm.name, "model_sha": weights, "model_settings": beside,
            "dtype": str(lvlm.model.dtype), "adapter": own and dataclasses.asdict(own.config),
            "adapter_sha": own and weights_sha(own),
            "data": {"name": data.name, "size": lvlm.size, "partial": partial, "fingerprint": fingerprint},
            "rows": f"samples/{stem}.jsonl", "env": answers_environment(),
        }  # fmt: skip
        lines = "".join(json.dumps(answers, ensure_ascii=False) + "\n" for answers in result.rows)
        write_bytes(folder / record["rows"], lines.encode())
        write_json(folder / row["record"], record)
        rows.append(row)
    return rows


def answers_environment() -> dict[str, Any]:
    """Versions and switches that answers depend on."""
    return environment() | {"transformers": importlib.metadata.version("transformers")}
