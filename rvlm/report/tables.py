"""Tables of summary rows (see `rvlm.evaluation.summary_row`)."""

import csv
import dataclasses
import io
from typing import Any

from rvlm.markdown import markdown_table

__all__ = [
    "COLUMNS", "Table", "cell", "comparison_table", "csv_text", "latency_table", "latex", "markdown", "phase_table",
    "protocol_table", "rich_table",
]  # fmt: skip

COLUMNS = {
    "name": "model",
    "clean": "clean %",
    "robust": "robust %",
    "eps": "eps",
    "attack": "attack",
    "target": "target",
    "samples": "samples",
}
SHARES = ("clean", "robust")
DETAILS = ("protocol", "metric", "norm", "eps", "attack", "target", "source", "status", "record")
TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    c: f"\\{c}" for c in "&%$#_{}"
}


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under a heading.

    Attributes:
        title: what the rows have in common.
        rows: summary rows, or others with the keys of `columns`.
        columns: keys of the rows and their headings.
        note: what to know before comparing rows.
    """

    title: str
    rows: list[dict[str, Any]]
    columns: dict[str, str] = dataclasses.field(default_factory=lambda: COLUMNS)
    note: str = ""


def cell(row: dict[str, Any], column: str) -> str:
    """Text of one cell; accuracies in per cent, with their 95 % interval if the row has one."""
    value = row.get(column, "")
    if column not in SHARES or isinstance(value, str):
        return f"{value:.1f}" if isinstance(value, float) else str(value)
    text = f"{100 * value:.1f}"
    if interval := row.get(f"{column}_ci"):
        text += f" ({100 * interval[0]:.0f}-{100 * interval[1]:.0f})"
    return text


def markdown(rows: list[dict[str, Any]], columns: dict[str, str] | None = None) -> str:
    """A Markdown table; columns maps keys of the rows to headings."""
    columns = columns or COLUMNS
    return markdown_table([*columns.values()], [[cell(row, column) for column in columns] for row in rows]) + "\n"


def latex(tables: list[Table]) -> str:
    """The tables for a paper, with booktabs."""
    lines = [r"% \usepackage{booktabs}"]
    for table in tables:
        places = "".join("r" if column in (*SHARES, "samples", "eps") else "l" for column in table.columns)
        lines += [
            r"\begin{table}", r"\centering", rf"\caption{{{_tex(f'{table.title}. {table.note}'.strip())}}}",
            rf"\begin{{tabular}}{{{places}}}", r"\toprule", _tex_line(table.columns.values()), r"\midrule",
            *(_tex_line(cell(row, column) for column in table.columns) for row in table.rows),
            r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
        ]  # fmt: skip
    return "\n".join(lines)


def csv_text(tables: list[Table]) -> str:
    """All rows in one file, each with the title of its table, what it was measured under and the file of its record.

    Shares and the ends of their 95 % intervals are fractions.
    """
    keys = list(dict.fromkeys(key for table in tables for key in table.columns))
    keys += [key for key in DETAILS if key not in keys and any(key in row for table in tables for row in table.rows)]
    shares = [key for key in SHARES if key in keys]
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(["table", *keys, *(f"{key}_{end}" for key in shares for end in ("low", "high"))])
    for table in tables:
        for row in table.rows:
            ends = [end for key in shares for end in row.get(f"{key}_ci") or ("", "")]
            writer.writerow([table.title, *(row.get(key, "") for key in keys), *ends])
    return out.getvalue()


def _tex_line(cells) -> str:
    return " & ".join(_tex(text) for text in cells) + r" \\"


def _tex(text: str) -> str:
    return "".join(TEX.get(letter, letter) for letter in text)


def rich_table(rows: list[dict[str, Any]], title: str = "", columns: dict[str, str] | None = None):
    """A table for the terminal (rich.table.Table); 80 columns wide, so the clean accuracy goes without its interval.

    Long names are folded before a figure is cut.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns = columns or COLUMNS
    table = Table(
        title=title, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True,
        pad_edge=False,
    )  # fmt: skip
    for key, heading in columns.items():
        table.add_column(
            heading, justify="left" if key in ("name", "attack", "target") else "right", overflow="fold",
            no_wrap=key not in ("name", "attack"), min_width=10 if key in ("name", "attack") else None,
        )  # fmt: skip
    for row in rows:
        table.add_row(*(Text(cell(row | {"clean_ci": None}, column)) for column in columns))
    return table


def protocol_table(rows: list[dict[str, Any]], title: str, parts: int) -> str:
    """The rows of a protocol, and their means over data sets for every attack, radius and target.

    A mean names how many sets it is of, out of `parts`: two means of different sets are no comparison.
    """
    columns = {"data": "data"} | {
        key: COLUMNS[key] for key in ("attack", "eps", "target", "clean", "robust", "samples")
    }
    lines = [title, "", markdown(rows, columns)]
    cases: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["metric"], row["attack"], row["eps"], row["target"]), []).append(row)
    for (metric, attack, eps, target), some in cases.items():
        if len(some) > 1:
            clean, robust = (100 * sum(row[key] for row in some) / len(some) for key in ("clean", "robust"))
            of = f"mean {metric} of {len(some)} sets" + (f", of {parts} in the protocol" if len(some) < parts else "")
            lines.append(f"{of}; {attack}, {eps}, {target}: clean {clean:.1f} %, robust {robust:.1f} %")
    return "\n".join(lines)


def comparison_table(found: list[Any]) -> str:
    """A Markdown table of `rvlm.evaluation.Comparison`s."""
    lines = []
    for one in found:
        a, b = (
            f"{100 * share:.1f} ({100 * ci[0]:.1f}-{100 * ci[1]:.1f})"
            for share, ci in ((one.a, one.a_ci), (one.b, one.b_ci))
        )
        difference = f"{100 * (one.a - one.b):+.1f}"
        lines.append([one.what, str(one.n), a, b, difference, str(one.only_a), str(one.only_b), f"{one.p:.2g}"])
    return markdown_table(["", "n", "A %", "B %", "A - B", "only A right", "only B right", "McNemar p"], lines)


def phase_table(phases: list[dict[str, Any]], images: int, images_per_s: float) -> str:
    """A Markdown table of `rvlm profile`: phases stand under those that they ran in, "other" is the time of a phase
    that is in none below it, so that the shares of whatever has nothing below it add up to the whole.

    Args:
        phases: rows with path (names), seconds, own (seconds in no phase below), calls, images (that went through, as
            often as they did) and flops (or None); the first is the whole, each is followed by those inside it.
        images, images_per_s: of the whole, whose rates may leave something out.
    """
    whole = phases[0]
    head = ["phase", "seconds", "share", "calls", "images", "images/s", "GFLOP/image", "GFLOP/s"]
    lines = []

    def line(title: str, seconds: float, calls: str = "", *rest: str) -> None:
        cells = [title, f"{seconds:.3f}", f"{seconds / whole['seconds']:.1%}", calls, *rest]
        lines.append(cells + [""] * (len(head) - len(cells)))

    def below(row: dict[str, Any]) -> None:
        depth = len(row["path"])
        inside = [other for other in phases if len(other["path"]) == depth + 1 and other["path"][:-1] == row["path"]]
        for inner in inside:
            seen, flops = inner["images"], inner["flops"]
            rates = [str(seen), f"{seen / max(inner['seconds'], 1e-9):.0f}"] if seen else ["", ""]
            if flops:
                rates += [f"{flops / seen / 1e9:.3g}" if seen else "", f"{flops / inner['seconds'] / 1e9:.3g}"]
            line("· " * depth + inner["path"][-1], inner["seconds"], str(inner["calls"]), *rates)
            below(inner)
        if inside:
            line("· " * depth + "other", row["own"])

    below(whole)
    rates = [str(images), f"{images_per_s:.0f}"]
    if whole["flops"]:
        each = whole["flops"] / images / 1e9
        rates += [f"{each:.3g}", f"{each * images_per_s:.3g}"]
    line("whole", whole["seconds"], "1", *rates)
    return markdown_table(head, lines)


def latency_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of `rvlm profile infer`: medians with quartiles; "x plain" is the median ratio of pairs."""
    head = ["model", "batch", "ms", "images/s", "peak MB", "weights MB", "x plain", "ms of phases"]
    lines = []
    for row in rows:
        phases = ", ".join(f"{name} {spent:.2f}" for name, spent in row["phases_ms"].items())
        against = "" if row["ratio"] is None else f"{row['ratio']:.2f} ({row['ratio_q1']:.2f}-{row['ratio_q3']:.2f})"
        lines.append([
            row["name"], str(row["batch"]),
            f"{row['latency_ms']:.2f} ({row['latency_ms_q1']:.2f}-{row['latency_ms_q3']:.2f})",
            f"{row['images_per_s']:.0f}", f"{row['peak_mb']:.1f}", f"{row['weights_mb']:.1f}", against, phases,
        ])  # fmt: skip
    return markdown_table(head, lines)
