"""Claims about `compare` and the page of the docs that shows it."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from bmojo_core.experiments.policies import compare
from bmojo_core.layers.selection import NEEDS, POLICIES, register_policy

PAGE = Path(__file__).parents[2] / "docs/rules.md"


@pytest.fixture
def blocks():
    """The page's Python; what it registers is gone after the test."""
    plt.switch_backend("Agg")
    yield re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    POLICIES.pop("longest_key", None), NEEDS.pop("longest_key", None)
    plt.close("all")


def test_the_pages_code_runs(blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = blocks[0].replace('"out/rules")', '"out/rules", steps=6)')
    assert short != blocks[0]
    space = {}
    exec(short, space)
    assert (tmp_path / "out/rules.png").stat().st_size > 5000
    assert len(list((tmp_path / "out/rules").glob("*.json"))) == 3
    curves = [r["evaluations"] for records in space["runs"].values() for r in records]
    assert [[e["step"] for e in c] for c in curves] == 3 * [[1, 2, 3, 4, 5, 6]]
    exec(blocks[1], space)
    assert space["model"].config.selection == "innovation"


def test_a_rule_is_run_again_only_where_it_changed(blocks, tmp_path):
    def train(text):
        space = {"register_policy": register_policy}
        exec(f"@register_policy('longest_key')\ndef longest_key(seen):\n    return {text}", space)
        (records,) = compare(["longest_key"], tmp_path, steps=1).values()
        return records[0]

    first = train("seen.position.float()")
    assert train("seen.position.float()") == first  # the record, seconds and all
    other = train("-seen.position.float()")
    assert other["job"]["tags"]["rule_is"] != first["job"]["tags"]["rule_is"]
    train("-2 * seen.position.float()")  # a constant is a change, too
    assert len(list(tmp_path.glob("*.json"))) == 3


def test_a_rule_nobody_registered_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rules must be among .* got 'innovatoin'"):
        compare(["innovatoin"], tmp_path)
