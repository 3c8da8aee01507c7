"""Published figures, with where they were read and how far to trust that, and ours beside them.

A file of rvlm/published holds the tables of a paper. A table has `columns`, each a figure's data (a name, or the list
of names that a mean is over), metric, attack and eps (or `clean: true`), as far as the source states them, and `rows`
of figures in per cent by the method's name. What stands on the table holds for all its columns. `trust` is one of
`TRUST`.

Ours stand under a table if data, norm, eps and metric are the same; attack, target and samples need not be, so each of
our rows names its own. A mean of ours stands there only if all its sets were measured.
"""

import itertools
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

from rvlm.report.gather import Case, Found
from rvlm.report.tables import Table
from rvlm.units import Eps

__all__ = ["LEGEND", "TRUST", "load_published", "published_tables"]

FOLDER = Path(__file__).parents[1] / "published"
TRUST = {
    "paper": "the paper's tables or text",
    "README": "the authors' repository",
    "digitised": "read off a figure",
    "third-party": "seen in another party's excerpt, list or summary",
}
LEGEND = f"Figures in per cent. Trust: {'; '.join(f'{tag}: {what}' for tag, what in TRUST.items())}."
COMMON = ("data", "metric", "attack", "eps", "clean")


def load_published(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The papers, each {title, link, tables, claims}; every column has its heading and what stood on its table.

    Raises:
        ValueError: a table without source or with an unknown trust tag, or a row with too few or too many figures.
    """
    papers = [yaml.safe_load(path.read_text()) | {"file": path.name} for path in sorted(folder.glob("*.yaml"))]
    for paper in papers:
        for table in paper["tables"]:
            where = f"{paper['file']}, {table['title']!r}"
            if not table.get("source"):
                raise ValueError(f"{where} names no source")
            table["columns"] = [_column(column, table) for column in table["columns"]]
            headings = [column["heading"] for column in table["columns"]]
            if len(set(headings)) < len(headings):
                raise ValueError(f"{where} has two columns of one heading: {headings}")
            for name, figures in table["rows"].items():
                if len(figures) != len(headings):
                    raise ValueError(f"{where}, {name!r}: expected {len(headings)} figures, got {len(figures)}")
        for item in (*paper["tables"], *paper.get("claims", ())):
            if item.get("trust") not in TRUST:
                raise ValueError(f"{paper['file']}: trust is {item.get('trust')!r}, expected one of {', '.join(TRUST)}")
    return papers


def published_tables(found: Found | None = None) -> list[Table]:
    """A table for each published one, with our rows under theirs; at last what was stated without a table."""
    tables, papers = [], load_published()
    for paper in papers:
        for table in paper["tables"]:
            headings = [column["heading"] for column in table["columns"]]
            digits = max(len(str(v).partition(".")[2]) for v in itertools.chain(*table["rows"].values()))
            theirs = [
                {"name": name, "trust": table["trust"]} | dict(zip(headings, _text(figures, digits), strict=True))
                for name, figures in table["rows"].items()
            ]
            ours = [] if found is None else _ours(table, found.rows)
            columns = {"name": "method", "trust": "trust"} | {heading: heading for heading in headings}
            note = f"Trust: {table['trust']}. {' '.join(table['source'].split())}."
            if ours:
                note += " Ours are of the same data, norm and radius; attack, target and samples are what a row says."
            tables.append(Table(f"{paper['title']}, {table['title']}", theirs + ours, columns, note))
    claims = [{"name": paper["title"], **claim} for paper in papers for claim in paper.get("claims", ())]
    columns = {"name": "method", "says": "states", "trust": "trust"}
    return [*tables, Table("Stated without a table", claims, columns)]


def _column(column: dict[str, Any], table: dict[str, Any]) -> dict[str, Any]:
    """A column with its heading and with what the table says of all columns."""
    words = [column["data"]] if isinstance(column.get("data"), str) else []
    if column.get("clean"):
        words.append("clean")
    else:
        words += [column[key] for key in ("attack", "eps") if key in column]
        with_clean = any(other.get("clean") for other in table["columns"])
        words += ["robust"] if "data" in column and len(words) == 1 and with_clean else []
    common = {key: table[key] for key in COMMON if key in table}
    return {"heading": " ".join(words), "metric": "accuracy"} | common | column


def _ours(table: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Our rows: one for each model and what it was measured under, eps aside, that has a figure for some column."""
    by_model: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        case = Case.of(row)
        if case.norm == table.get("norm"):
            by_model[row["name"], case.protocol, case.attack, case.target, case.source, case.status].append(row)
    found = []
    whole = [(key, layout, some) for key, rows in by_model.items() for layout, some in _by_layout(rows)]
    for (name, protocol, attack, target, source, status), layout, some in whole:
        figures = {column["heading"]: _figure(column, some) for column in table["columns"]}
        if any(value is not None for value in figures.values()):
            samples = sorted({row["samples"] for row in some})
            counted = str(samples[0]) if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
            words = [
                attack,
                f"{target} from {source}" if source else target,
                f"{counted} samples",
                layout,
                status,
                protocol,
            ]
            label = f"ours: {name} ({', '.join(word for word in words if word not in ('', 'complete'))})"
            found.append(
                {"name": label, "trust": "ours"} | dict(zip(figures, _text([*figures.values()], 2), strict=True))
            )
    return found


def _by_layout(rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """All rows; those of each layout by themselves if a set was measured in several, which are different test sets."""
    names = {row["data"] for row in rows}
    if len({name.partition("@")[0] for name in names}) == len(names):
        return [("", rows)]
    by_layout: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_layout[row["data"].partition("@")[2]].append(row)
    return sorted(by_layout.items())


def _figure(column: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """Ours in per cent, or None: a set of the column is missing, or the source does not say what to look for."""
    names = column.get("data")
    if names is None or not (column.get("clean") or "eps" in column):
        return None
    names = [names] if isinstance(names, str) else names
    key = "clean" if column.get("clean") else "robust"
    by_data: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        same_eps = column.get("clean") or abs(Eps(row["eps"]) - Eps(column["eps"])) < 1e-9
        if same_eps and row["metric"] == column["metric"] and "+classes=" not in row["data"]:  # half of a set is no set
            by_data[row["data"].partition("@")[0]].append(row[key])
    if any(name not in by_data for name in names):
        return None
    return 100 * sum(sum(by_data[name]) / len(by_data[name]) for name in names) / len(names)


def _text(figures: list[float | int | None], digits: int) -> list[str]:
    """As in the source: all to as many digits as it has, but whole numbers as they are."""
    return ["" if v is None else str(v) if isinstance(v, int) else f"{v:.{digits}f}" for v in figures]
