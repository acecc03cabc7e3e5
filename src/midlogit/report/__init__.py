"""Reports of what was sampled: pages, numbers and pictures of one run or two; the API of `midlogit report`.

report = make_report("RUN")
Path("report.html").write_text(report.page(), encoding="utf-8")
report.numbers["runs"][0]["alpha"]["mean"]
report.write_figures("figures")
"""

from __future__ import annotations

from midlogit.report.report import Report, make_report

__all__ = ["Report", "make_report"]
