"The committed report can be recomputed from its scores; what its intervals mean, and what they allow to claim."
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scipy import stats

from nsnet.metrics import by_generator, holm, image_interval, point_metrics, resample, seed_interval
from nsnet.report import LEGEND, claim, difference, intervals, markdown_table, summary, table, to_markdown

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
    return [test for test in expected.test[expected.seen.eq("yes")].unique()]


@pytest.fixture(scope="module")
def measured(scores, seen):
    return table(scores, seen)


@pytest.fixture(scope="module")
def headline(scores, seen):
    return intervals(scores, seen)


@pytest.fixture(scope="module")
def paired(scores, seen):
    return difference(scores, seen)


def assert_same(found, expected):
    "Same columns and rows, numbers to 1e-6 (the files have six decimals)."
    assert list(found) == list(expected) and len(found) == len(expected)
    numbers = expected.select_dtypes("number").columns
    pd.testing.assert_frame_equal(found.drop(columns=numbers), expected.drop(columns=numbers), check_dtype=False)
    np.testing.assert_allclose(found[numbers].astype(float), expected[numbers].astype(float), rtol=0, atol=1e-6)


def test_table(measured):
    assert_same(measured, pd.read_csv(committed("table1.csv")))


def test_intervals(headline):
    assert_same(headline, pd.read_csv(committed("intervals.csv")))


def test_difference(paired):
    assert_same(paired, pd.read_csv(committed("difference.csv")))


def test_table_as_text(measured):
    measured = measured[measured.test.ne("paper")]
    assert committed("table1.md").read_text(encoding="utf-8").endswith(to_markdown(measured))


def test_summary_as_text(headline):
    assert committed("summary.md").read_text(encoding="utf-8") == f"{markdown_table(summary(headline))}\n\n{LEGEND}\n"


def test_claims_as_text(paired):
    told = paired[paired.generator.isin(["mean unseen", "worst unseen"]) & (paired.b.eq("no_projection") | paired.holds)]
    expected = "".join(f"- {claim(row)}\n" for _, row in told.iterrows())
    assert committed("claims.md").read_text(encoding="utf-8") == expected
    readme = (REPORT.parents[1]/"README.md").read_text(encoding="utf-8")
    assert claim(told.iloc[0])[1:] in readme                          # the front page says this, and no more


def test_seed_interval_is_that_of_the_t_test():
    values = np.random.default_rng(0).normal(.03, .02, (5, 40))
    low, high, p = seed_interval(values)
    expected = stats.ttest_1samp(values, 0)
    ends = expected.confidence_interval(.95)
    np.testing.assert_allclose([low, high, p], [ends.low, ends.high, expected.pvalue])
    assert np.isnan(seed_interval(values[:1])).all()


def test_image_interval_is_that_of_the_bootstrap():
    "The mean of one sample, drawn by scipy and by us."
    x = np.random.default_rng(1).exponential(1, 300)
    theirs = stats.bootstrap((x,), np.mean, method="percentile", n_resamples=20_000, rng=2).confidence_interval
    low, high, p = image_interval(resample(np.zeros(300), 20_000) @ x / 300)
    assert abs(low - theirs.low) < .01 and abs(high - theirs.high) < .01 and p == 2/20_001
    assert image_interval(np.linspace(-1, 1, 2001))[2] == 1


def test_auroc_by_generator_is_that_of_scipy():
    rng = np.random.default_rng(3)
    y, g, score = np.repeat([0, 1, 1], 40), np.repeat(["real", "a", "b"], 40), rng.random(120).round(1)
    (auroc, accuracy), = by_generator(y, g, score, (.4,), ["b", "a"], np.ones((1, 120)))
    for name, found, right in zip("ba", auroc, accuracy):
        ranks = stats.mannwhitneyu(score[g == name], score[y == 0]).statistic / 1600
        assert found == pytest.approx(ranks) and right == ((score >= .4) == y)[(y == 0) | (g == name)].mean()


def test_holm_by_hand():
    "0.01·4, 0.02·3, 0.03·2 and 0.9·1, none below its predecessor; what is unknown counts and stays unknown."
    np.testing.assert_allclose(holm([.9, .03, .01, .02]), [.9, .06, .04, .06])
    np.testing.assert_allclose(holm([.02, np.nan, .01]), [.04, np.nan, .03])
    np.testing.assert_allclose(holm([.6, .7]), [1, 1])


def test_scenes_are_drawn_whole():
    "Copies of every image in one scene add nothing: the interval is that of the images once."
    one = invented(seeds=(0, 1, 2))
    twice = pd.concat([one.assign(scene=one.path), one.assign(scene=one.path, path=one.path + " again")])
    def width(scores): return intervals(scores, ["gan"]).eval("image_high - image_low")
    ratio = width(twice) / width(one)
    assert ratio.between(.85, 1.15).mean() > .9
    assert (width(twice.drop(columns="scene")) / width(one)).median() < .8


def invented(gain=1., seeds=(0, 1, 2, 3, 4), n=60, of_seed=0., systems=("advanced", "no_projection"), seed=0):
    "Scores of systems, the first of which is better by `gain`, with seeds that differ by `of_seed`."
    rng, rows = np.random.default_rng(seed), []
    images = [(g, i, rng.normal()) for g in ("real", "gan", "vae", "diffusion") for i in range(n)]
    for k, system in enumerate(systems):
        for s in seeds:
            strength = 1 + (gain if k == 0 else 0) + rng.normal(0, of_seed)
            rows += [(system, s, f"{g}/{i}.png", int(g != "real"), g, stats.norm.cdf((strength if g != "real" else 0) - .8 + easy + rng.normal(0, .3)), .5)
                     for g, i, easy in images]
    return pd.DataFrame(rows, columns="system seed path label generator score threshold".split())


def test_difference_is_paired_seed_by_seed():
    scores = invented(.5)
    row = difference(scores, ["gan"]).query("metric == 'auroc' and generator == 'mean unseen'").iloc[0]
    def auroc(system, s, g):
        own = scores[scores.system.eq(system) & scores.seed.eq(s) & scores.generator.isin(["real", g])]
        return point_metrics(own.label, own.score)["auroc"]
    each = [np.mean([auroc("advanced", s, g) - auroc("no_projection", s, g) for g in ("vae", "diffusion")]) for s in range(5)]
    np.testing.assert_allclose([row[f"seed_{s}"] for s in range(5)], each)
    expected = stats.ttest_1samp(each, 0)
    np.testing.assert_allclose([row.difference, row.p_seeds], [np.mean(each), expected.pvalue])
    np.testing.assert_allclose([row.seed_low, row.seed_high], expected.confidence_interval(.95))
    assert row.holds and claim(row).startswith("advanced is better than no_projection in AUROC (mean unseen): +")


def test_order_of_rows_does_not_matter_but_pairs_do():
    scores = invented()
    pd.testing.assert_frame_equal(difference(scores.sample(frac=1, random_state=0).sort_values("system", kind="stable"), ["gan"])
                                  .sort_values(["metric", "generator"]).reset_index(drop=True),
                                  difference(scores, ["gan"]).sort_values(["metric", "generator"]).reset_index(drop=True))
    torn = scores.copy()
    own = torn.system.eq("advanced")
    for s in range(5): torn.loc[own & torn.seed.eq(s), "path"] = np.random.default_rng(1).permutation(torn.path[own & torn.seed.eq(s)])
    with pytest.raises(ValueError, match="no pairs"): difference(torn, ["gan"])
    with pytest.raises(ValueError, match="no pairs"): difference(scores[~(own & scores.seed.eq(4))], ["gan"])
    with pytest.raises(ValueError, match="different images"): difference(scores.iloc[1:], ["gan"])
    with pytest.raises(ValueError, match="'advancd'"): difference(scores, ["gan"], "advancd")


def test_mean_and_worst_are_of_each_seed(headline):
    unseen = headline[headline.seen.eq("no") & ~headline.generator.str.contains("unseen")]
    for how in ("mean", "min"):
        own = headline[headline.generator.eq(dict(mean="mean", min="worst")[how] + " unseen")].set_index(["system", "metric"])
        for s in range(3):
            expected = unseen.groupby(["system", "metric"])[f"seed_{s}"].agg(how)
            np.testing.assert_allclose(own[f"seed_{s}"], expected.reindex(own.index))


def test_single_values_are_marked():
    scores = invented(gain=9, seeds=(0, 1, 2), systems=("advanced", "no_projection", "spectrum_probe"))
    sure = scores.assign(score=scores.label.where(scores.system.eq("advanced"), scores.score))
    sure.loc[sure.system.eq("spectrum_probe"), "score"] = np.tile(sure.score[sure.system.eq("spectrum_probe") & sure.seed.eq(0)], 3)
    found = intervals(sure, ["gan"])
    assert found.degenerate[found.system.eq("advanced")].eq("both").all()
    assert found.degenerate[found.system.eq("spectrum_probe")].eq("seeds").all()
    assert found.degenerate[found.system.eq("no_projection") & found.metric.eq("auroc")].eq("no").all()
    cells = summary(found).set_index(["metric", "system"]).loc["AUROC"]
    assert cells.loc["advanced", "mean unseen"] == "1.000 [1.000, 1.000]† {1.000, 1.000}†" and "†" in to_markdown(table(sure, ["gan"]))
    assert cells.loc["spectrum_probe", "worst unseen"].count("†") == 1 and "†" not in cells.loc["no_projection", "mean unseen"]
    itself = difference(sure, ["gan"], "advanced", "advanced", n_boot=50)
    assert itself.degenerate.eq("both").all() and not itself.holds.any() and "single value (†)" in claim(itself.iloc[0])


def test_one_seed_claims_nothing():
    one = invented(gain=3, seeds=(7,))
    paired = difference(one, ["gan"])
    assert (paired.image_low > 0).any() and not paired.holds.any() and paired[["seed_low", "p_seeds", "p_holm"]].isna().all(axis=None)
    assert claim(paired.iloc[0]).startswith("not settled:") and "one seed says nothing" in claim(paired.iloc[0])
    assert "{" not in markdown_table(summary(intervals(one, ["gan"])))


def made_up(images, seeds, p_holm=.01, **changed):
    "A row of `difference` with these intervals."
    row = dict(a="new", b="old", metric="auroc", generator="mean unseen", difference=np.mean(images), image_low=images[0], image_high=images[1],
               seed_low=seeds[0], seed_high=seeds[1], p_holm=p_holm, degenerate="no", holds=False)
    return row | changed


@pytest.mark.parametrize("row, said", [
    (made_up((.02, .04), (.01, .05), holds=True), "new is better than old in AUROC (mean unseen): +0.030, images [0.020, 0.040], seeds {0.010, 0.050}, Holm p = 0.010"),
    (made_up((-.04, -.02), (-.05, -.01), holds=True), "new is worse than old in AUROC (mean unseen): −0.030, images [−0.040, −0.020], seeds {−0.050, −0.010}, Holm p = 0.010"),
    (made_up((.02, .04), (-.01, .07)), "; the interval over seeds contains zero"),
    (made_up((-.01, .07), (.02, .04)), "; the interval over images contains zero"),
    (made_up((-.01, .07), (-.02, .04)), "; both intervals contain zero"),
    (made_up((.02, .04), (-.04, -.02)), "; the two intervals lie on opposite sides of zero"),
    (made_up((.02, .04), (.01, .05), .2), "; off zero, but not after Holm's correction (p = 0.200)"),
    (made_up((.02, .04), (.03, .03), degenerate="seeds"), "; the interval over seeds is a single value (†), which says nothing about others"),
    (made_up((.02, .04), (np.nan, np.nan), np.nan), "; one seed says nothing about other training runs")])
def test_claims(row, said):
    text = claim(row)
    assert text == said if row["holds"] else text.endswith(said) and text.startswith("not settled: whether new is better than old")


def test_what_holds_needs_both_intervals_and_holm(paired):
    same_side = (paired[["image_low", "seed_low"]] > 0).all(axis=1) | (paired[["image_high", "seed_high"]] < 0).all(axis=1)
    assert (paired.holds == (same_side & paired.p_holm.lt(.05))).all()
    p = paired[["p_images", "p_seeds"]].max(axis=1)
    kinds = paired.generator.where(paired.generator.str.contains("unseen"), "single")
    for _, rows in p.groupby([paired.metric, kinds]): np.testing.assert_allclose(paired.p_holm[rows.index], holm(rows))
    assert set(paired.b[paired.generator.eq("mean unseen")]) == set(pd.unique(paired.b)) and paired.b.iloc[0] == "no_projection"


def test_equal_systems_are_rarely_told_apart():
    "Where seeds differ a lot, images alone would claim much; both together do not."
    found = pd.concat([difference(invented(0, n=40, of_seed=.3, seed=s), ["gan"], n_boot=200).query("metric == 'auroc' and generator == 'mean unseen'") for s in range(40)])
    assert ((found.image_low > 0) | (found.image_high < 0)).sum() > 8 and found.holds.sum() <= 5


def test_seven_systems_five_seeds_take_seconds(scores, seen):
    assert scores.system.nunique() == 7 and scores.seed.nunique() == 5
    start = time.perf_counter()
    intervals(scores, seen)
    assert time.perf_counter() - start < 10
