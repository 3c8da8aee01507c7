"""A static leaderboard: a board for each protocol (or data set), attack and radius, with the fields of RobustBench.

A folder holds records and, beside them, entries: YAML files that say what a record does not know of a model.

    model: fare                  # its name on the board
    data: cifar10                # with norm and eps: the one board that figures are of; without, what is said of all
    norm: linf
    eps: 8/255
    title: Robust CLIP           # paper; also authors, venue, link, architecture, additional_data, footnote
    reported: 45.9               # robust accuracy that its authors state, in per cent
    external: 44.0               # lower robust accuracy that others found, in per cent
    unreliable: true             # the evaluation is known not to be the worst case

As in RobustBench, models are ranked by the lower of the measured and the external figure, then by clean accuracy. What
is ranked was measured white-box, on all samples, and under a protocol on every set that any model of the board has.
A record with failed checks is unreliable, too; both stay ranked and say so.
"""

import dataclasses
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import yaml

from rvlm.report.gather import Case, Found, cases, differences, shared_means
from rvlm.report.tables import Table
from rvlm.units import Eps

__all__ = ["LEGEND", "Entry", "leaderboards", "load_entries"]

LEGEND = (
    "Accuracies in per cent. robust: measured here, under the attack of the heading; reported: by the model's authors; "
    "external: a lower figure that others found; best known: the lower of robust and external, by which models are "
    "ranked. unreliable: the entry says so, or a check of the evaluation failed."
)
COLUMNS = {
    "name": "model", "rank": "#", "clean_acc": "clean", "best_known": "best known", "robust_acc": "robust",
    "reported": "reported", "external": "external", "unreliable": "unreliable", "additional_data": "more data",
    "architecture": "architecture", "title": "paper", "authors": "authors", "venue": "venue", "link": "link",
    "setup": "set-up", "footnote": "footnote",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a YAML file says; see the module."""

    model: str
    data: str | None = None
    norm: str | None = None
    eps: str | None = None
    title: str | None = None
    authors: str | None = None
    venue: str | None = None
    link: str | None = None
    architecture: str | None = None
    additional_data: bool | None = None
    reported: float | None = None
    external: float | None = None
    unreliable: bool | None = None
    footnote: str | None = None

    def is_of(self, name: str, data: str, norm: str, eps: str) -> bool:
        where = (self.data in (None, data), self.norm in (None, norm), self.eps is None or _near(self.eps, eps))
        return self.model == name and all(where)


def load_entries(folder: str | Path) -> list[Entry]:
    """Entries of a folder.

    Raises:
        ValueError: an unknown key, no model, a figure without its board, or one that is no per cent.
    """
    entries = []
    for path in sorted(Path(folder).glob("*.yaml")):
        content, known = yaml.safe_load(path.read_text()), [field.name for field in dataclasses.fields(Entry)]
        if not isinstance(content, dict) or "model" not in content:
            raise ValueError(f"{path} is no entry of a leaderboard: expected a mapping with `model`")
        if unknown := sorted(set(content) - set(known)):
            raise ValueError(f"{path}: unknown key {unknown[0]!r}, expected one of {', '.join(known)}")
        entry = Entry(**content)
        for key in ("reported", "external"):
            if (figure := getattr(entry, key)) is None:
                continue
            if None in (entry.data, entry.norm, entry.eps):
                raise ValueError(f"{path}: {key} is of one board, so the entry needs data, norm and eps")
            if isinstance(figure, bool) or not isinstance(figure, int | float) or not 0 <= figure <= 100:
                raise ValueError(f"{path}: {key} is in per cent, 0 to 100, got {figure!r}")
        entries.append(entry)
    return entries


def leaderboards(found: Found, entries: list[Entry]) -> tuple[list[Table], dict[str, str]]:
    """The boards, and by record what is not ranked, with the reason."""
    boards, unranked = [], {}
    for case, rows in cases(found.rows).items():
        if case.target != "white-box" or case.status != "complete":
            reason = f"not ranked: {case.target}" + ("" if case.status == "complete" else f", {case.status}")
            unranked |= {row["record"]: reason for row in rows}
            continue
        by_data: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in rows:
            by_data["" if case.protocol else row["data"]].append(row)
        for some in by_data.values():
            sets = {row["data"] for row in some}
            have = Counter(row["name"] for row in some)
            whole = [row for row in some if have[row["name"]] == len(sets)]
            lacking = f"not ranked: measured on fewer than the {len(sets)} sets of the board"
            unranked |= {row["record"]: lacking for row in some if have[row["name"]] < len(sets)}
            if whole:
                boards.append(_board(case, whole, entries))
    return boards, unranked


def _board(case: Case, rows: list[dict[str, Any]], entries: list[Entry]) -> Table:
    """Models that all have the same data sets, ranked by their means."""
    sets, means = shared_means(rows)
    data = sets[0] if len(sets) == 1 else f"mean of {len(sets)} sets"
    robust_acc = "autoattack_acc" if case.attack == "autoattack" else "robust_acc"  # RobustBench's name is a promise
    lines = []
    for name, (clean, robust) in means.items():
        about: dict[str, Any] = {}
        for entry in sorted(entries, key=lambda entry: entry.data is not None):  # what is said of one board goes last
            if entry.is_of(name, data, case.norm, case.eps):
                about |= {key: value for key, value in dataclasses.asdict(entry).items() if value is not None}
        own = [row for row in rows if row["name"] == name]
        failed = sorted({check["id"] for row in own for check in row["failed"]})
        footnotes = [about.get("footnote"), f"failed checks: {', '.join(failed)}" if failed else None]
        line = about | dataclasses.asdict(case) | {
            "name": name, "data": data, "clean_acc": 100 * clean, robust_acc: 100 * robust,
            "best_known": min(100 * robust, about.get("external", 100.0)),
            "additional_data": {True: "yes", False: "no"}.get(about.get("additional_data"), ""),
            "unreliable": "yes" if failed or about.get("unreliable") else "",
            "setup": ", ".join(row["setup"] for row in own if row["setup"]),
            "footnote": "; ".join(filter(None, footnotes)),
        }  # fmt: skip
        lines.append(line)
    lines.sort(key=lambda line: (-line["best_known"], -line["clean_acc"], line["name"]))
    lines = [{"rank": k + 1} | line for k, line in enumerate(lines)]
    columns = {robust_acc if key == "robust_acc" else key: heading for key, heading in COLUMNS.items()}
    used = {key: heading for key, heading in columns.items() if any(line.get(key, "") != "" for line in lines)}
    return Table(f"{data}; {case}", lines, used, differences(rows))


def _near(a: str, b: str) -> bool:
    return abs(Eps(a) - Eps(b)) < 1e-9
