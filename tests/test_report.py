"""The page of measurements says what the records say."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import report

from bmojo_core.ops.causal_conv import gpu


def test_measurements_are_those_of_the_records():
    assert report.PAGE.read_text() == report.page(), "run: python benchmarks/report.py"


def test_the_convolution_timed_as_kept_is_the_one_kept():
    assert [gpu.FORWARD.ahead, gpu.FORWARD.blocks] == report.KEPT_CONVOLUTION
