"""Pages and pictures of what a run did. Everything below `run` and `collect` works on plain data."""

from m3bsr.report.collect import Collected, collect, collect_from
from m3bsr.report.compare import compare_report
from m3bsr.report.html import Column, Section, write_report
from m3bsr.report.panels import Sample, save_panel
from m3bsr.report.rows import comparison_row
from m3bsr.report.run import run_report

__all__ = [
    "Collected",
    "Column",
    "Sample",
    "Section",
    "collect",
    "collect_from",
    "compare_report",
    "comparison_row",
    "run_report",
    "save_panel",
    "write_report",
]
