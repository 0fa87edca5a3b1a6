"The mini world stays honest: no single number gives a generated image away, the artifact is there, and the small CLIP sees it partly."
import os

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from nsnet.clip import load_backbone
from nsnet.config import recipe
from nsnet.generators import GENERATORS, index_mini, one_feature_rules
from nsnet.images import open_image
from nsnet.index import split
from nsnet.storage import asset
from nsnet.training import train

N_TRAIN, N_TEST = 200, 100


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "The folder of the world."
    return tmp_path_factory.mktemp("mini")


@pytest.fixture(scope="module")
def world(root):
    "A small sample of the world, drawn anew with the shipped weights."
    return split(index_mini(root, N_TRAIN, N_TEST, seed=1, progress=False))


def rows_of(world, generator):
    "Test photographs and the test images of one generator."
    return world[world.split.eq("test") & world.generator.isin(["real", generator])]


def scores(world, root, name, **changes):
    "A linear baseline fitted to the training images, and its scores of the seen generator's test images."
    detector = train(recipe(name, **changes), world, root, backbone=load_backbone("mini"), progress=False)
    rows = rows_of(world, "deconv")
    return rows.label.to_numpy(), detector.score(rows, root=root).score.to_numpy()


@pytest.mark.parametrize("generator", GENERATORS)
def test_no_single_number_tells(world, root, generator):
    rows = rows_of(world, generator)
    pixels = np.stack([np.asarray(open_image(root/p)) for p in rows.path])
    rules = one_feature_rules(pixels, np.array([os.path.getsize(root/p) for p in rows.path]))
    found = {name: roc_auc_score(rows.label, rules[name]) for name in rules}
    assert all(max(a, 1 - a) <= .9 for a in found.values()), found


def test_spectrum_gives_it_away(world, root):
    y, score = scores(world, root, "spectrum_probe")
    assert roc_auc_score(y, score) >= .95


def test_frozen_clip_sees_it_partly(world, root):
    y, score = scores(world, root, "linear_probe", patches="spectral")
    accuracy = ((score >= .5) == y).mean()
    assert .6 <= accuracy <= .95, accuracy


def test_contents_say_nothing_about_the_label(world):
    "Photographs and generated images show the same things equally often."
    train_rows = world[world.split.ne("test")]
    for word in ("shape", "color", "ground", "sky"):
        counts = train_rows.groupby(["label", word]).size().unstack()
        assert (counts.loc[0] - counts.loc[1]).abs().max() <= .1*N_TRAIN


def test_weights_are_small():
    assert sum(f.stat().st_size for f in asset("").rglob("*") if f.is_file()) <= 12e6
