"""Records of answers: RUN/result/NAME.json, and the answers themselves beside it as JSON lines."""

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rvlm.evaluation.records import ANSWERS, environment, record_stem, write_json
from rvlm.files import write_bytes
from rvlm.lvlm.evaluate import RESULTS, AnswerScores
from rvlm.lvlm.model import Lvlm, what_answers
from rvlm.lvlm.questions import Questions
from rvlm.models import Adapter

__all__ = ["answered_before", "answers_environment", "write_answers"]

ROW = (
    "name", "data", "clean", "clean_ci", "robust", "robust_ci", "relative_clean", "relative_robust", "loss_clean",
    "loss_robust", "score", "eps", "attack", "target", "samples", "seconds", "record", "aimed",
)  # fmt: skip


def write_answers(
    folder: Path, results: list[AnswerScores], lvlm: Lvlm, data: Questions, adapter: Adapter | None,
    settings: Mapping[str, Any], *, eps: str, partial: bool, protocol: Mapping[str, str] | None = None,
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
    rows, described = [], _described(lvlm, data, adapter, settings, eps, partial, protocol)
    for result in results:
        stem, about = described[result.name, result.target]
        record = about | {
            "clean": result.mean("score_clean"), "clean_ci": list(result.interval("score_clean")),
            "robust": result.mean("score_adv"), "robust_ci": list(result.interval("score_adv")),
            "relative_clean": result.relative("score_clean"), "relative_robust": result.relative("score_adv"),
            "loss_clean": result.mean("loss_clean"), "loss_robust": result.mean("loss_adv"), "score": result.score,
            "samples": len(result.rows), "seconds": round(result.seconds, 2), "record": f"result/{stem}.json",
            "rows": f"samples/{stem}.jsonl", "env": answers_environment(),
        }  # fmt: skip
        if settings["aim"] is not None:
            record["aimed"] = result.mean("aim_adv")
        lines = "".join(json.dumps(answers, ensure_ascii=False) + "\n" for answers in result.rows)
        write_bytes(folder / record["rows"], lines.encode())
        write_json(folder / record["record"], record)
        rows.append(_summary_row(record))
    return rows


def answered_before(
    folder: Path, lvlm: Lvlm, data: Questions, adapter: Adapter | None, settings: Mapping[str, Any], *, eps: str,
    partial: bool, protocol: Mapping[str, str],
) -> list[dict[str, Any]] | None:  # fmt: skip
    """The summary rows of the records that `write_answers` would write, if an earlier attempt wrote all of them."""
    rows = []
    for stem, about in _described(lvlm, data, adapter, settings, eps, partial, protocol).values():
        path, here = folder / "result" / f"{stem}.json", json.loads(json.dumps(about))
        if not path.is_file():
            return None
        record = json.loads(path.read_text())
        same = all(record.get(name) == here[name] for name in here.keys() - {"model", "batch_size"})
        if not same or not (folder / record["rows"]).is_file():
            return None
        rows.append(_summary_row(record))
    return rows


def _described(
    lvlm: Lvlm, data: Questions, adapter: Adapter | None, settings: Mapping[str, Any], eps: str, partial: bool,
    protocol: Mapping[str, str] | None,
) -> dict[tuple[str, str], tuple[str, dict[str, Any]]]:  # fmt: skip
    """By the name and target of each result the name of its files, and what its record says that is known before."""
    about = {
        "schema": ANSWERS, "status": "partial" if partial else "complete", "protocol": protocol, **settings,
        "eps": eps, "norm": "linf", "model": lvlm.name,
        "data": {"name": data.name, "size": lvlm.size, "partial": partial, "fingerprint": data.fingerprint},
        **what_answers(lvlm, adapter),
    }  # fmt: skip
    place, plain = [data.name, settings["attack"], eps] if protocol else [], {"adapter": None, "adapter_sha": None}
    return {
        (name, target): (
            record_stem(*place, name, target),
            about | {"name": name, "target": target} | (plain if name == "before" else {}),
        )
        for name, target in (RESULTS if adapter is not None else RESULTS[:1])
    }


def _summary_row(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ROW if name in record} | {"data": record["data"]["name"]}


def answers_environment() -> dict[str, Any]:
    """Versions and switches that answers depend on."""
    return environment() | {"transformers": importlib.metadata.version("transformers")}
