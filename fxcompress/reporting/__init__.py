"""What a compilation tells: the report as data classes and JSON, a console table, one HTML page, a progress bar."""

from fxcompress.reporting.console import print_report
from fxcompress.reporting.model import CaptureReport, EngineReport, Latency, PassReport, Report

__all__ = ["CaptureReport", "EngineReport", "Latency", "PassReport", "Report", "print_report"]
