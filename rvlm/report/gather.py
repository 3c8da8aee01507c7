"""What runs have left on disk, as rows that a report can be made of, and which of them may stand beside each other.

Rows share a case if protocol, measure, norm, eps, attack, target (and for transfer the source) are the same and both
are complete or both partial: a table or a mean is of one case. Within a case, rows of one data set may still differ in
what `rvlm compare` asks for (samples, seed, resizing, ...) or in the prompts; then each has a letter for its set-up.
"""

import dataclasses
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from rvlm.evaluation.compare import setting
from rvlm.evaluation.records import SCHEMA, record_rows

__all__ = ["Case", "Found", "cases", "differences", "gather", "shared_means"]


@dataclasses.dataclass(frozen=True)
class Case:
    """What rows of one table have in common."""

    protocol: str
    metric: str
    norm: str
    eps: str
    attack: str
    target: str
    source: str
    status: str

    @classmethod
    def of(cls, row: dict[str, Any]) -> "Case":
        return cls(**{field.name: row.get(field.name) or "" for field in dataclasses.fields(cls)})

    def __str__(self) -> str:
        where = f"{self.target} from {self.source}" if self.source else self.target
        words = [self.attack, f"{self.norm.capitalize()} {self.eps}".rstrip(), where]
        words += [self.metric] if self.metric != "accuracy" else []
        words += [self.status] if self.status != "complete" else []
        return (f"{self.protocol}: " if self.protocol else "") + ", ".join(words)


@dataclasses.dataclass
class Found:
    """What was found.

    Attributes:
        rows: summary rows of all records, with protocol, status, method, run, weights, setting and failed checks, and
            where the record has them the curves over steps, the calibration and the examples, their images by path.
        histories: rows of metrics.jsonl by the name of the run.
        left_out: files that hold no clean and robust figure, with the reason.
        environments: of the records, without repetition.
    """

    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    histories: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    environments: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def gather(paths: list[str | Path]) -> Found:
    """Reads runs.

    Args:
        paths: run folders, folders of runs or of records, records (RUN/result/NAME.json), summary.json, metrics.jsonl.

    Raises:
        FileNotFoundError: a path is missing or holds nothing to report. ValueError: a file that cannot be read.
    """
    files: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"no {path}: expected a run folder, a record, summary.json or metrics.jsonl")
        inside = _inside(path) if path.is_dir() else [path]
        if not inside:
            raise FileNotFoundError(
                f"{path} holds no record: expected result/*.json, summary.json or metrics.jsonl in it"
            )
        files |= {file.resolve(): file for file in inside}
    found = Found()
    runs = _run_names([_run_folder(file) for file in files.values()])
    for file in files.values():
        run = runs[_run_folder(file).resolve()]
        if file.suffix == ".jsonl":
            found.histories[run] = [_json(line, file) for line in file.read_text().splitlines() if line.strip()]
            continue
        content = _json(file.read_text(), file)
        schema = content.get("schema") if isinstance(content, dict) else None
        if schema == "rvlm.summary/1":
            _read_summary(found, content, file, run)
        elif not isinstance(schema, str):
            raise ValueError(f"{file} is no record: expected a JSON object with a schema")
        else:
            _read_record(found, content, file, run)
    if found.left_out and not (found.rows or found.histories):
        file, reason = next(iter(found.left_out.items()))
        raise FileNotFoundError(f"nothing to report in {len(found.left_out)} files: {file}: {reason}")
    _tell_apart(found.rows)
    return found


def cases(rows: list[dict[str, Any]]) -> dict[Case, list[dict[str, Any]]]:
    """Rows by case, each with its set-up as a letter where rows of one data set differ ("" elsewhere)."""
    by_case: dict[Case, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_case[Case.of(row)].append(row)
    for some in by_case.values():
        letters: dict[str, list[dict]] = defaultdict(list)
        for row in some:
            if row["setting"] not in letters[row["data"]]:
                letters[row["data"]].append(row["setting"])
        for row in some:
            several = letters[row["data"]]
            row["setup"] = chr(ord("a") + several.index(row["setting"])) if len(several) > 1 else ""
        some.sort(key=lambda row: (row["data"], row["name"]))
    return dict(by_case)


def differences(rows: list[dict[str, Any]]) -> str:
    """Which data sets of a case have rows of more than one set-up, and in what those differ; "" if none has."""
    lines = []
    for data in dict.fromkeys(row["data"] for row in rows if row["setup"]):
        settings = [row["setting"] for row in rows if row["data"] == data]
        what = [key for key in settings[0] if any(one.get(key) != settings[0][key] for one in settings)]
        lines.append(f"{data}: {', '.join(what)}")
    return f"Rows with different letters differ in more than the model ({'; '.join(lines)})." if lines else ""


def shared_means(rows: list[dict[str, Any]]) -> tuple[list[str], dict[str, tuple[float, float]]]:
    """Of the rows of a case: the data sets that all its models have, and by model mean clean and robust over them."""
    by_model: dict[str, dict[str, dict]] = defaultdict(dict)
    for row in rows:
        by_model[row["name"]][row["data"]] = row
    shared = [data for data in by_model[rows[0]["name"]] if all(data in own for own in by_model.values())]
    if not shared:
        return [], {}
    return shared, {
        name: tuple(sum(own[data][key] for data in shared) / len(shared) for key in ("clean", "robust"))
        for name, own in by_model.items()
    }


def _inside(folder: Path) -> list[Path]:
    """Records and logs below a folder; where a run has no records, its summary."""
    records = [*folder.rglob("result/*.json")]
    records += [file for file in folder.glob("*.json") if _is_record(file)]
    covered = {_run_folder(file) for file in records}
    summaries = [file for file in folder.rglob("summary.json") if _run_folder(file) not in covered]
    return sorted([*records, *summaries, *folder.rglob("metrics.jsonl")])


def _is_record(file: Path) -> bool:
    if file.name in ("summary.json", "manifest.json"):
        return False
    content = _json(file.read_text(), file)
    return isinstance(content, dict) and str(content.get("schema")).startswith("rvlm.")


def _run_folder(file: Path) -> Path:
    folder = file.absolute().parent
    return folder.parent if folder.name == "result" else folder


def _run_names(folders: list[Path]) -> dict[Path, str]:
    """Last parts of the folders' names, as many as it takes to tell them apart."""
    folders = list(dict.fromkeys(folder.resolve() for folder in folders))
    depth, names = 0, []
    while len(set(names)) < len(folders):
        depth += 1
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
    return dict(zip(folders, names, strict=True))


def _read_summary(found: Found, summary: dict[str, Any], file: Path, run: str) -> None:
    """Rows by their records; a row whose record is gone stands as it is, of no known set-up."""
    seen = set()
    for row in summary["rows"]:
        record = file.parent / str(row.get("record"))
        if record in seen:
            continue
        if record.is_file():
            seen.add(record)
            _read_record(found, _json(record.read_text(), record), record, run)
        elif {"name", "clean", "robust"} <= set(row):
            unknown = {"protocol": "", "status": "unknown", "method": None, "weights": None, "failed": []}
            found.rows.append({"data": "", "metric": "accuracy"} | row | unknown | {"run": run, "setting": {}})
        else:
            found.left_out[f"{file}, {row.get('name')}"] = "no clean and robust figure"


def _read_record(found: Found, record: dict[str, Any], file: Path, run: str) -> None:
    try:
        rows = record_rows(record, str(file))
    except ValueError as error:
        found.left_out[str(file)] = str(error)
        return
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is no whole record of schema {record['schema']}: {error!r} is missing") from None
    protocol, model = record.get("protocol"), record.get("model")
    model = model if isinstance(model, dict) else {}
    source = (record.get("source") or {}).get("name")
    own = setting(record) | {"prompts": (record.get("text") or {}).get("templates_sha")}
    about = {
        "protocol": f"{protocol['name']} {protocol['sha']}" if protocol else "",
        "status": record.get("status") or ("partial" if record.get("data", {}).get("partial") else "complete"),
        "method": model.get("method"),
        "weights": model.get("sha256"),
        "failed": [check for check in record.get("checks", []) if not check["ok"]],
        "setting": own,
        "run": run,
    }
    if record["schema"] == SCHEMA:  # records of before have none of these
        metrics, examples = record["metrics"], record.get("examples")
        about |= {"over_steps": metrics.get("over_steps"), "calibration": metrics.get("calibration")}
        about["examples"] = examples and examples | {"images": _run_folder(file) / examples["images"]}
    for row in rows:
        row["source"] = "" if row["target"] == "white-box" else row.get("source") or source or ""
        found.rows.append(row | about)
    if record.get("env") and record["env"] not in found.environments:
        found.environments.append(record["env"])


def _tell_apart(rows: list[dict[str, Any]]) -> None:
    """Puts the run before a name that several models have, or that a case has twice for one data set."""
    weights: dict[str, set] = defaultdict(set)
    for row in rows:
        weights[row["name"]].add(row["weights"] or row["run"])
    twice = Counter((Case.of(row), row["data"], row["name"]) for row in rows)
    again = {name for (_, _, name), count in twice.items() if count > 1}
    for row in rows:
        if len(weights[row["name"]]) > 1 or row["name"] in again:
            row["name"] = f"{row['run']}: {row['name']}"


def _json(text: str, file: Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
