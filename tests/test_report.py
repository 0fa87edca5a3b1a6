"The committed report can be recomputed from its scores: the same tables and the same texts."
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nsnet.report import difference, markdown_table, summary, table, to_markdown

REPORT = Path(__file__).parents[1]/"reports"/"table1-full"


def committed(name):
    "Path of a file of the committed report; without it the test is skipped."
    if not (REPORT/name).exists(): pytest.skip(f"{REPORT.name} has no {name}")
    return REPORT/name


@pytest.fixture(scope="module")
def scores():
    return pd.read_csv(committed("scores.csv"))


@pytest.fixture(scope="module")
def seen():
    "The generators that the committed table calls seen."
    expected = pd.read_csv(committed("table1.csv"))
    return [test for test in expected.test[expected.seen.eq("yes")].unique() if not test.startswith("all ")]


@pytest.fixture(scope="module")
def measured(scores, seen):
    return table(scores, seen)


def assert_same(found, expected):
    "Same columns and rows, numbers to 1e-6 (the files have six decimals)."
    assert list(found) == list(expected) and len(found) == len(expected)
    numbers = expected.select_dtypes("number").columns
    pd.testing.assert_frame_equal(found.drop(columns=numbers), expected.drop(columns=numbers), check_dtype=False)
    np.testing.assert_allclose(found[numbers].astype(float), expected[numbers].astype(float), rtol=0, atol=1e-6)


def test_table(measured):
    assert_same(measured, pd.read_csv(committed("table1.csv")))


def test_difference(scores, seen):
    assert_same(difference(scores, seen), pd.read_csv(committed("difference.csv")))


def test_table_as_text(measured):
    assert committed("table1.md").read_text(encoding="utf-8").endswith(to_markdown(measured))


def test_summary_as_text(measured):
    assert committed("summary.md").read_text(encoding="utf-8") == markdown_table(summary(measured)) + "\n"
