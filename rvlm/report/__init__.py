"""Reports: tables, plots with their numbers as CSV beside them, and a self-contained HTML page."""

from rvlm.report.card import model_card
from rvlm.report.flame import Frame, frames, write_flame
from rvlm.report.gather import Found, gather
from rvlm.report.html import write_html
from rvlm.report.leaderboard import Entry, leaderboards, load_entries
from rvlm.report.pages import check_format, facts, figures, result_tables, write_report
from rvlm.report.plots import (
    accuracy_over_eps,
    accuracy_over_steps,
    bars,
    heat_map,
    hypervolume,
    image_grid,
    maps,
    pareto,
    reliability_curves,
    training_curves,
    transfer_heat_map,
    words_grid,
)
from rvlm.report.published import load_published, published_tables
from rvlm.report.tables import (
    Table,
    comparison_table,
    csv_text,
    latency_table,
    latex,
    markdown,
    phase_table,
    protocol_table,
    rich_table,
)

__all__ = [
    "Entry",
    "Found",
    "Frame",
    "Table",
    "accuracy_over_eps",
    "accuracy_over_steps",
    "bars",
    "check_format",
    "comparison_table",
    "csv_text",
    "facts",
    "figures",
    "frames",
    "gather",
    "heat_map",
    "hypervolume",
    "image_grid",
    "latency_table",
    "latex",
    "leaderboards",
    "load_entries",
    "load_published",
    "maps",
    "markdown",
    "model_card",
    "pareto",
    "phase_table",
    "protocol_table",
    "published_tables",
    "reliability_curves",
    "result_tables",
    "rich_table",
    "training_curves",
    "transfer_heat_map",
    "words_grid",
    "write_flame",
    "write_html",
    "write_report",
]
