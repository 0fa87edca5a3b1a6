"Generators never seen: the study on the mini world, on trees of the field's layouts, on real pictures; its tables from its scores."
from itertools import product
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as skm
from test_trees import PACKINGS, both, build

from nsnet.benchmarks import index_any, pairs
from nsnet.experiments import load_scores
from studies import environment, run_in

REPO = Path(__file__).resolve().parents[1]
WILD, REPORT = REPO.parent/"shared/wild", REPO/"reports/generators"
FILES = {"scores.csv.gz", "facts.csv", "cells.csv", "table.csv", "differences.csv", "false_positives.csv", "generators.md", "run.json", "figures"}
SMALL = dict(preset="any", backbone="mini", captioner="mini", patch=8, canvas=64, n_boot=50)       # the trees have pictures of 12 pixels
AIGIBENCH = ("ProGAN R3GAN StyleGAN3 StyleGAN-XL StyleSwim WFIR BlendFace E4S FaceSwap InSwap SimSwap DALLE-3 FLUX1-dev GLIDE Imagen3 "
             "Midjourney-V6 SD3 SDXL BLIP Infinite-ID InstantID IP-Adapter PhotoMaker CommunityAI SocialRF").split()


def study(folder, **params):
    "The report of a run in a folder."
    run_in(folder, "generators", **params)
    assert FILES <= {p.name for p in (folder/"out").iterdir()} and list((folder/"out/figures").glob("*.png"))
    return folder/"out"


def scored_pictures(out):
    "Scores by tower, system and training set, with the photographs' sources where there are some."
    scores = load_scores(out/"scores.csv.gz", pd.read_csv(out/"facts.csv"))
    scores[["tower", "system", "trained_on"]] = scores.system.str.split(" | ", regex=False, expand=True)
    if not (out/"test.csv").exists(): return scores.assign(source="")
    return scores.merge(pd.read_csv(out/"test.csv").fillna({"source": ""})[["path", "source"]], on="path")


def expected(rows, threshold):
    "The metrics of one run on one generator, by scikit-learn."
    y, score = rows.label, rows.score
    fpr, tpr, _ = skm.roc_curve(y, score, drop_intermediate=False)
    flagged = score >= .5
    real, fake = (~flagged[y == 0]).mean(), flagged[y == 1].mean()
    return dict(auroc=skm.roc_auc_score(y, score), accuracy=(flagged == y).mean(), calibrated_accuracy=((score >= threshold) == y).mean(),
                real_accuracy=real, fake_accuracy=fake, average_precision=skm.average_precision_score(y, score),
                tpr_at_5fpr=tpr[fpr <= .05 + 1e-9].max(),
                precision_at_1=.01*fake/(.01*fake + .99*(1 - real)) if fake or real < 1 else np.nan)


def cells_of(scores):
    "Every cell (training set, generator) of every system anew: the mean over seeds."
    found, photographs = {}, scores.label.eq(0)
    for g in scores.generator[~photographs].unique():
        mine = scores[scores.generator.eq(g) | (photographs & scores.path.isin(paired_with(scores, g)))]
        for (*key, _), run in mine.groupby(["tower", "system", "trained_on", "seed"]):
            for metric, value in expected(run, run.threshold.iloc[0]).items(): found.setdefault((*key, g, metric), []).append(value)
    return pd.Series({key: np.mean(values) for key, values in found.items()})


def paired_with(scores, g):
    "The photographs that a generator is tested against."
    images = scores.drop_duplicates("path")
    if images.source[images.label.eq(0)].nunique() < 2: images = images.drop(columns="source")
    return pairs(images)[g].path


def whole_mean(values): return values.mean(skipna=False)


def tables_follow_from_scores(out, systems=None):
    "cells.csv, and mean, deviation and minimum over generators in table.csv, from the scores alone."
    scores = scored_pictures(out)
    anew = cells_of(scores[scores.system.isin(systems)] if systems else scores)
    cells = pd.read_csv(out/"cells.csv").set_index(["tower", "system", "trained_on", "generator", "metric"])
    np.testing.assert_allclose(cells.value.loc[anew.index], anew, atol=6e-5)
    table = pd.read_csv(out/"table.csv")
    single = table[~table.generator.str.contains(r"^(?:mean|worst) (?:un)?seen$")]
    for (tower, system, kind, seen, metric), rows in single.groupby(["tower", "system", "trained_on", "seen", "metric"]):
        if systems and system not in systems: continue
        own = cells[cells.seen.eq(seen)].reset_index().query("tower == @tower and system == @system and metric == @metric")
        own = own[{"one": ~own.trained_on.str.contains("all but|together"), "all but one": own.trained_on.str.startswith("all but"),
                   "together": own.trained_on.eq("together")}[kind]]
        np.testing.assert_allclose(own.groupby("generator").value.apply(whole_mean)[rows.generator], rows.value, atol=1e-4)
        np.testing.assert_allclose(rows.sd_over_generators, rows.value.std(ddof=1, skipna=False), atol=1e-5)
        if len(rows) < 2: continue
        own = table[(table[["tower", "system", "trained_on", "seen", "metric"]] == [tower, system, kind, seen, metric]).all(axis=1)].set_index("generator").value
        word = dict(no="unseen", yes="seen")[seen]
        np.testing.assert_allclose(own[f"mean {word}"], whole_mean(rows.value), atol=1e-5)
        seeds = rows.filter(regex=r"^seed_\d+$").min(skipna=False)
        np.testing.assert_allclose(own[f"worst {word}"], whole_mean(seeds), atol=1e-5)
    return table


def in_this_process(given):
    "What the notebook's cells define when they run here, which is quicker than a kernel for each."
    names = {"__name__": "study"}
    for cell in nbformat.read(REPO/"nbs/studies/generators.ipynb", 4).cells:
        if cell.cell_type != "code": continue
        exec(compile(cell.source, "generators", "exec"), names)
        if "parameters" in cell.metadata.get("tags", []): names |= given
    return names


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    "A finished smoke run on the mini world."
    return study(tmp_path_factory.mktemp("smoke"))


def test_mini_world(smoke):
    table = tables_follow_from_scores(smoke, ["advanced", "no_projection", "metadata"])
    assert set(table.trained_on) == {"one", "all but one"} and set(table.tower) == {"frozen", "adapted", "none"}
    cells = pd.read_csv(smoke/"cells.csv")
    assert (cells.seen.eq("yes") == [g in name if "all but" not in name else g not in name and g != "nearest" and g != "bilinear"
                                     for g, name in zip(cells.generator, cells.trained_on)]).all()
    null = table[table.system.eq("metadata")]
    assert (null.value - null.null).abs().max() < 1e-9
    assert {p.stem for p in (smoke/"figures").glob("*.png")} >= {"matrix_frozen", "matrix_adapted", "matrix_metadata", "generators_frozen", "differences"}
    said = (smoke/"generators.md").read_text()
    assert "A smoke run" in said and "None has this protocol" in said and said.count("*not settled*") == 22 and "supported" not in said


def test_differences_follow_from_scores(smoke):
    cells, found = pd.read_csv(smoke/"cells.csv"), pd.read_csv(smoke/"differences.csv")
    cells = cells[cells.tower.eq("adapted") & cells.metric.eq("auroc") & cells.seen.eq("no") & ~cells.trained_on.str.contains("all but")]
    mean = cells.groupby(["system", "generator"]).value.mean().groupby("system")
    row = found[found.family.eq("1") & found.metric.eq("auroc") & found.generator.eq("mean unseen, trained on one, adapted tower")].iloc[0]
    assert abs(row.difference - (mean.mean()["advanced"] - mean.mean()["no_projection"])) < 2e-4
    row = found[found.family.eq("2") & found.metric.eq("auroc") & found.generator.eq("worst unseen, trained on one, adapted tower")].iloc[0]
    assert abs(row.difference - (mean.min()["advanced"] - mean.min()["no_projection"])) < 2e-4


def test_false_positives_follow_from_scores(smoke):
    real = scored_pictures(smoke).query("label == 0").assign(flagged=lambda s: s.score >= .5)
    anew = real.groupby(["tower", "system", "trained_on"]).flagged.mean()
    found = pd.read_csv(smoke/"false_positives.csv").set_index(["tower", "system", "trained_on"])
    np.testing.assert_allclose(found.flagged, anew[found.index], atol=1e-6)
    assert (found.flagged_low <= found.flagged + 1e-9).all() and (found.flagged <= found.flagged_high + 1e-9).all()


def test_no_system_sees_other_training_images_than_another(smoke):
    "Each system has a score for every test image from every training set and seed."
    scores = scored_pictures(smoke)
    assert scores.groupby(["tower", "system", "trained_on", "seed"]).path.nunique().nunique() == 1
    assert scores.groupby(["tower", "system"]).trained_on.nunique().eq(6).all()


def test_benchmark_with_published_numbers(tmp_path):
    "AIGIBench with all its test sets: the published table stands beside ours, and each generator has its own photographs."
    folders = both("train/car", "train/sdv1.4", "val/horse", *(f"test/{name}" for name in AIGIBENCH))
    root = build(tmp_path/"AIGIBench", *folders, files=[f"{i}.png" for i in range(4)])
    out = study(tmp_path, root=str(root), systems="advanced,linear_probe", adapted=False, whole=True, **SMALL)
    table = tables_follow_from_scores(out)
    assert set(table.seen) == {"yes", "no"} and len(set(table.generator[table.seen.eq("no")])) == 24 + 2
    scores = scored_pictures(out).query("system == 'advanced' and label == 0")
    assert scores.groupby("source").path.nunique()[AIGIBENCH].eq(4).all()
    published = pd.read_csv(out/"published.csv")
    assert {"DGS-Net", "Effort", "advanced", "metadata"} <= set(published.system) and published.protocol.str.contains("25 test sets").all()
    ours = published[published.system.eq("advanced")].iloc[0]
    cells = pd.read_csv(out/"cells.csv").query("system == 'advanced' and metric == 'accuracy'")
    assert abs(ours.accuracy - cells.value.mean()) < 1e-4 and "training images per label" in ours.source
    assert "None has this protocol" not in (out/"generators.md").read_text()


def test_photographs_of_several_sources(tmp_path):
    "The diffusion sets of UniversalFakeDetect: guided is compared with imagenet, the others with laion; false positives are apart."
    folders = ["imagenet/0_real", "laion/0_real", "guided/1_fake", "ldm_200/1_fake", "dalle/1_fake"]
    root = build(tmp_path/"diffusion_datasets", *folders, files=[f"{i}.png" for i in range(16)])
    out = study(tmp_path, root=str(root), seen="ldm_200", systems="advanced,no_projection", n_train=8, n_test=8, **SMALL)
    tables_follow_from_scores(out)
    found = pd.read_csv(out/"false_positives.csv")
    assert set(found.source) == {"imagenet", "laion"} and (out/"figures/false_positives.png").exists()
    assert "published" not in {p.stem for p in out.glob("*.csv")} and "None has this protocol" in (out/"generators.md").read_text()
    scores = scored_pictures(out)
    own = scores[scores.system.eq("advanced") & scores.tower.eq("frozen") & scores.seed.eq(0)]
    with_imagenet = own[own.generator.eq("guided") | own.source.eq("imagenet")]
    assert "photographs of their own" not in (out/"generators.md").read_text()
    cells = pd.read_csv(out/"cells.csv").query("system == 'advanced' and tower == 'frozen' and metric == 'auroc' and generator == 'guided'")
    assert abs(cells.value.iloc[0] - skm.roc_auc_score(with_imagenet.label, with_imagenet.score)) < 1e-4


# One packing of each layout; those with test images only are divided anew
TREES = {"forensynths": {}, "universalfakedetect repack": {}, "genimage wrapped": {}, "genimage repack": dict(sets="one,all but one,together"),
         "aigibench": {}, "aigcdetect": dict(forget_split=True), "chameleon": dict(forget_split=True), "community_forensics": dict(sets="one,all but one"),
         "dalle": {}, "dalle mirror": {}, "folder": {}}


@pytest.mark.parametrize("name", TREES)
def test_every_layout(tmp_path, monkeypatch, name):
    "Indexed, paired, measured and counted by source, with a system that needs no CLIP."
    home, folders, _ = PACKINGS[name]
    root = build(tmp_path/home, *folders, files=[f"{i}.PNG" for i in range(12)])
    monkeypatch.chdir(tmp_path)
    given = SMALL | dict(root=str(root), n_train=8, n_test=3, systems="spectrum_probe", adapted=False, data="data", out="out") | TREES[name]
    names = in_this_process(given)
    index = index_any(root, progress=False)
    assert names["layout"] == index.attrs["layout"] == name.split()[0]
    scores, test = scored_pictures(tmp_path/"out"), names["test"]
    assert set(scores.system) == {"spectrum_probe", "metadata"} and not scores.score.isna().any()
    own = {g: set(rows.path) for g, rows in pairs(test).items()}
    for g, (k, rows) in product(own, enumerate([names["own_rows"]])): assert set(test.path.iloc[rows[g]]) == own[g]
    tables_follow_from_scores(tmp_path/"out")
    found = pd.read_csv(tmp_path/"out/false_positives.csv")
    assert found.groupby(["system", "trained_on"]).photographs.sum().eq(test.label.eq(0).sum()).all()


def test_collection_of_test_images_only_says_what_to_do(tmp_path, monkeypatch):
    root = build(tmp_path/"Chameleon", *both("test"), files=[f"{i}.png" for i in range(8)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="forgets a split"): in_this_process(SMALL | dict(root=str(root), data="data", out="out"))


@pytest.mark.parametrize("wrong, said", [(dict(sets="each"), "sets='each': one of one, all but one"), (dict(seeds="0,,1"), "whole numbers"), (dict(seeds="1,1"), "every seed counts once"),
                                         (dict(systems="advancd"), "unknown system 'advancd'"), (dict(seen="gan"), "unknown generator 'gan'")])
def test_wrong_parameters_are_refused(tmp_path, monkeypatch, wrong, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said): in_this_process(dict(data="data", out="out") | wrong)


def test_real_pictures(tmp_path):
    if not WILD.is_dir(): pytest.skip("the folder shared/wild with real pictures is not beside this checkout")
    out = study(tmp_path, preset="folder", root=str(WILD), seen="chatgpt-image,gemini-image", systems="advanced,no_projection,linear_probe",
                adapted=False)
    table = tables_follow_from_scores(out)
    assert set(table.seen) == {"yes", "no"} and "never seen a real photograph" in (out/"generators.md").read_text()
    null = table[table.system.eq("metadata") & table.metric.eq("auroc") & table.generator.eq("mean seen")]
    assert null.value.iloc[0] > .8                                            # sizes differ by class, and the null says so


def test_committed_report_follows_from_its_scores():
    if not (REPORT/"scores.csv.gz").exists(): pytest.skip("reports/generators has not been made: make generators")
    table = tables_follow_from_scores(REPORT, ["advanced", "no_projection", "metadata"])
    assert {"one", "all but one"} <= set(table.trained_on) and len(table.filter(regex=r"^seed_\d+$").columns) >= 5
    assert sum(p.stat().st_size for p in REPORT.rglob("*") if p.is_file()) < 8e6
