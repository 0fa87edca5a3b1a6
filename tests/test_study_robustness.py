"Pictures as they travel: run, interrupted and run again, refused, beside table1, and its tables recomputed from the scores."
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score
from studies import environment, run_in


REPO = Path(__file__).resolve().parents[1]
REPORT = REPO/"reports/robustness"
FIGURES = {"transforms", "apart-seen", "apart-unseen", "jpeg", "pull", "alike", "retold", "thresholds", "reliability", "few-shot"}
CHEAP = dict(systems="linear_probe,spectrum_probe", transforms="jpeg 50", alike="none")


def study(folder, out="out", data="data", name="robustness", **params):
    "Run a study in a folder; what it wrote."
    return run_in(folder, name, out, data, **params)


@pytest.fixture(scope="module")
def cheap(tmp_path_factory):
    "A finished run of two probes and one transform, its data beside it."
    return study(tmp_path_factory.mktemp("cheap"), **CHEAP)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    "A finished run with all defaults."
    return study(tmp_path_factory.mktemp("smoke"))


def logits_of(out):
    "The saved logits as a long table: path, label, generator, files, system, transform, seed, logit."
    wide = pd.read_csv(out/"scores.csv.gz")
    long = wide.melt(["path", "label", "generator"], var_name="column", value_name="logit")
    long[["files", "system", "transform", "seed"]] = long.column.str.split(" | ", regex=False, expand=True).to_numpy()
    return long.drop(columns="column")


def measured(rows, generators):
    "AUROC and balanced accuracy at 0.5 of one detector, against all photographs, in the mean of some generators."
    found = []
    for name in generators:
        own = rows[rows.label.eq(0) | rows.generator.eq(name)]
        right = own.logit.ge(0).eq(own.label.eq(1)).groupby(own.label).mean()
        found.append((roc_auc_score(own.label, own.logit), right.mean()))
    return np.mean(found, 0)


def check_levels(out, seen):
    "levels.csv and changes.csv follow from the saved scores."
    long, levels, changes = logits_of(out), pd.read_csv(out/"levels.csv"), pd.read_csv(out/"changes.csv", keep_default_na=False)
    names = set(long.generator[long.label.eq(1)])
    tests = {"seen": sorted(names & seen), "unseen": sorted(names - seen)}
    found = {(*key, kind): measured(rows, some) for key, rows in long.groupby(["files", "system", "transform", "seed"]) for kind, some in tests.items()}
    found = pd.DataFrame(found, index=["auroc", "balanced accuracy"]).T.rename_axis(["files", "system", "transform", "seed", "test"])
    mean = found.groupby(["files", "system", "transform", "test"]).mean().stack()
    written = levels[levels.test.isin(tests)].set_index(["files", "system", "transform", "test", "metric"]).value
    assert len(written) == len(mean)
    assert np.allclose(written, mean[written.index], atol=2e-5)
    for row in changes[changes.metric.isin(["auroc", "balanced accuracy"]) & changes.test.isin(tests)].to_dict("records"):
        after, before = (mean["as they are", row["system"], route, row["test"], row["metric"]] for route in (row["transform"], "none"))
        assert np.isclose(float(row["value"]), after - before, atol=2e-5), row


def check_pull(out):
    "pull.csv, on the seen generator, follows from the scores of pictures of which only one label was transformed."
    long, pull = logits_of(out), pd.read_csv(out/"pull.csv")
    long = long[long.files.eq("as they are")]
    for system, route in pull[["system", "transform"]].drop_duplicates().sample(4, replace=True, random_state=0).to_numpy():
        both, found = long[long.system.eq(system)].set_index(["transform", "path"]), []
        for _, rows in both.groupby("seed"):
            label, sides = rows.loc["none"].label, []
            own = rows.loc["none"].generator.isin(["deconv"]) | label.eq(0)
            for transformed in (1, 0):
                logit = rows.loc[route].logit.where(label.eq(transformed), rows.loc["none"].logit)
                sides.append(roc_auc_score(label[own], logit[own]))
            found.append(sides[0] - sides[1])
        assert np.isclose(np.mean(found), pull[pull.system.eq(system) & pull["transform"].eq(route) & pull.test.eq("seen")].value.iloc[0], atol=2e-5)


def test_all_defaults(smoke):
    written = {p.name for p in smoke.iterdir()}
    assert {"scores.csv.gz", "detectors.csv", "captions.csv", "levels.csv", "changes.csv", "pull.csv", "one-label.csv", "alike.csv", "alike.md",
            "retold.csv", "thresholds.csv", "calibration.csv", "few-shot.csv", "verdicts.md", "summary.md", "run.json", "robustness.ipynb"} <= written
    assert FIGURES <= {p.stem for p in (smoke/"figures").glob("*.png")}
    assert not list(smoke.glob(".*")) and not list(smoke.glob("*.failed.ipynb"))
    verdicts = (smoke/"verdicts.md").read_text()
    assert verdicts.count("**Hypothesis.**") == 10 and "smoke run" in verdicts and "nan" not in verdicts
    assert (smoke/"robustness.ipynb").stat().st_size < 600_000
    check_levels(smoke, {"deconv"})
    check_pull(smoke)


def test_one_seed_settles_nothing(smoke):
    for name in ("changes", "pull", "alike", "thresholds", "few-shot-gained"): assert not pd.read_csv(smoke/f"{name}.csv").holds.any()


def test_record_names_no_folder_of_this_machine(smoke):
    for file in [f for f in smoke.glob("*.*") if f.suffix != ".gz"]:
        text = file.read_text()
        assert str(smoke.parent) not in text and str(REPO) not in text, file.name


def test_interrupted_run_goes_on(cheap):
    "Half of the logits are lost, the last line in its middle; only the missing ones are computed, and all tables are the same."
    store, before = cheap.parent/"data/trials/robustness.jsonl", {p.name: p.read_bytes() for p in cheap.glob("*.csv*")}
    lines = store.read_bytes().splitlines(keepends=True)
    store.write_bytes(b"".join(lines[:len(lines)//2]) + lines[len(lines)//2][:40])
    trained = {p: p.stat().st_mtime_ns for p in (cheap.parent/"data/models").glob("*/run.json")}
    study(cheap.parent, "again", **CHEAP)
    after = store.read_bytes().splitlines(keepends=True)
    assert after[:len(lines)//2] == lines[:len(lines)//2] and sorted(after) == sorted(lines)
    assert before == {p.name: p.read_bytes() for p in (cheap.parent/"again").glob("*.csv*")}
    assert trained == {p: p.stat().st_mtime_ns for p in (cheap.parent/"data/models").glob("*/run.json")}


def test_table1_uses_the_same_detectors(cheap):
    "Nothing is trained twice, and untouched pictures get the scores that table1 gives them."
    trained = {p: p.stat().st_mtime_ns for p in (cheap.parent/"data/models").glob("*/run.json")}
    table1 = study(cheap.parent, "table1", name="table1", systems=CHEAP["systems"])
    assert trained == {p: p.stat().st_mtime_ns for p in (cheap.parent/"data/models").glob("*/run.json")}
    models = [json.loads((out/"run.json").read_text())["models"] for out in (cheap, table1)]
    assert models[0] == models[1]
    mine, theirs = logits_of(cheap), pd.read_csv(table1/"scores.csv")
    mine = mine[mine["transform"].eq("none")].set_index(["system", "path"]).logit
    theirs = theirs.set_index(["system", "path"]).score
    assert np.allclose(1/(1 + np.exp(-mine)), theirs[mine.index], atol=5e-4)


def test_temperature_of_a_detector_is_recorded(cheap):
    known = pd.read_csv(cheap/"detectors.csv")
    assert known.temperature.gt(0).all() and known.threshold.between(0, 1.001).all()


@pytest.mark.parametrize("params, said", [
    (dict(transforms="jpg 50"), "unknown transform 'jpg 50': one of none, jpeg 95"), (dict(transforms="none"), "at least one besides none"),
    (dict(n_boot=5), "at least 100 draws"), (dict(systems="advance"), "unknown system 'advance'"), (dict(seeds="0,,1"), "whole numbers")])
def test_nonsense_is_refused_before_anything_slow(tmp_path, params, said):
    with pytest.raises(RuntimeError, match=said): study(tmp_path, **params)
    assert not (tmp_path/"data").exists()


def test_committed_tables_follow_from_the_committed_scores():
    if not (REPORT/"scores.csv.gz").exists(): pytest.skip("reports/robustness is not there: make robustness writes it")
    assert (REPORT/"scores.csv.gz").stat().st_size <= 4*2**20
    check_levels(REPORT, {"deconv"})
    check_pull(REPORT)
