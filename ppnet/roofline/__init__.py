"""The roofline of this machine, and where each operator stands on it: `machine` measures, `cases/` says what."""

from ppnet.roofline.case import Band, Case, Row, measure, operator
from ppnet.roofline.machine import Machine

__all__ = ["Band", "Case", "Machine", "Row", "measure", "operator"]
