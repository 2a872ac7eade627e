"""The curve of a puppet: quality, cost and measured speed at many sizes, as CSV, JSON, PNG files and one HTML page."""

from ppnet.reporting.collect import default_sizes, report
from ppnet.reporting.result import Report, SiteCurve, SizeRow
from ppnet.reporting.write import require_extra, write

__all__ = ["Report", "SiteCurve", "SizeRow", "default_sizes", "report", "require_extra", "write"]
