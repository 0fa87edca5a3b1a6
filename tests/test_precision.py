"Half precision without a GPU: PyTorch's fp16 autocast and its gradient scaler run on a CPU and round as a GPU does."
import json
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import test_resume
from nsnet import training
from nsnet.captions import load_captioner
from nsnet.clip import image_features, load_backbone, precision_of, text_features
from nsnet.config import preprocess_config, preset, recipe, recipe_for
from nsnet.detector import Detector
from nsnet.generators import index_mini
from nsnet.images import open_image
from nsnet.index import split
from nsnet.inference import build_network
from nsnet.model import load_weights, trained_state
from nsnet.scenes import true_caption
from test_resume import fit, fit_until, recipe_with, same

BACKBONE, PRESET = load_backbone("mini", "cpu"), preset("smoke")
HALF = replace(BACKBONE, forced="fp16")
INDEX = pd.DataFrame([["a", 0, "train", "a ring"], ["b", 1, "val", "a ball"]], columns=["sha256", "label", "split", "caption"])


@pytest.fixture
def half(monkeypatch):
    "Towers that learn in fp16, from a scale at which the first steps overflow."
    make = training._optimizer
    def too_high(*args):
        optimizer, scaler = make(*args)
        if scaler.is_enabled(): scaler.load_state_dict(scaler.state_dict() | dict(scale=2.**23))
        return optimizer, scaler
    monkeypatch.setattr(training, "_optimizer", too_high)
    monkeypatch.setattr(test_resume, "BACKBONE", HALF)


@pytest.mark.parametrize("gpu, emulated, expected", [(True, False, "bf16"), (False, True, "fp16"), (False, False, "fp16")])
def test_a_gpu_without_bf16_computes_in_fp16(gpu, emulated, expected, monkeypatch):
    "Emulated bfloat16, as PyTorch offers it on a T4, does not count."
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: gpu or including_emulation and emulated)
    assert precision_of("cuda") == precision_of("cuda:1") == precision_of(torch.device("cuda", 0)) == expected
    assert precision_of("cpu") == precision_of("meta") == "fp32"


def test_a_forced_precision_goes_everywhere_with_the_backbone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    assert replace(BACKBONE, device="cuda").precision == "fp16" and replace(BACKBONE, device="cuda", forced="fp32").precision == "fp32"
    assert HALF.to("meta").precision == "fp16" and BACKBONE.to("meta").precision == BACKBONE.precision == "fp32"
    assert HALF.image_tower().precision == build_network(recipe("advanced"), HALF).tower.precision == "fp16"


@pytest.mark.parametrize("setting", ["lora", "parts and dropout"])
def test_fp16_learns_skips_and_resumes_to_the_bit(setting, half, tmp_path, monkeypatch):
    "The run is interrupted among the skipped steps and after them."
    recipe, options = recipe_with(setting), dict(checkpoint=tmp_path/"c.safetensors", checkpoint_every=1, key="a")
    whole = fit(recipe)
    skipped = [row["skipped"] for row in whole[0]]
    assert skipped[0] == 1 and not all(skipped) and len(skipped) == 9
    fit_until(1, monkeypatch, recipe, **options)
    fit_until(5, monkeypatch, recipe, **options)
    assert same(fit(recipe, **options), whole)


def test_the_state_of_the_scaler_is_in_the_checkpoint(half, tmp_path, monkeypatch):
    "Scale and counter of good steps; without them the steps after an interruption would be other ones."
    file = tmp_path/"c.safetensors"
    fit_until(2, monkeypatch, recipe_with("lora"), checkpoint=file, checkpoint_every=2)
    _, run = load_weights(file)
    assert run["scaler"]["scale"] == 2.**(23 - sum(row["skipped"] for row in run["history"])) and run["scaler"]["growth_interval"] == 2000
    monkeypatch.setattr(test_resume, "BACKBONE", BACKBONE)
    with pytest.raises(ValueError, match="another run .*precision"): fit(recipe_with("lora"), checkpoint=file)


def test_a_skipped_step_changes_no_weight(half):
    recipe = recipe_with("lora", epochs=1, batch_size=20)
    torch.manual_seed(0)
    fresh = trained_state(build_network(recipe, HALF))
    history, *_, state = fit(recipe)
    assert [row["skipped"] for row in history] == [1] and all(torch.equal(fresh[name], state[name]) for name in fresh)


def test_a_loss_that_is_no_number_is_an_error_in_fp16_too(half, monkeypatch, tmp_path):
    "The scaler skips such a step as it does an overflow, but a smaller scale does not help; nothing is kept of it."
    loss, calls = training.nsnet_loss, iter(range(9))
    def spoiled(*args, **more): return type(terms := loss(*args, **more))(*(t*(1 if next(calls) != 4 else torch.nan) for t in terms[:1]), *terms[1:])
    monkeypatch.setattr(training, "nsnet_loss", spoiled)
    with pytest.raises(ValueError, match="the loss is nan: lower lr"): fit(recipe_with("lora"), checkpoint=tmp_path/"c.safetensors", checkpoint_every=1)
    assert load_weights(tmp_path/"c.safetensors")[1]["step"] == 4


@pytest.mark.parametrize("setting, backbone", [("lora", BACKBONE), ("frozen", HALF)])
def test_nothing_is_scaled_where_no_tower_learns_in_fp16(setting, backbone, monkeypatch, tmp_path):
    "fp32 keeps its files as they are, and so does a head on features that were computed in half precision."
    monkeypatch.setattr(test_resume, "BACKBONE", backbone)
    recipe = recipe_with(setting, epochs=1)
    history, *_ = fit(recipe, checkpoint=tmp_path/"c.safetensors")
    assert list(history[0]) == ["step", "epoch", "lr", "total", "contrastive", "bce", "alignment"]


def test_keys_name_the_precision_and_those_of_fp32_do_not():
    recipe = recipe_for("advanced", PRESET)
    net, config = build_network(recipe, BACKBONE), preprocess_config(recipe, PRESET)
    def keys(backbone):
        run = training.run_key(recipe, config, INDEX, backbone, 0)
        return backbone.image_key, run, Detector(recipe, config, backbone, net).fingerprint()
    found = {name: keys(replace(BACKBONE, forced=name)) for name in (None, "fp32", "bf16", "fp16")}
    assert found[None] == found["fp32"] and all(len({found[name][i] for name in ("fp32", "bf16", "fp16")}) == 3 for i in range(3))
    assert found["fp32"][0] == BACKBONE.weights == "1b1024d5025331dd"
    assert found["fp32"][1] == "3ff1e50dfed438bf"              # as it was before there was another precision


def test_features_of_two_precisions_are_kept_apart(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    found = {}
    for name in ("fp32", "fp16", "bf16"):
        clip = replace(BACKBONE, forced=name)
        for work, what in ((image_features, x), (text_features, ["a ring", "a ball", "a star"])):
            rows = work(clip, what, cache=tmp_path, progress=False)
            assert rows.dtype == torch.float32 and torch.equal(rows, work(clip, what, progress=False))
            found[name, work.__name__] = rows
    folders = {f"{kind}-{BACKBONE.weights}{end}" for kind in ("image", "text") for end in ("", "-fp16", "-bf16")}
    assert {folder.name for folder in tmp_path.iterdir()} == folders
    for kind in ("image_features", "text_features"):
        exact = found["fp32", kind]
        for name, most in (("fp16", 3e-3), ("bf16", 3e-2)):
            assert 0 < (found[name, kind] - exact).norm()/exact.norm() < most, (kind, name)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Images of the mini world with true captions."
    root = tmp_path_factory.mktemp("world")
    index = split(index_mini(root, 40, 12, seen="deconv", progress=False), val=.2, seed=0)
    index["caption"] = [true_caption(*words) for words in zip(index["shape"], index.color, index.ground, index.sky)]
    return index, root


def test_fp16_from_training_to_scores(world, tmp_path):
    "A detector trained in fp32 scores in fp16 nearly as in fp32; one trained in fp16 has a key, files and scores of its own."
    index, root = world
    options = dict(root=root, preset=PRESET, progress=False)
    single = training.train("advanced", index, backbone=BACKBONE, out=tmp_path/"fp32", **options)
    test = index[index.split == "test"]
    low = Detector.from_pretrained(tmp_path/"fp32", backbone=HALF)
    a, b = (d.score(test, root=root).score.to_numpy() for d in (single, low))
    assert low.net.tower.precision == "fp16" and not np.array_equal(a, b) and np.abs(a - b).max() < .02
    assert single.fingerprint() != low.fingerprint()

    half = training.train("advanced", index, backbone=HALF, out=tmp_path/"fp16", **options)
    said = {name: json.loads((tmp_path/name/"run.json").read_text()) for name in ("fp32", "fp16")}
    assert {name: run["precision"] for name, run in said.items()} == dict(fp32="fp32", fp16="fp16")
    assert said["fp32"]["key"] != said["fp16"]["key"]
    history = {name: pd.read_csv(tmp_path/name/"history.csv") for name in said}
    assert "skipped" not in history["fp32"] and history["fp16"].skipped.isin([0, 1]).all()
    assert np.abs(history["fp16"].total/history["fp32"].total - 1).max() < .05
    c = half.score(test, root=root).score.to_numpy()
    assert np.corrcoef(a, c)[0, 1] > .9
    with pytest.raises(ValueError, match="another run .*precision"): training.train("advanced", index, backbone=HALF, out=tmp_path/"fp32", **options)


def test_the_loss_is_computed_in_fp32(monkeypatch):
    seen, loss = [], training.nsnet_loss
    def spied(f, logits, y, m, u, *args, **more):
        seen.extend(t.dtype for t in (f, logits, m, u))
        assert not torch.is_autocast_enabled("cpu")
        return loss(f, logits, y, m, u, *args, **more)
    monkeypatch.setattr(training, "nsnet_loss", spied)
    monkeypatch.setattr(test_resume, "BACKBONE", HALF)
    fit(recipe_with("lora", epochs=1))
    assert set(seen) == {torch.float32} and len(seen) == 12


def test_terms_are_fetched_for_many_steps_at_once(monkeypatch):
    "Every number that is asked for makes a GPU wait."
    fetched, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "item", lambda t: pytest.fail("asked for a number") if t.requires_grad or t.grad_fn else float(t.detach()))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: fetched.append(tuple(t.shape)) or tolist(t))
    fit(recipe_with("lora", epochs=1, batch_size=1))
    rows = [shape for shape in fetched if shape[-1:] == (5,)]
    assert rows == [(20, 5)], rows


def test_captions_of_a_batch_are_those_of_one_at_a_time(tmp_path):
    "On 200 pictures of every generator, and in batches at least twice as fast as one at a time."
    index = index_mini(tmp_path, 40, 24, progress=False).drop_duplicates("sha256").head(208)
    images, captioner = [open_image(tmp_path/path) for path in index.path], load_captioner("mini", device="cpu")
    def described(size):
        start = time.process_time()
        said = [caption for i in range(0, len(images), size) for caption in captioner.generate(images[i:i + size])]
        return said, time.process_time() - start
    described(104)
    (alone, slow), (together, fast) = described(1), described(32)
    assert len(alone) >= 200 and alone == together and len(set(alone)) > 50
    assert slow > 2*fast, f"{slow/fast:.1f}"
