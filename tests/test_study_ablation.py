"The study of the parts: other parameters, nonsense, and the tables again from the committed scores."
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nsnet.comparisons import against
from nsnet.experiments import load_scores
from nsnet.metrics import caption_sensitivity
from nsnet.study import run_study

REPORT = Path(__file__).resolve().parents[1]/"reports/ablation"
committed = pytest.mark.skipif(not REPORT.is_dir(), reason="reports/ablation is not in this checkout: make ablation")


def test_other_parameters(tmp_path):
    "Another seed and world size, without adapted towers; a second run trains nothing and gives the same tables."
    options = dict(seeds="3", adapted=False, n_train=44, n_test=8, n_boot=50, data=tmp_path/"data", progress=False)
    run_study("ablation", out=tmp_path/"a", **options)
    store = tmp_path/"data/trials/ablation.jsonl"
    rows = store.read_text()
    run_study("ablation", out=tmp_path/"b", **options)
    assert store.read_text() == rows
    tables = sorted(f.name for f in (tmp_path/"a").iterdir() if f.suffix in (".csv", ".gz"))
    assert "difference_frozen.csv" in tables and "balanced_frozen.csv.gz" in tables and "balanced_adapted.csv.gz" not in tables
    for name in tables: assert (tmp_path/"a"/name).read_bytes() == (tmp_path/"b"/name).read_bytes(), name
    facts = pd.read_csv(tmp_path/"a/facts.csv")
    assert set(facts.seed) == {3} and facts.removed.dropna().between(0, 50).all()
    assert (facts[facts.system.isin(["no_projection", "ns_net", "told: a picture"])].flipped == 0).all()


@pytest.mark.parametrize("wrong", [dict(preset="tiny"), dict(seeds="0;1"), dict(seen="nobody"), dict(beta=1)], ids=str)
def test_nonsense_is_refused(tmp_path, wrong):
    with pytest.raises((ValueError, RuntimeError)) as error:
        run_study("ablation", out=tmp_path/"out", data=tmp_path/"data", progress=False, **wrong)
    assert "\n" not in str(error.value) and next(iter(wrong)) in str(error.value)


@committed
def test_differences_from_the_committed_scores():
    "Every mean difference of a family, its interval over seeds, and what is said to hold."
    facts = pd.read_csv(REPORT/"facts.csv")
    scores = load_scores(REPORT/"balanced_frozen.csv.gz", facts[facts.experiment.eq("balanced") & facts.tower.eq("frozen")])
    names = ["no_projection", "ns_net", "residual", "mean_direction", "leace", "advanced_detached", "advanced_no_mapper"]
    found = against(scores[scores.system.isin(["advanced", *names])], ["deconv"], "advanced", 2000)
    said = pd.read_csv(REPORT/"difference_frozen.csv")
    key = ["a", "metric", "generator"]
    both = found.merge(said[said.a.isin(names)].drop_duplicates(key), on=key, suffixes=("", "_said"))
    assert len(both) == len(found)
    for column in ("difference", "seed_low", "seed_high", "image_low", "image_high"):
        assert np.allclose(both[column], both[f"{column}_said"], atol=2e-4), column
    assert (both.holds.astype(bool) == both.holds_said.astype(bool)).all()


@committed
@pytest.mark.parametrize("tower", ["frozen", "adapted"])
def test_sensitivity_from_the_committed_scores(tower):
    own, swapped = (load_scores(REPORT/f"{kind}_{tower}.csv.gz") for kind in ("balanced", "swapped"))
    facts = pd.read_csv(REPORT/"facts.csv").query("experiment == 'balanced' and tower == @tower").set_index(["system", "seed"])
    for (system, seed), rows in swapped.groupby(["system", "seed"]):
        mine = own[own.system.eq(system) & own.seed.eq(seed)].set_index("path").loc[rows.path]
        found = caption_sensitivity(mine.label, mine.score, rows.score)
        assert abs(found["flipped"] - facts.flipped[system, seed]) < 2e-3, (system, seed)
        assert abs(found["auroc_swapped"] - facts.auroc_swapped[system, seed]) < 1e-3, (system, seed)
