"""Reports: tables, plots with their numbers as CSV beside them, and a self-contained HTML page."""

from rvlm.report.html import write_html
from rvlm.report.plots import accuracy_over_eps, bars, heat_map, image_grid, maps, transfer_heat_map
from rvlm.report.tables import comparison_table, latency_table, markdown, phase_table, protocol_table, rich_table

__all__ = [
    "accuracy_over_eps",
    "bars",
    "comparison_table",
    "heat_map",
    "image_grid",
    "latency_table",
    "maps",
    "markdown",
    "phase_table",
    "protocol_table",
    "rich_table",
    "transfer_heat_map",
    "write_html",
]
