"A small study under two instruction sets: the same inputs to the byte, the same answers within the stated spread."
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO/"scripts"))
from processors import FROZEN, INPUTS


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    "What scripts/processors.py finds out about a smoke run with AVX2 and one as this machine is."
    out = tmp_path_factory.mktemp("processors")
    command = [sys.executable, REPO/"scripts/processors.py", out, "preset=smoke", "settings=AVX2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr
    return pd.read_csv(out/"processors.csv")


def test_inputs_are_the_same_to_the_byte(compared):
    assert compared[list(INPUTS)].all(axis=None)


def test_frozen_systems_agree(compared):
    frozen = compared[compared.system.isin(FROZEN)]
    assert len(frozen) == 2 and (frozen.largest_change <= 1e-3).all(), frozen


def test_trained_systems_agree_within_the_stated_spread(compared):
    "If the inputs differed, training would diverge; a smoke run is short enough to stay close."
    trained = compared[~compared.system.isin(FROZEN)]
    assert len(trained) >= 5 and (trained.median_change <= .02).all() and (trained.auroc_change.abs() <= .1).all(), trained
