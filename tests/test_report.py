"""The page of measurements says what the records say."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_measurements_are_those_of_the_records():
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    assert report.PAGE.read_text() == report.page(), "run: python benchmarks/report.py"
