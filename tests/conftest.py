"""What holds for every test: checked signatures, one thread each, repeatable searches."""

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # read once, when numpy and torch are loaded

import hypothesis
import runtime_types
import torch

runtime_types.switch_on()
torch.set_num_threads(1)

# A machine's load decides no test: no deadline. In CI the same examples are tried every time.
_calm = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("default", **_calm)
hypothesis.settings.register_profile("ci", **_calm, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


LONG = "site model_invariants compile convert whiteness filtering memory_attention faults upgrade"


def pytest_collection_modifyitems(items):
    """The longest files begin first, so that no process waits for another's at the end."""
    first = [f"test_{name}" for name in LONG.split()]
    items.sort(key=lambda item: item.path.stem not in first)
