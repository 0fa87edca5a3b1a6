"The statistics against brute force, and what a 95 % interval holds when the truth is known."
import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, roc_auc_score

from nsnet.counts import mcnemar, precision_at, wilson
from nsnet.metrics import by_generator, caption_sensitivity, holm, image_interval, resample, seed_interval


def sigmoid(logit): return 1/(1 + np.exp(-logit))


@pytest.fixture(scope="module")
def images():
    "Labels, generators, scenes and two systems' scores, some tied: scenes with all three kinds, with a photograph, with a gan."
    kinds = [("real", "gan", "vae")]*12 + [("real",)]*6 + [("gan",)]*5
    generator = np.array([name for kind in kinds for name in kind])
    scene = np.repeat(np.arange(len(kinds)), [len(kind) for kind in kinds])
    order, rng = np.random.default_rng(1).permutation(len(scene)), np.random.default_rng(2)
    generator, scene = generator[order], scene[order]
    y = (generator != "real").astype(int)
    return y, generator, scene, np.round(sigmoid(rng.standard_normal((2, len(y))) + y - .5), 1)


def test_a_draw_takes_scenes_with_replacement(images):
    "All images of a scene as often as each other, scenes only in place of their like: as drawing them one by one."
    _, generator, scene, _ = images
    weights = resample(generator, 200, scene=scene)
    for group, m in ((range(12), 12), (range(12, 18), 6), (range(18, 23), 5)):
        drawn = np.stack([weights[:, scene == s].T for s in group])
        assert (drawn == drawn[:, :1]).all() and (drawn[:, 0].sum(0) == m).all()


def test_each_draw_is_as_likely_as_it_should_be():
    "Three images: 27 equally likely sequences, counted as the weights they give."
    sequences = [np.bincount(s, minlength=3) for s in np.ndindex(3, 3, 3)]
    weights, n = resample(np.zeros(3), 27_000, seed=3), 27_000
    for w in np.unique(sequences, axis=0):
        share = np.mean([(w == s).all() for s in sequences])
        assert abs((weights == w).all(1).mean() - share) < 4*(share*(1 - share)/n)**.5


def test_weights_say_what_repeated_images_say(images):
    "AUROC and accuracy of each draw as scikit-learn has them for each image repeated as often as it was drawn."
    y, generator, scene, scores = images
    weights = resample(generator, 50, seed=4, scene=scene)
    found = np.stack([by_generator(y, generator, s, (.5, .3), ["vae", "gan"], weights) for s in scores])
    for draw, w in enumerate(weights):
        for g, name in enumerate(["vae", "gan"]):
            rows = [i for i in range(len(y)) if generator[i] in ("real", name) for _ in range(w[i])]
            for s, score in enumerate(scores):
                expected = [roc_auc_score(y[rows], score[rows]), *(accuracy_score(y[rows], score[rows] >= t) for t in (.5, .3))]
                assert np.allclose(found[s, draw, :, g], expected, rtol=0, atol=1e-12)


def test_paired_interval(images):
    "The difference of two systems on the same draws: percentiles of its sorted values, and p by counting."
    y, generator, scene, scores = images
    weights = resample(generator, 400, seed=5, scene=scene)
    draws = np.subtract(*(by_generator(y, generator, s, (.5,), ["gan"], weights)[:, :, 0] for s in scores))
    for j, (low, high, p) in enumerate(zip(*image_interval(draws))):
        values = sorted(draws[:, j])
        for end, q in ((low, .025), (high, .975)):
            below, part = int(q*399), q*399 % 1
            assert np.isclose(end, values[below]*(1 - part) + values[below + 1]*part)
        fewer = min(sum(v <= 1e-12 for v in values), sum(v >= -1e-12 for v in values))
        assert np.isclose(p, min(1, 2*(fewer + 1)/401))


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_interval_over_seeds_is_scipys(seeds):
    values = np.random.default_rng(seeds).normal(.01, .02, (seeds, 4, 3))
    low, high, p = seed_interval(values)
    expected = stats.t.interval(.95, seeds - 1, loc=values.mean(0), scale=stats.sem(values, 0))
    assert np.allclose([low, high], expected) and np.allclose(p, stats.ttest_1samp(values, 0).pvalue)


def decisions(both, a_only, b_only, neither):
    "Labels and the decisions of two systems that are right together, one alone, or wrong together so many times."
    counts = [both, a_only, b_only, neither]
    y = np.arange(sum(counts)) % 2
    right = np.repeat([[True, True, False, False], [True, False, True, False]], counts, axis=1)
    return y, *np.where(right, y, 1 - y).astype(bool)


def test_mcnemar_sums_the_binomial():
    "Twice the smaller tail of n fair coins, at most 1, whatever the images are on which the two agree."
    for n in range(26):
        for k in range(n + 1):
            tail = sum(math.comb(n, i) for i in range(min(k, n - k) + 1))/2**n
            assert np.isclose(mcnemar(*decisions(n % 3, k, n - k, k % 4)), min(1, 2*tail)), (k, n)


def test_mcnemar_is_no_more_often_wrong_than_it_says():
    "All outcomes of n fair coins: those of p ≤ 0.05 have a probability of at most 0.05, for every n."
    for n in range(41):
        off = [k for k in range(n + 1) if mcnemar(*decisions(5, k, n - k, 1)) <= .05]
        assert sum(math.comb(n, k) for k in off)/2**n <= .05


def test_holm_is_the_loop():
    rng = np.random.default_rng(0)
    for m in range(1, 9):
        p = np.where(rng.random(m) < .2, np.nan, rng.random(m)**3).round(2)
        largest, corrected = 0, {}
        for rank, i in enumerate(sorted(range(m), key=lambda i: 1 if np.isnan(p[i]) else p[i])):
            largest = max(largest, min(1, (m - rank)*(1 if np.isnan(p[i]) else p[i])))
            corrected[i] = np.nan if np.isnan(p[i]) else largest
        assert np.allclose(holm(p), [corrected[i] for i in range(m)], equal_nan=True)


def test_precision_is_what_counting_gives():
    "A population of images, each flagged or not: the share of generated ones among the flagged."
    rng, n = np.random.default_rng(0), 1_000_000
    for prevalence, tpr, fpr in ((.01, .9, .05), (.1, .5, .01), (.5, .8, .2), (.001, .99, .001)):
        generated = rng.random(n) < prevalence
        flagged = rng.random(n) < np.where(generated, tpr, fpr)
        counted, expected = generated[flagged].mean(), precision_at(prevalence, tpr, fpr)
        assert abs(counted - expected) < 4*(expected*(1 - expected)/flagged.sum())**.5
    assert np.isclose(precision_at(.01, .9, .05), 900/(900 + 4950))        # of 100,000


@pytest.mark.parametrize("n", [1, 2, 10, 97, 1000])
def test_wilson_is_its_formula(n):
    k, z = np.arange(n + 1), stats.norm.ppf(.975)
    middle, half = k/n + z**2/(2*n), z*np.sqrt(k/n*(1 - k/n)/n + z**2/(4*n**2))
    low, high = wilson(k, n)
    assert np.allclose([low, high], np.stack([middle - half, middle + half])/(1 + z**2/n))
    assert (low >= 0).all() and (high <= 1).all() and (low <= k/n).all() and (k/n <= high).all()


def test_caption_sensitivity_counts(images):
    y, _, _, (score, swapped) = images
    flips = sum((a >= .4) != (b >= .4) for a, b in zip(score, swapped))
    cut = [[min(max(s, 1e-6), 1 - 1e-6) for s in both] for both in (score, swapped)]
    moved = sum(abs(math.log(a/(1 - a)) - math.log(b/(1 - b))) for a, b in zip(*cut))
    found = caption_sensitivity(y, score, swapped, .4)
    assert list(found) == ["flipped", "abs_dlogit", "auroc", "auroc_swapped"]
    assert np.allclose(list(found.values()), [flips/len(y), moved/len(y), roc_auc_score(y, score), roc_auc_score(y, swapped)])


def error(share, worlds): return (share*(1 - share)/worlds)**.5


def holds_zero(draws):
    low, high, _ = image_interval(draws)
    return (low <= 0) & (0 <= high)


def of_draws(n):
    "What the percentiles of n draws hold: their ends are order statistics, of which n + 1 gaps are equally likely."
    return 1 - 2*(.025*(n - 1) + 1)/(n + 1)


def test_bootstrap_of_a_paired_difference_covers():
    """Two equally good systems on 200 + 200 images: the interval of their AUROC's difference holds 0 in 95 of 100 worlds.

    With 300 draws the percentiles themselves reach 0.944 (`of_draws`), not 0.95. Over 12,000 worlds it was 0.942 with
    300 draws, and over 6,000 worlds 0.949 with 2,000; the studies' thousand draws reach 0.948."""
    rng, y, worlds = np.random.default_rng(0), np.repeat([0, 1], 200), 1000
    generator, held = np.where(y, "gan", "real"), 0
    for _ in range(worlds):
        scores = sigmoid(1.5*(y - .5) + .7*rng.standard_normal(400) + .7*rng.standard_normal((2, 400)))
        weights = resample(generator, 300, rng)
        held += holds_zero(np.subtract(*(by_generator(y, generator, s, (), ["gan"], weights) for s in scores)))[0, 0]
    assert abs(held/worlds - .95) <= 3*error(.95, worlds)
    assert abs(held/worlds - of_draws(300)) <= 3*error(of_draws(300), worlds)


def test_bootstrap_of_scenes_covers_where_that_of_images_does_not():
    """200 scenes of 2 photographs and 2 generated images; how well a system does is mostly a matter of the scene.

    Grouped, the difference's interval held 0 in 0.943 (AUROC) and 0.944 (accuracy) of 10,000 worlds, which is what 300
    draws reach; with half as many scenes in 0.934 and 0.937. As if all images were independent: in three of four."""
    rng, scene, worlds = np.random.default_rng(0), np.repeat(np.arange(200), 4), 500
    y = np.tile([0, 0, 1, 1], 200)
    generator, held = np.where(y, "gan", "real"), np.zeros((2, 2))
    for _ in range(worlds):
        gain = rng.standard_normal((2, 200))[:, scene]
        scores = sigmoid((1.5 + 2*gain)*(y - .5) + .5*rng.standard_normal(gain.shape))
        for i, groups in enumerate((scene, None)):
            weights = resample(generator, 300, rng, groups)
            held[i] += holds_zero(np.subtract(*(by_generator(y, generator, s, (.5,), ["gan"], weights)[..., 0] for s in scores)))
    by_scene, by_image = held/worlds
    assert (abs(by_scene - .95) <= 3*error(.95, worlds)).all() and (by_image < .8).all()
    assert (abs(by_scene - of_draws(300)) <= 3*error(of_draws(300), worlds)).all()


def test_interval_over_five_seeds_covers():
    worlds = 20_000
    low, high, p = seed_interval(np.random.default_rng(0).normal(.3, 2, (5, worlds)) - .3)
    assert abs(((low <= 0) & (0 <= high)).mean() - .95) <= 3*error(.95, worlds)
    assert abs((p < .05).mean() - .05) <= 3*error(.05, worlds)


def test_wilson_covers():
    """In worlds of any true share the bounds hold it 95 times in 100; for one share alone, a count being what it is,
    a little less or more: at 200 images and a share of 0.05 to 0.95, never less than 0.937, by the binomial itself."""
    rng, n, worlds = np.random.default_rng(0), 200, 20_000
    low, high = wilson(np.arange(n + 1), n)
    share = rng.random(worlds)
    k = rng.binomial(n, share)
    assert abs(((low[k] <= share) & (share <= high[k])).mean() - .95) <= 3*error(.95, worlds)
    share = np.linspace(.05, .95, 901)[:, None]
    exact = (((low <= share) & (share <= high))*stats.binom.pmf(np.arange(n + 1), n, share)).sum(1)
    assert exact.min() > .937 and abs(exact.mean() - .95) < .001
