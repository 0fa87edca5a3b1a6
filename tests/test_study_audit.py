"The study of the released protocol: it runs on small and on odd collections, and its table follows from its scores."
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from nsnet.counts import wilson
from nsnet.experiments import load_scores
from nsnet.generators import index_mini
from nsnet.metrics import point_metrics
from nsnet.report import table
from nsnet.study import run_study
from studies import environment

REPO = Path(__file__).resolve().parents[1]
REPORT = REPO/"reports"/"audit"
TABLES = {"protocol.csv", "protocol.md", "explained.csv", "verdicts.csv", "wilson.csv", "one_run.csv", "claims.md", "facts.csv", "scores.csv.gz", "run.json"}
FIGURES = {"rank", "one_direction", "margin_canvases", "margins", "overlap", "epochs", "format", "two_hundred", "protocol"}


def study(folder, out="out", **params):
    "Run the study with all it writes in a folder; what it wrote."
    run_study("audit", out=folder/out, data=folder/"data", progress=False, **params)
    assert TABLES <= {p.name for p in (folder/out).iterdir()} and not list((folder/out).glob("*.failed.ipynb"))
    assert FIGURES == {p.stem for p in (folder/out/"figures").glob("*.png")}
    return folder/out


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return study(tmp_path_factory.mktemp("audit"))


def protocol_scores(report):
    "Of each protocol, system and seed the scores of the epoch that is best on the test images, as the study reports them."
    scores = load_scores(report/"scores.csv.gz")
    scores = scores[scores.system.str.startswith("protocol | ")]
    parts = scores.system.str.removeprefix("protocol | ").str.rsplit(" | ", n=1)
    scores, kept = scores.assign(system=parts.str[0], epoch=parts.str[1].astype(int)), []
    for _, own in scores.groupby(["system", "seed"], sort=False):
        ap = {e: point_metrics(x.label, x.score)["average_precision"] for e, x in own.groupby("epoch")}
        kept.append(own[own.epoch.eq(max(ap, key=ap.get))].drop(columns="epoch"))
    return pd.concat(kept, ignore_index=True)


def assert_table_follows(report, n_boot=1000):
    "protocol.csv is recomputed from the scores, intervals over images and over seeds included."
    expected = pd.read_csv(report/"protocol.csv")
    found = table(protocol_scores(report), ["generated"], n_boot)
    found = found[found.test.ne("paper")].set_index("system").loc[expected.system].reset_index()[list(expected)]
    numbers = expected.select_dtypes("number").columns
    assert (found.system == expected.system).all() and len(expected) == 13*3
    np.testing.assert_allclose(found[numbers].astype(float), expected[numbers].astype(float), rtol=0, atol=1e-6)


def test_smoke_run(smoke):
    assert_table_follows(smoke)
    verdicts, clean = pd.read_csv(smoke/"verdicts.csv"), pd.read_csv(smoke/"protocol.csv").set_index("system")
    assert verdicts.verdict.eq("not settled (one seed)").all()                       # one seed says nothing
    paper = pd.read_csv(smoke/"wilson.csv")
    np.testing.assert_allclose(paper[["low", "high"]].to_numpy().T, wilson(paper.right, paper.of), atol=1e-6)
    same = clean.loc[["clean | advanced_as_released", "rank | advanced_as_released"], "auroc"]
    assert same.iloc[0] == same.iloc[1]                                              # the rank is the baseline's alone


def test_second_run_only_reads(smoke):
    lines = (smoke.parent/"data/trials/audit.jsonl").read_bytes()
    again = study(smoke.parent, "again")
    assert (smoke.parent/"data/trials/audit.jsonl").read_bytes() == lines
    for name in ("scores.csv.gz", "protocol.csv", "verdicts.csv"): assert (again/name).read_bytes() == (smoke/name).read_bytes(), name


def test_two_seeds_two_generators_few_draws(smoke):
    out = study(smoke.parent, "odd", seeds="3,5", seen="nearest,deconv", n_train=31, n_test=9, n_boot=50)
    assert_table_follows(out, n_boot=50)
    scores = load_scores(out/"scores.csv.gz")
    assert set(scores.seed) == {3, 5} and scores.label.isin([0, 1]).all()
    assert json.loads((out/"run.json").read_text())["parameters"]["seen"] == "nearest,deconv"


def test_folder_of_odd_sizes(tmp_path):
    "Sides that are no multiples of the patch, PNG and JPEG, some images too small to lose a margin."
    index = index_mini(tmp_path/"mini", 24, 10, progress=False)
    rng = np.random.default_rng(0)
    for i, row in enumerate(index[index.generator.isin(["real", "deconv"])].itertuples()):
        width, height = rng.integers(20 if i % 12 == 0 else 70, 129, 2).tolist()
        file = tmp_path/"pictures"/("fake" if row.label else "real")/f"{i}.{'png' if i % 3 else 'jpg'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.open(tmp_path/"mini"/row.path).convert("RGB").crop((0, 0, width, height)).save(file)
    out = study(tmp_path, preset="folder", root=tmp_path/"pictures", n_train=20, n_test=8, n_boot=20, alike=True)
    assert_table_follows(out, n_boot=20)


@pytest.mark.parametrize("wrong, said", [(dict(seeds="0,0"), "every seed counts once"), (dict(seeds="a"), "whole numbers"), (dict(n_boot=2), "10 draws or more")])
def test_wrong_parameters(tmp_path, wrong, said):
    with pytest.raises(RuntimeError, match=said): run_study("audit", out=tmp_path, data=tmp_path, progress=False, **wrong)


def test_committed_table_follows_from_committed_scores():
    if not (REPORT/"scores.csv.gz").exists(): pytest.skip("reports/audit is not there: make audit")
    assert_table_follows(REPORT)


def test_committed_report_is_of_the_full_run_and_small():
    if not (REPORT/"run.json").exists(): pytest.skip("reports/audit is not there: make audit")
    record = json.loads((REPORT/"run.json").read_text())
    assert record["parameters"]["preset"] == "mini" and len(record["seeds"]) >= 5
    assert sum(f.stat().st_size for f in REPORT.rglob("*") if f.is_file()) < 6_000_000
    verdicts = pd.read_csv(REPORT/"verdicts.csv")
    assert set(verdicts.verdict) <= {"supported", "refuted", "not settled"} and len(verdicts) > 20
