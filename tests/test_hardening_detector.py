"What a saved detector, a cache, a caption or a thread can do wrong, and what it must not do."
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import nsnet.detector
import nsnet.scoring
import nsnet.training
from nsnet.captions import caption
from nsnet.clip import image_features, load_backbone, text_features
from nsnet.config import PreprocessConfig, recipe_for
from nsnet.config import preset as known_preset
from nsnet.detector import Detector
from nsnet.generators import index_mini
from nsnet.inference import build_network, preprocess_all
from nsnet.model import load_weights, save_weights
from nsnet.scoring import read_scores
from nsnet.storage import Records, asset, fingerprint
from nsnet.training import train

MINI = asset("detector")/"model.safetensors"


@pytest.fixture(scope="module")
def detector(): return Detector.from_pretrained("mini", device="cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A few images of the mini world and their folder."
    root = tmp_path_factory.mktemp("world")
    return index_mini(root, n_train=10, n_test=4, progress=False).assign(caption="a red ring on sand at dusk"), root


def saved(folder, state=None, **changes):
    "A folder with the detector that ships, changed; it names the fingerprint of its tensors."
    own, config = load_weights(MINI)
    save_weights(folder/"model.safetensors", own if state is None else state, config | changes)
    return folder


def refusal(function, *args, **options):
    "The one line that a call is refused with."
    with pytest.raises(ValueError) as error: function(*args, **options)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 1000
    return str(error.value)


def hostile_clip(folder, config):
    "The small CLIP, with a tokenizer of its own code that writes a file when it is imported."
    shutil.copytree(asset("clip"), folder)
    (folder/"evil.py").write_text(f"open({str(folder/'RAN')!r}, 'w').close()\nclass Evil: pass\n")
    tokenizer = json.loads((folder/"tokenizer_config.json").read_text())
    tokenizer |= dict(tokenizer_class="Evil", auto_map=dict(AutoTokenizer=["evil.Evil", "evil.Evil"]))
    (folder/"tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder/"config.json").write_text(json.dumps(dict(model_type="evil", auto_map=dict(AutoConfig="evil.Evil"))))
    clip = json.loads((folder/"open_clip_config.json").read_text())
    clip["model_cfg"]["text_cfg"] |= config
    text = json.dumps(clip).replace("trust_remote", r"trust_rem\u006fte")        # JSON may write any letter like this
    (folder/"open_clip_config.json").write_text(text)
    return f"local-dir:{folder}"


@pytest.mark.parametrize("config", [dict(tokenizer_kwargs=dict(trust_remote_code=True)), {},
                                    dict(hf_model_name="EVIL", hf_tokenizer_name="EVIL")])
def test_no_code_of_a_stranger_runs(tmp_path, monkeypatch, config):
    "Point 1: neither for a fetched detector nor for a backbone that the caller asks for, nor with trust."
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path/"modules"))
    place = tmp_path/"clip"
    name = hostile_clip(place, {k: str(place) if v == "EVIL" else v for k, v in config.items()})
    folder = saved(tmp_path/"detector", backbone=name)
    assert "trust=True" in refusal(Detector.from_pretrained, folder, "cpu")
    for load, source in ((load_backbone, name), (lambda *a: Detector.from_pretrained(*a, trust=True), folder)):
        try: load(source, "cpu")
        except ValueError as error: assert "\n" not in str(error) and (config == {} or "cannot be loaded" in str(error))
    assert not (place/"RAN").exists()


@pytest.mark.parametrize("kind, model", [("evil", "AutoConfig"), ("bert", "AutoModel"), ("bert", "AutoConfig")])
def test_nobody_is_asked_at_the_keyboard(tmp_path, monkeypatch, kind, model):
    "transformers asks whether it may run a model's code where it is not told; a text tower from elsewhere is no way in."
    asked = []
    monkeypatch.setattr("builtins.input", asked.append)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path/"modules"))
    name = hostile_clip(tmp_path/"clip", dict(hf_model_name=str(tmp_path/"clip"), hf_tokenizer_name=str(tmp_path/"clip")))
    (tmp_path/"clip/config.json").write_text(json.dumps(dict(model_type=kind, auto_map={model: "evil.Evil"})))
    assert "cannot be loaded" in refusal(load_backbone, name, "cpu")
    assert not asked and not (tmp_path/"clip/RAN").exists()


def test_the_attack_is_real(tmp_path, monkeypatch):
    "The same files do run where remote code is trusted, so the test above would notice."
    from transformers import AutoTokenizer
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path/"modules"))
    hostile_clip(tmp_path/"clip", {})
    with pytest.raises(Exception): AutoTokenizer.from_pretrained(tmp_path/"clip", trust_remote_code=True)
    assert (tmp_path/"clip/RAN").exists()


def test_only_known_models_unless_the_caller_vouches(tmp_path, detector):
    "Points 1 and 2: strangers' names are refused before anything is loaded, the caller's own are taken."
    with patch.object(nsnet.detector, "load_backbone") as load:
        for changes in (dict(backbone="hf-hub:evil/clip"), dict(captioner="evil/captioner"), dict(captioner="/etc"),
                        dict(captioner=5), dict(backbone=["mini"]), dict(threshold=float("nan")), dict(trained_on=[1])):
            refusal(Detector.from_pretrained, saved(tmp_path/"bad", **changes))
        assert not load.called
    assert "unknown backbone" in refusal(Detector.from_pretrained, saved(tmp_path/"bad", backbone="evil/clip"), "cpu")
    elsewhere = f"local-dir:{asset('clip')}"
    folder = saved(tmp_path/"own", backbone=elsewhere, captioner=str(asset("blip")))
    for options in (dict(backbone=detector.backbone, captioner="mini"), dict(trust=True)):
        assert Detector.from_pretrained(folder, "cpu", **options).net.embed_dim == 128


def test_training_in_a_folder_with_models_of_ones_own(tmp_path, world):
    "A finished run is found again although its backbone and captioner lie in folders."
    index, root = world
    backbone = load_backbone(f"local-dir:{asset('clip')}", "cpu")
    sizes = known_preset("smoke", backbone=backbone.name, captioner=str(asset("blip")))
    options = dict(root=root, preset=sizes, backbone=backbone, out=tmp_path/"run", progress=False)
    first, again = (train("linear_probe", index, **options) for _ in range(2))
    assert first.fingerprint() == again.fingerprint() and again.captioner == sizes.captioner
    for garbled in (b"{garbled", b"", b"[]", b"null", b"\xff\xfe", b"{}"):
        (tmp_path/"run/run.json").write_bytes(garbled)
        assert "run.json is damaged: delete it" in refusal(train, "linear_probe", index, **options)
    (tmp_path/"run/run.json").unlink()
    (tmp_path/"run/run.json").mkdir()
    assert "run.json is damaged" in refusal(train, "linear_probe", index, **options)


def test_shapes_are_compared_before_anything_is_made(tmp_path):
    "Point 2: neither the network nor the file is touched."
    state, config = load_weights(MINI)
    recipe, name = config["recipe"], "classifier.weight"
    cases = [saved(tmp_path/"rank", recipe=recipe | dict(lora_rank=4000)), saved(tmp_path/"width", embed_dim=10**6),
             saved(tmp_path/"canvas", preprocess=dict(canvas=96))]
    states = dict(extra=state | dict(evil=torch.zeros(9)), type=state | {name: state[name].long()},
                  shape=state | {name: state[name].T})
    cases += [saved(tmp_path/what, changed) for what, changed in states.items()]
    with patch.object(nsnet.detector, "build_network", side_effect=AssertionError("built")):
        for folder in cases: refusal(Detector.from_pretrained, folder, "cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(tmp_path, detector, value):
    "Point 7: weights, thresholds and scores."
    state, _ = load_weights(MINI)
    spoilt = {k: t.clone() for k, t in state.items()}
    spoilt["mapper.net.0.weight"][3, 4] = value
    assert "mapper.net.0.weight" in refusal(Detector.from_pretrained, saved(tmp_path, spoilt), "cpu")
    parts = detector.recipe, detector.preprocess, detector.backbone, detector.net
    assert "threshold" in refusal(Detector, *parts, threshold=value)
    recipe = recipe_for("no_projection", known_preset("mini"), lora_rank=0)
    net = build_network(recipe, detector.backbone)
    net.classifier.bias.data.fill_(value)
    broken = Detector(recipe, PreprocessConfig(), detector.backbone, net)
    assert "NaN or infinite" in refusal(broken.score, [Image.new("RGB", (80, 80))])


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_damaged_backbone_is_refused(tmp_path, value):
    shutil.copytree(asset("clip"), tmp_path/"clip")
    [file] = (tmp_path/"clip").glob("*.safetensors")
    state = load_file(file)
    name = next(name for name, t in state.items() if t.is_floating_point() and t.ndim == 2)
    state[name][-1, -1] = value
    save_file(state, file)
    said = refusal(load_backbone, f"local-dir:{tmp_path/'clip'}", "cpu")
    assert name in said and "NaN or infinite" in said


def test_every_weight_of_a_backbone_counts(detector):
    "Point 10: one number of any tensor."
    state = dict(detector.backbone.model.state_dict())
    marks = {fingerprint(state)}
    for name, t in state.items():
        changed = t.clone().flatten()
        changed[-1] += 1
        marks.add(fingerprint(state | {name: changed.reshape(t.shape)}))
    assert len(marks) == 1 + len(state)


def test_one_picture_one_score(tmp_path, detector):
    "Point 4: a path, a PIL image and an array, whatever the mode."
    pixels = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    lying, see_through = image.copy(), image.convert("RGBA")
    lying.getexif()[274] = 6
    see_through.putalpha(image.convert("L"))
    grey16 = Image.fromarray(pixels[..., 0].astype(np.uint16)*257)
    others = [image.convert(mode) for mode in ("L", "P", "LA")]
    for i, x in enumerate((image, lying, see_through, grey16, *others)):
        x.save(tmp_path/f"{i}.png", exif=x.getexif())
        ways = [tmp_path/f"{i}.png", Image.open(tmp_path/f"{i}.png"), x]
        if x.mode not in ("P", "LA") and x is not lying: ways.append(np.asarray(x))
        assert len(set(detector.score(ways, ["a ring"]*len(ways)).score)) == 1
    assert len(detector.score(np.asarray(image.convert("L")), "a ring")) == 1


def test_one_open_file_listed_twice(tmp_path, detector):
    "Point 4: workers that are forked share the place in an open file, and would read each other's bytes."
    images = [np.random.default_rng(i).integers(0, 255, (400, 500, 3), dtype=np.uint8) for i in range(3)]
    for i, x in enumerate(images): Image.fromarray(x).save(tmp_path/f"{i}.png")
    alone = detector.score([tmp_path/f"{i}.png" for i in range(3)], ["a ring"]*3).score.tolist()
    lazy = [Image.open(tmp_path/f"{i}.png") for i in range(3)]
    found = detector.score(lazy*6, ["a ring"]*18, batch_size=1)
    assert found.score.tolist() == pytest.approx(alone*6, abs=1e-6) and not found.attrs["rejected"]


def test_what_a_new_user_does_wrong(tmp_path, detector, world):
    "One line each, with the way out."
    index, root = world
    (tmp_path/"empty").mkdir()
    (tmp_path/"text").mkdir()
    (tmp_path/"text/a.txt").write_text("no picture")
    for folder in ("empty", "text"): assert f"{tmp_path/folder}: no images in this folder" == refusal(detector.score, tmp_path/folder)
    for use in (detector.score, detector): assert "no such file" in refusal(use, tmp_path/"nowhere")
    assert "empty list" in refusal(detector.score, [])
    assert "looked for in root='.'" in refusal(detector.score, index.head(3))
    options = dict(root=root, preset="smoke", backbone=detector.backbone, progress=False)
    for wrong in (root, str(root), None): assert "nsnet.index_folder" in refusal(train, "linear_probe", wrong, **options)
    assert "there are 0 and 9" in refusal(train, "linear_probe", index[index.label == 1].assign(split=["train"]*9 + ["test"]*(
        int(index.label.sum()) - 9)), **options)
    assert "looked for in root='.'" in refusal(train, "linear_probe", index, **options | dict(root="."))


def test_a_detector_says_what_it_is(detector):
    said = repr(detector)
    for part in (detector.recipe.name, detector.backbone.name, f"{detector.threshold:.3f}", detector.trained_on): assert part in said


def test_a_small_validation_set_is_warned_of(world, detector):
    index, root = world
    options = dict(root=root, preset="smoke", backbone=detector.backbone, progress=False)
    many = pd.concat([index[index.split != "test"].assign(split="train"), index[index.split == "test"].assign(split="val")])
    with pytest.warns(UserWarning, match="validation has 4 real and [0-9]+ generated images: with fewer than 19"):
        train("linear_probe", many, **options)


def test_captions_that_are_no_text(detector, world):
    "Point 11: None and NaN are described, numbers refused; also frames without columns or rows."
    index, root = world
    image, few = Image.new("RGB", (80, 80), "red"), index.head(3)
    said = detector.score([image]*3, [None, float("nan"), ""]).caption
    assert said.nunique() == 1 and said[0] == detector(image).caption
    for bad in (5, 1.5, ["a ring"], b"a ring"):
        assert "text" in refusal(detector.score, [image], [bad])
        assert "text" in refusal(text_features, detector.backbone, [bad], progress=False)
    options = dict(root=root, preset="smoke", backbone=detector.backbone, progress=False)
    assert "text" in refusal(train, "advanced", index.assign(caption=7.5), **options)
    assert "caption" in refusal(train, "advanced", index.assign(caption=None), **options)
    for column in ("split", "caption", "sha256", "label"):
        assert column in refusal(train, "linear_probe", index.drop(columns=column), **options)
    config = detector.preprocess
    for empty in (pd.DataFrame(), few[:0], few.drop(columns="path")):
        for call in (lambda x: caption(x, root), lambda x: preprocess_all(x, root, config), detector.score):
            assert "path" in (said := refusal(call, empty)) or "no image" in said
    for size in (0, -1):
        for call in (lambda n: caption(few, root, batch_size=n), lambda n: detector.score(few, root=root, batch_size=n),
                     lambda n: text_features(detector.backbone, ["a"], batch_size=n, progress=False)):
            assert f"batch_size must be 1 or more, not {size}" in refusal(call, size)


def test_damaged_caches(tmp_path, detector, world):
    "Point 11: made anew, or refused with the name of the file or folder."
    (index, root), backbone = world, detector.backbone
    few, canvas = index.head(3), np.zeros((1, 64, 64, 3), np.uint8)
    def spoil(folder, name, change):
        [file] = tmp_path.glob(f"{folder}*/{name}")
        file.write_bytes(change(file.read_bytes()))
    calls = dict(text=lambda: text_features(backbone, ["a ring"], tmp_path, progress=False),
                 image=lambda: image_features(backbone, canvas, ["x"], tmp_path, progress=False),
                 canvases=lambda: preprocess_all(few, root, detector.preprocess, tmp_path, progress=False)[0][:])
    for name, call in calls.items():
        whole = call()
        for file, change in (("rows.bin", lambda b: b[:-5]), ("keys.jsonl", lambda b: b[:-5]), ("keys.jsonl", lambda b: b""),
                             ("rows.bin", lambda b: b + b"half a row"), ("keys.jsonl", lambda b: b + b'"half a k')):
            spoil(name, file, change)                       # what a kill can leave behind: made anew
            assert torch.equal(call(), whole)
        for file, change in (("header.json", lambda b: b.replace(b"[", b"[7, ")), ("header.json", lambda b: b[:9]), ("keys.jsonl", lambda b: b"?\n"),
                             ("header.json", lambda b: b.replace(b"int8", b"int16").replace(b"float32", b"float16"))):
            spoil(name, file, change)                       # what only damage can
            assert str(tmp_path/name) in refusal(call)
            shutil.rmtree(next(tmp_path.glob(f"{name}*")))
            call()
    for name in ("text", "image"):
        spoil(name, "rows.bin", lambda b: b"\xff"*len(b))
        assert str(tmp_path/name) in refusal(calls[name])
    store = tmp_path/"captions.jsonl"
    caption(few, root, store=store, progress=False)
    store.write_text(store.read_text().replace('"caption": "', '"caption": null, "other": "'))
    assert str(store) in refusal(caption, few, root, store=store, progress=False)
    table, journal = tmp_path/"scores.csv", tmp_path/"scores.csv.unfinished.jsonl"
    scores = read_scores(detector.score(few, root=root, out=table)).drop(columns="seconds")
    rows = [record | dict(detector=detector.fingerprint()) for record in scores.to_dict("records")]
    for bad in (dict(score=None), dict(score=float("nan")), dict(score=2.), dict(sha256="0")):
        damaged = [{k: v for k, v in (row | (bad if i == 1 else {})).items() if v != ""} for i, row in enumerate(rows)]
        table.unlink()
        journal.write_text("".join(json.dumps(row) + "\n" for row in damaged))
        again = read_scores(detector.score(few, root=root, out=table)).drop(columns="seconds")
        assert again.equals(scores) and not journal.exists()
    for damaged, reason in (("[1]\n", "not a JSON record"), ("{}\n", "no scores"), ('{"path": "a", "detector": "x"}\n', "another detector")):
        journal.write_text(damaged)
        assert reason in refusal(detector.score, few, root=root, out=table) and read_scores(table).score.equals(scores.score)


def test_four_threads_score_at_once(detector):
    "Point 13: the captioner is loaded once, and everybody gets the scores that he would get alone."
    images = [np.random.default_rng(i).integers(0, 255, (80, 80, 3), dtype=np.uint8) for i in range(4)]
    def scores(image): return detector.score(image).score.tolist()
    alone = [scores(image) for image in images]
    nsnet.scoring._captioner.cache_clear()
    with ThreadPoolExecutor(4) as threads: together = list(threads.map(scores, images*2))
    assert together == alone*2 and nsnet.scoring._captioner.cache_info().misses == 1


def test_two_processes_share_a_run_folder(tmp_path, world, detector):
    "Point 13: a second run that begins, goes on and ends while the first is at work; both end with the files of one."
    index, root = world
    recipe = recipe_for("advanced", known_preset("smoke"), lora_rank=0)
    options = dict(root=root, preset="smoke", backbone=detector.backbone, progress=False)
    save, others = nsnet.training._save_checkpoint, []
    def interrupted(*state):
        save(*state)
        if others: return
        others.append(None)
        others[0] = train(recipe, index, out=tmp_path/"run", **options)
    with patch.object(nsnet.training, "_save_checkpoint", interrupted):
        first = train(recipe, index, out=tmp_path/"run", checkpoint_every=1, **options)
    found = Detector.from_pretrained(tmp_path/"run", backbone=detector.backbone)
    alone = train(recipe, index, **options)
    assert len({d.fingerprint() for d in (first, others[0], found, alone)}) == 1
    assert {f.name for f in (tmp_path/"run").iterdir()} >= {"run.json", "history.csv", "model.safetensors"}
    assert not list((tmp_path/"run").glob(".*")) and not (tmp_path/"run/checkpoint.safetensors").exists()
