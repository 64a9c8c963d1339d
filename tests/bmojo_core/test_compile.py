"""torch.compile gives the same values, in one graph a layer, forward and backward."""

import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parents[1] / "support"


def test_compiled_equals_eager_without_graph_breaks():
    done = subprocess.run(
        [sys.executable, SUPPORT / "compiled.py"], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "compiled equals eager", done.stderr[-3000:]
