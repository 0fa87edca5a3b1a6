"Training that is killed with SIGKILL goes on after the last finished epoch and ends with the same detector, to the bit."
import time

import numpy as np
import pytest
from PIL import Image

from killing import finish, kill, lines, start
from nsnet.config import preset, recipe_for
from nsnet.index import index_folder, split

PRESET = preset("smoke")
RECIPE = recipe_for("advanced", PRESET, epochs=4, batch_size=8, dropout=.1)
RESULT = ("model.safetensors", "config.json", "README.md", "history.csv", "validation.csv", "run.json", "scores")


def run(images, out):
    "Train and score: what the processes that are killed are busy with. Every step is noted before it is taken."
    import torch
    import nsnet.training
    torch.set_num_threads(1)
    take_step = nsnet.training.train_step

    def noted(*args):
        with open(out/"steps", "a") as file: file.write("step\n")
        time.sleep(0.02)
        return take_step(*args)

    nsnet.training.train_step = noted
    index = split(index_folder(images, progress=False))
    index["caption"] = [f"a {color} ball on grass at noon" for color in np.resize(["red", "blue", "white"], len(index))]
    detector = nsnet.training.train(RECIPE, index, images, PRESET, seed=1, out=out, progress=False)
    (out/"scores").write_text("\n".join(detector.score(index[index.split == "test"], root=images).score.map(repr)))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    "A folder of noise, finer for the generated images."
    folder = tmp_path_factory.mktemp("images")
    for i in range(80):
        file, noise = folder/("fake" if i % 2 else "real")/f"{i}.png", np.random.default_rng(i).normal(128, 8 + 24*(i % 2), (96, 96, 3))
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(file)
    return folder


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    "What an undisturbed run leaves."
    out = tmp_path_factory.mktemp("whole")
    assert finish(start(run, images, out)) == 0
    assert lines(out/"steps") % RECIPE.epochs == 0 and lines(out/"steps") > RECIPE.epochs
    return out


@pytest.mark.parametrize("share", [.1, .6, .9], ids=["first epoch", "third epoch", "last epoch"])
def test_killed_training_goes_on(images, whole, tmp_path, share):
    total = lines(whole/"steps")
    kill(start(run, images, tmp_path), lambda: lines(tmp_path/"steps") >= share*total)
    assert not (tmp_path/"run.json").exists() and lines(tmp_path/"steps") <= total

    assert finish(start(run, images, tmp_path)) == 0
    assert lines(tmp_path/"steps") <= total + total//RECIPE.epochs
    for name in RESULT: assert (tmp_path/name).read_bytes() == (whole/name).read_bytes(), name
    assert not (tmp_path/"checkpoint.safetensors").exists()


def test_finished_training_is_only_read(images, whole):
    before = lines(whole/"steps")
    assert finish(start(run, images, whole)) == 0
    assert lines(whole/"steps") == before


def test_half_a_checkpoint_is_no_riddle(images, whole, tmp_path):
    "A damaged file is named, in one line; and no temporary file is taken for a checkpoint."
    from nsnet.training import _load_checkpoint
    (tmp_path/"checkpoint.safetensors").write_bytes((whole/"model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="is damaged") as refusal: _load_checkpoint(tmp_path/"checkpoint.safetensors", None, None, None, "")
    assert "\n" not in str(refusal.value)
