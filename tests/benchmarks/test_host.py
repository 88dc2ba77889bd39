"""The counted work of the host in a step: a layer needs less of it than in TRL, and the selector adds little."""

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def counts() -> dict[str, dict[str, int]]:
    sys.path.insert(0, str(FOLDER))  # its neighbours
    spec = importlib.util.spec_from_file_location("benchmarks_host", FOLDER / "host.py")
    host = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(host)
    return {(arm, layers): host.count(arm, layers, 4) for arm in ("TRL, LoRA", "K = 1") for layers in (2, 4)} | {
        (arm, 2): host.count(arm, 2, 4) for arm in ("K = 4, no selector", "K = 4")
    }


def test_a_layer_costs_the_host_less_than_trls(counts):
    """Measured for two layers: 986 Python calls and 244 operators; TRL's: 7,032 and 318."""

    def two_layers(arm: str, what: str) -> int:
        return counts[arm, 4][what] - counts[arm, 2][what]

    for what, allowed in (("python calls", 0.25), ("operators", 0.85)):
        assert two_layers("K = 1", what) < allowed * two_layers("TRL, LoRA", what), what


def test_the_selector_costs_the_host_little(counts):
    """Measured: 463 Python calls and 123 operators, for any number of layers."""
    extra = {what: value - counts["K = 4, no selector", 2][what] for what, value in counts["K = 4", 2].items()}
    assert 0 < extra["python calls"] < 600 and 0 < extra["operators"] < 150, extra
