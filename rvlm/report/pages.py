"""Reports as files: the same tables as HTML, Markdown, CSV or LaTeX, the first two with figures.

    found = gather(["runs/clip", "runs/tecoa"])
    write_report("report.html", "Two models", result_tables(found), figures(found, "report-figures"), facts(found))

Every format has one writer; what differs between a report of runs, a leaderboard and published figures is the tables.
"""

import dataclasses
import math
import re
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rvlm.evaluation.metrics import pooled_reliability
from rvlm.files import write_bytes
from rvlm.report.gather import Case, Found, cases, differences, shared_means
from rvlm.report.html import LEGEND, write_html
from rvlm.report.plots import (
    accuracy_over_eps,
    accuracy_over_steps,
    bars,
    heat_map,
    pareto,
    reliability_curves,
    training_curves,
    words_grid,
)
from rvlm.report.tables import Table, csv_text, latex, markdown

__all__ = ["check_format", "facts", "figures", "result_tables", "write_report"]

MOST_BARS = 40  # of one figure; more are a heat map
MOST_GRIDS = 8  # of images; those of other records stay beside them
FORMATS = (".html", ".md", ".csv", ".tex")
RESULT = {"clean": "clean %", "robust": "robust %", "samples": "samples"}


def result_tables(found: Found) -> list[Table]:
    """A table for each case, with the means of models over the data sets that all of them have."""
    tables = []
    for case, rows in cases(found.rows).items():
        rows = [row | {"checks": ", ".join(check["id"] for check in row["failed"])} for row in rows]
        shared, means = shared_means(rows)
        notes = [differences(rows)]
        columns = {"name": "model", "data": "data"} | ({"setup": "set-up"} if notes[0] else {}) | RESULT
        columns |= {"checks": "failed checks"} if any(row["checks"] for row in rows) else {}
        if len({row["data"] for row in rows}) > 1:
            notes.append(
                f"Means are over the data sets that all models of this table have: {', '.join(shared) or 'none'}."
            )
            under = dataclasses.asdict(case) | {"data": f"mean of {len(shared)} sets", "samples": ""}
            rows += [under | {"name": name, "clean": c, "robust": r} for name, (c, r) in means.items()]
        tables.append(Table(str(case), rows, columns, " ".join(note for note in notes if note)))
    return tables


def figures(found: Found, folder: str | Path) -> list[tuple[str, Path]]:
    """Draws what the rows allow: accuracy over eps and over steps, clean against robust, bars by data set, calibration,
    images with the model's words, training curves.

    Returns:
        (caption, PNG); the numbers of each lie beside it as CSV.
    """
    folder, drawn = Path(folder), []
    by_case = cases(found.rows)

    def add(caption: str, draw, values, *args) -> None:
        stem = re.sub(r"[^a-z0-9]+", "-", caption.partition(":")[0].lower())
        drawn.append((caption, draw(folder / f"{len(drawn) + 1:02d}-{stem}.png", values, *args)))

    for about, curves in _curves(by_case).items():
        add("Accuracy over the radius", accuracy_over_eps, curves, about)
    for case, rows in by_case.items():
        shared, means = shared_means(rows)
        about = f"{_where(shared, rows)}; {case}"
        if curves := _over_steps(rows, shared):
            add(f"Accuracy over steps: {about}", accuracy_over_steps, curves, about)
        if len(means) > 1:
            add("Clean against robust", pareto, means, about)
        if len(shared) > 1:
            of = {(row["name"], row["data"]): row for row in rows}
            values = {name: [100 * of[name, data]["robust"] for data in shared] for name in means}
            if len(shared) * len(values) <= MOST_BARS:
                add("By data set", bars, values, shared, about, "robust, %")
            else:
                shares, title = torch.tensor([*values.values()]) / 100, f"robust %; {about}"
                table = dict(rows=[*values], columns=shared, ylabel="model", xlabel="data", title=title, percent=True)
                add("By data set", partial(heat_map, **table), shares)
        if pooled := _calibration(rows, shared):
            add(f"Confidence and accuracy: {about}", reliability_curves, pooled, about)
    for case, row in _shown(by_case)[:MOST_GRIDS]:
        few, about = row["examples"], f"{row['name']} on {row['data']}; {case}"
        with np.load(few["images"]) as images:
            clean, change = (torch.from_numpy(images[name]).float() for name in ("clean", "change"))
        told = (change, few["labels"], few["clean"], few["adversarial"], f"{about}; {few['rule']}")
        add(f"Images and words: {about}", words_grid, clean / 255, *told)
    if found.histories:
        add("Training", training_curves, found.histories)
    return drawn


def facts(found: Found) -> dict[str, str]:
    """Where the numbers come from, what was left out, and every check that failed."""
    versions = sorted({f"rvlm {env['rvlm']}, torch {env['torch']}, {env['device']}" for env in found.environments})
    lines = {"records": str(len({row["record"] for row in found.rows}))}
    lines |= {"made with": "; ".join(versions)} if versions else {}
    lines |= {f"left out: {name}": reason for name, reason in found.left_out.items()}
    if (grids := len(_shown(cases(found.rows)))) > MOST_GRIDS:
        lines["images"] = f"those of {MOST_GRIDS} records of {grids}; the others lie in samples/ beside their records"
    for row in found.rows:
        for check in row["failed"]:
            lines[f"WARNING {check['id']}: {row['name']} on {row['data']}, {Case.of(row)}"] = check["detail"]
    return lines


def write_report(
    path: str | Path,
    title: str,
    tables: list[Table],
    drawn: list[tuple[str, Path]] | None = None,
    about: dict[str, str] | None = None,
    intro: str = "",
    legend: str = LEGEND,
) -> Path:
    """Writes a report in the format that its ending names, whole or not at all.

    Args:
        path: FILE.html (one file, figures inside), .md (figures beside it), .csv or .tex (tables alone).
        title, intro: heading and what stands under it.
        tables: what it holds.
        drawn: (caption, PNG).
        about: what the numbers depend on.
        legend: what the columns mean.

    Raises:
        ValueError: another ending.
    """
    path, drawn, about = Path(path), drawn or [], about or {}
    check_format(path)
    if path.suffix == ".html":
        return write_html(path, title=title, intro=intro, tables=tables, figures=drawn, facts=about, legend=legend)
    texts = {
        ".md": lambda: _markdown(path, title, intro, tables, drawn, about, legend),
        ".csv": lambda: csv_text(tables),
    }
    return write_bytes(path, texts.get(path.suffix, lambda: latex(tables))().encode())


def check_format(path: str | Path) -> None:
    """Raises ValueError if the file's ending names no format."""
    if Path(path).suffix not in FORMATS:
        raise ValueError(f"cannot write {path}: expected a file that ends in {', '.join(FORMATS)}")


def _markdown(path, title, intro, tables, drawn, about, legend) -> str:
    lines = [f"# {title}", intro]
    for table in tables:
        lines += [f"## {table.title}", table.note, markdown(table.rows, table.columns).rstrip("\n")]
    lines.append(legend)
    for caption, png in drawn:
        lines += [f"## {caption.partition(':')[0]}", f"![{caption}]({png.relative_to(path.parent).as_posix()})"]
    lines += ["\n".join(f"- {name}: {value}" for name, value in about.items())]
    return "\n\n".join(line for line in lines if line) + "\n"


def _curves(by_case: dict[Case, list[dict[str, Any]]]) -> dict[str, dict[str, list[tuple[str, float, float, float]]]]:
    """Points of `accuracy_over_eps`, where a model was attacked at two radii or more: of a data set, else means."""
    groups: dict[Case, list[dict[str, Any]]] = defaultdict(list)
    for case, rows in by_case.items():
        groups[dataclasses.replace(case, eps="")] += rows
    curves = {}
    for about, rows in groups.items():
        at: dict[tuple[str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
        for row in rows:
            at[row["name"], row["eps"]][row["data"]] = row
        shared = sorted(set.intersection(*(set(own) for own in at.values())))
        if not shared or len({eps for _, eps in at}) < 2:
            continue
        points: dict[str, list[tuple[str, float, float, float]]] = {}
        for (name, eps), own in at.items():
            if name not in points:
                points[name] = [("0", *_mean([own[data] for data in shared], "clean"))]
            points[name].append((eps, *_mean([own[data] for data in shared], "robust")))
        curves[f"{_where(shared, rows)}; {about}"] = points
    return curves


def _over_steps(rows: list[dict[str, Any]], shared: list[str]) -> dict[str, list[tuple[str, int, float, float]]]:
    """Points of `accuracy_over_steps`: means over the data sets of models whose stages have the same steps on all."""
    by_model: dict[str, list[list[tuple[str, int, float, float]]]] = defaultdict(list)
    for row in rows:
        if row["data"] in shared and any(curve["steps"] for curve in row.get("over_steps") or ()):
            by_model[row["name"]].append(_points(row))
    curves = {}
    for name, several in by_model.items():
        if len(several) == len(shared) and len({tuple(point[:2] for point in points) for points in several}) == 1:
            columns = zip(*several, strict=True)
            curves[name] = [(*same[0][:2], *(sum(p[j] for p in same) / len(same) for j in (2, 3))) for same in columns]
    return curves


def _points(row: dict[str, Any]) -> list[tuple[str, int, float, float]]:
    """(stage, step, robust accuracy, mean loss) of a record, steps counted on; a stage without a curve is a drop."""
    left, before, points = round(row["clean"] * row["samples"]), 0, []
    for curve in row["over_steps"]:
        for step, fooled, loss in zip(curve["steps"], curve["fooled"], curve["mean_loss"], strict=True):
            loss = math.nan if loss is None else loss
            points.append((curve["stage"], before + step, (left - fooled) / row["samples"], loss))
        left -= curve["broken"]
        if curve["steps"]:
            before += curve["steps"][-1]
        else:
            points.append((curve["stage"], before, left / row["samples"], math.nan))
    return points


def _calibration(rows: list[dict[str, Any]], shared: list[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """What `reliability_curves` draws: the bins of models over all samples of the data sets that all of them have."""
    by_model: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["data"] in shared and row.get("calibration"):
            by_model[row["name"]].append(row["calibration"])
    return {
        name: {which: pooled_reliability([one[which] for one in several]) for which in ("clean", "robust")}
        for name, several in by_model.items()
        if len(several) == len(shared)
    }


def _shown(by_case: dict[Case, list[dict[str, Any]]]) -> list[tuple[Case, dict[str, Any]]]:
    """Rows with images that are still there."""
    every = ((case, row) for case, rows in by_case.items() for row in rows)
    return [(case, row) for case, row in every if row.get("examples") and row["examples"]["images"].is_file()]


def _where(shared: list[str], rows: list[dict[str, Any]]) -> str:
    """What a figure is of; it says so where rows differ in more than the model."""
    where = shared[0] if len(shared) == 1 else f"mean of {len(shared)} sets"
    return where + (", set-ups differ (see the table)" if any(row["setup"] for row in rows) else "")


def _mean(rows: list[dict[str, Any]], key: str) -> tuple[float, float, float]:
    """The mean, and the interval where it is of one data set."""
    interval = rows[0].get(f"{key}_ci") if len(rows) == 1 else None
    return sum(row[key] for row in rows) / len(rows), *(interval or (math.nan, math.nan))
