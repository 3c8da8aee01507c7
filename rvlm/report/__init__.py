"""Reports: tables, plots with their numbers as CSV beside them, and a self-contained HTML page."""

from rvlm.report.html import write_html
from rvlm.report.plots import accuracy_over_eps, bars, heat_map, image_grid, maps, transfer_heat_map
from rvlm.report.tables import latency_table, markdown, phase_table, rich_table

__all__ = [
    "accuracy_over_eps",
    "bars",
    "heat_map",
    "image_grid",
    "latency_table",
    "maps",
    "markdown",
    "phase_table",
    "rich_table",
    "transfer_heat_map",
    "write_html",
]
