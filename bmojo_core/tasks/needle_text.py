"""The sentences of the needle tasks, and the words that keys are made of."""

from __future__ import annotations

KINDS = ("single", "multikey", "multivalue", "multiquery")
FILLER = "The river runs on and the hills stay where they are."

ADJECTIVES = (
    "amber", "bold", "brisk", "calm", "clever", "coral", "crisp", "dusty", "early", "eager",
    "faint", "gentle", "golden", "grand", "hollow", "humble", "icy", "jolly", "keen", "late",
    "lively", "loud", "mellow", "mild", "noble", "odd", "pale", "proud", "quick", "quiet",
    "rapid", "rusty", "shy", "silver", "slow", "solid", "steep", "tidy", "vivid", "young",
)  # fmt: skip
NOUNS = (
    "anchor", "arrow", "basin", "beacon", "bridge", "canyon", "castle", "cedar", "cliff",
    "compass", "copper", "comet", "crane", "ember", "falcon", "fern", "forest", "garden",
    "glacier", "harbor", "heron", "island", "kettle", "lantern", "lemon", "maple", "marble",
    "meadow", "mirror", "orchard", "otter", "pebble", "piano", "pine", "planet", "prairie",
    "ribbon", "saddle", "spruce", "sparrow", "stone", "summit", "thistle", "timber", "tulip",
    "valley", "violin", "walnut", "willow", "window",
)  # fmt: skip


def instruction() -> str:
    """What the reader is told before the haystack."""
    return "Some codes stand in this text. Keep them in mind, they will be asked for."


def needle_sentence(key: str, value: str) -> str:
    """The sentence to be found."""
    return f"The code of {key} is {value}."


def question(keys: tuple[str, ...]) -> str:
    """The question and the beginning of its answer."""
    asked = listed(keys)
    return f" Which codes were given for {asked}? The codes of {asked} are"


def answer(values: tuple[str, ...]) -> str:
    """What follows the question."""
    return f" {listed(values)}."


def listed(items: tuple[str, ...]) -> str:
    """Joined by commas."""
    return ", ".join(items)
