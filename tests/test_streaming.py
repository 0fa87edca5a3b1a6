"Arrays on the disk: each found by everything it depends on, whole after a kill at any moment, and never all in memory."
import json
import os
import resource
import shutil
import signal
import time
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import nsnet.storage
from killing import SERVER, finish, kill, start
from nsnet.clip import ImageTower, _embed, load_backbone, text_features
from nsnet.config import PreprocessConfig, preset, recipe_for
from nsnet.index import index_folder
from nsnet.inference import inputs_above, prepare_inputs, preprocess_all
from nsnet.storage import Arrays, Rows, fingerprint
from nsnet.training import Part, _read, train

BACKBONE, PRESET = load_backbone("mini", "cpu"), preset("smoke")
CONFIG = PreprocessConfig(kind="spectral", patch=16, canvas=64, seed=0)
LAST = dict(lora_rank=2, lora_blocks=(3,), epochs=3, batch_size=8)
quiet = dict(progress=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Forty pictures of noise with splits and captions, and their folder."
    folder = tmp_path_factory.mktemp("images")
    for i in range(40):
        file, noise = folder/("fake" if i % 2 else "real")/f"{i:02}.png", np.random.default_rng(i).normal(128, 8 + 24*(i % 2), (96, 96, 3))
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(file)
    index = index_folder(folder, progress=False)
    index["split"] = np.where(np.arange(40) % 4 == 3, "val", "train")
    index["caption"] = [f"a {color} ball on grass at noon" for color in np.resize(["red", "blue", "white"], 40)]
    return index, folder


def rows_of(cache):
    "How many rows there are, by kind of store."
    counts = {}
    for file in cache.glob("*/keys.jsonl"):
        kind = file.parent.name.partition("-")[0]
        counts[kind] = counts.get(kind, 0) + file.read_bytes().count(b"\n")
    return counts


def other_weights():
    "The same backbone but for one weight of each tower."
    changed = load_backbone("mini", "cpu")
    with torch.no_grad():
        for weight in (changed.model.visual.conv1.weight, changed.model.ln_final.weight): weight.view(-1)[0] += 1e-3
    return replace(changed, weights=fingerprint(dict(changed.model.state_dict()), changed.image_size, changed.mean, changed.std))


def half_precision(): return replace(BACKBONE, forced="fp16")


INGREDIENTS = {
    "canvases": dict(picture={}, kind=dict(config=replace(CONFIG, kind="random")), patch=dict(config=replace(CONFIG, patch=8)),
                     canvas=dict(config=replace(CONFIG, canvas=32)), seed=dict(config=replace(CONFIG, seed=1))),
    "image": dict(picture={}, kind=dict(config=replace(CONFIG, kind="random")), patch=dict(config=replace(CONFIG, patch=8)),
                  seed=dict(config=replace(CONFIG, seed=1)), weights=dict(backbone=other_weights), precision=dict(backbone=half_precision)),
    "text": dict(caption=dict(said="a ring"), weights=dict(backbone=other_weights), precision=dict(backbone=half_precision)),
    "blocks": dict(picture={}, seed=dict(config=replace(CONFIG, seed=1)), patch=dict(config=replace(CONFIG, patch=8)),
                   block=dict(recipe=dict(lora_blocks=(2, 3))), weights=dict(backbone=other_weights), precision=dict(backbone=half_precision)),
}


def keep(what, index, root, cache, config=CONFIG, backbone=lambda: BACKBONE, recipe={}, said="a ball"):
    "Make one kind of array."
    backbone = backbone()
    if what == "canvases": return preprocess_all(index, root, config, cache, **quiet)[0][:]
    if what == "text": return text_features(backbone, [said], cache, **quiet)
    if what == "image": return prepare_inputs(index, root, recipe_for("advanced", PRESET, lora_rank=0), config, backbone, cache, **quiet)[0][:]
    last = recipe_for("advanced", PRESET, **LAST | recipe)
    return inputs_above(prepare_inputs(index, root, last, config, backbone, cache, **quiet)[0], last, config, backbone, cache, **quiet)[:]


@pytest.mark.parametrize("what, ingredient", [(what, name) for what, names in INGREDIENTS.items() for name in names])
def test_each_ingredient_of_a_key(world, tmp_path, what, ingredient):
    "Changed, it finds nothing that is there; the same again, it finds everything."
    (index, root), cache = world, tmp_path/"cache"
    few, changes = index.head(5), INGREDIENTS[what][ingredient]
    first = keep(what, few, root, cache)
    before = rows_of(cache)
    assert before[what] == len(first)
    if ingredient == "picture": few = index.iloc[5:10]
    other = keep(what, few, root, cache, **changes)
    assert rows_of(cache)[what] == before[what] + len(other)
    assert other.shape != first.shape or not torch.equal(other, first)
    after = rows_of(cache)
    assert torch.equal(keep(what, index.head(5), root, cache), first) and torch.equal(keep(what, few, root, cache, **changes), other)
    assert rows_of(cache) == after


@pytest.mark.parametrize("name, changes", [("linear_probe", dict(patches="spectral")), ("no_projection", dict(lora_rank=0)), ("advanced", dict(lora_rank=0, lr=.1))])
def test_recipes_that_share_a_tower_share_its_features(world, tmp_path, name, changes):
    index, root = world
    train(recipe_for("ns_net", PRESET, lora_rank=0, patches="spectral"), index, root, PRESET, backbone=BACKBONE, cache=tmp_path, **quiet)
    before = rows_of(tmp_path)
    with patch.object(ImageTower, "forward", side_effect=AssertionError("the tower ran again")), patch("nsnet.inference.preprocess", side_effect=AssertionError):
        train(recipe_for(name, PRESET, **changes), index, tmp_path/"gone", PRESET, backbone=BACKBONE, cache=tmp_path, **quiet)
    assert rows_of(tmp_path) == before


def test_a_later_epoch_of_a_frozen_recipe_costs_the_head_alone(world, tmp_path):
    "The tower sees every image once, however many epochs there are."
    index, root = world
    seen, forward = [], ImageTower.forward
    def counted(self, x):
        seen.append(len(x))
        return forward(self, x)
    with patch.object(ImageTower, "forward", counted):
        for epochs in (1, 7): train(recipe_for("advanced", PRESET, lora_rank=0, epochs=epochs), index, root, PRESET, backbone=BACKBONE, cache=tmp_path, **quiet)
    assert seen == [64]                                                      # one batch, filled up


# LoRA in the last blocks

@pytest.mark.parametrize("changes", [dict(), dict(gradient_checkpointing=True, lora_dropout=.2), dict(gradient_accumulation=2, lora_targets=("attn", "mlp"), lora_blocks=(2, 3)),
                                     dict(projection="global", null_rank=20, mapper=False, align_weight=0.)], ids=["plain", "recomputed", "in parts", "global"])
def test_from_kept_blocks_to_the_bit(world, tmp_path, changes):
    "With a cache the blocks below run once; without one, in every step. History, weights and threshold are the same bits."
    (index, root), recipe = world, recipe_for("advanced", PRESET, **LAST | changes)
    options = dict(root=root, preset=PRESET, backbone=BACKBONE, seed=1, **quiet)
    plain = train(recipe, index, out=tmp_path/"plain", **options)
    with patch("nsnet.clip.ImageTower._pixels", autospec=True, side_effect=ImageTower._pixels) as seen: fast = train(recipe, index, out=tmp_path/"fast", cache=tmp_path/"cache", **options)
    assert rows_of(tmp_path/"cache")["blocks"] == len(index) and plain.threshold == fast.threshold
    assert sum(len(call.args[1]) for call in seen.call_args_list) == 1 + 2*8 + 64 + 64     # for its shape, to compare twice, to store: none in the epochs
    for name in ("model.safetensors", "history.csv", "validation.csv", "run.json"):
        assert (tmp_path/"plain"/name).read_bytes() == (tmp_path/"fast"/name).read_bytes(), name


@pytest.mark.parametrize("changes", [dict(reshuffle=True), dict(epochs=1), dict(lora_blocks=None), dict(lora_blocks=(0, 3)), dict(projection="mean", mapper=False, align_weight=0.)], ids=str)
def test_the_plain_way_elsewhere(world, tmp_path, changes):
    index, root = world
    train(recipe_for("advanced", PRESET, **LAST | changes), index, root, PRESET, backbone=BACKBONE, cache=tmp_path, **quiet)
    assert set(rows_of(tmp_path)) == {"canvases", "text"}


def test_the_plain_way_where_a_bit_differs(world, tmp_path):
    "A processor whose rounding depends on the place in the batch: what was stored is not used."
    (index, root), recipe = world, recipe_for("advanced", PRESET, **LAST)
    x, *_ = prepare_inputs(index, root, recipe, CONFIG, BACKBONE, tmp_path, **quiet)
    from nsnet.lora import LoraTower
    below = LoraTower.below
    with patch.object(LoraTower, "below", lambda self, c: below(self, c)*(1 + 1e-7*torch.arange(len(c))[:, None, None])):
        assert inputs_above(x, recipe, CONFIG, BACKBONE, tmp_path, **quiet) is x


# Room on the disk

def test_too_little_room_is_known_before_the_work(world, tmp_path):
    index, root = world
    recipes = dict(image=recipe_for("advanced", PRESET, lora_rank=0), canvases=recipe_for("advanced", PRESET))
    for name, recipe in recipes.items():
        with patch("shutil.disk_usage", return_value=shutil.disk_usage("/")._replace(free=1000)), patch("nsnet.inference.preprocess", side_effect=AssertionError):
            with pytest.raises(ValueError, match=f"{tmp_path}/(canvases|image).* will take 0.0 GB for 40 rows, and the disk has 0.0 GB free: make room") as error:
                prepare_inputs(index, root, recipe, CONFIG, BACKBONE, tmp_path, **quiet)
            assert "\n" not in str(error.value)
    last = recipe_for("advanced", PRESET, **LAST)
    x, *_ = prepare_inputs(index, root, last, CONFIG, BACKBONE, tmp_path, **quiet)
    with patch("shutil.disk_usage", return_value=shutil.disk_usage("/")._replace(free=1000)), pytest.warns(UserWarning, match="run in every epoch: .*blocks-3.* will take 0.0 GB for 40 rows"):
        assert inputs_above(x, last, CONFIG, BACKBONE, tmp_path, **quiet) is x


# Kills

def batch(i):
    "Keys and rows of the i-th batch."
    rows = np.random.default_rng(i).integers(256, size=(4, 64, 64, 3), dtype=np.uint8)
    return [f"{i}-{j}" for j in range(4)], rows


def append(source, out):
    "Store 40 batches, those that are there already left out; every batch is reported when it is on the disk."
    store = Arrays(out/"store")
    for i in range(40):
        keys, rows = batch(i)
        if not all(key in store for key in keys): store.add(keys, rows)


def append_and_die(moment, out):
    "The same, but the machine stops in the middle of a write: the moment-th is cut to a part of its bytes."
    write, left = nsnet.storage._write_behind, iter(range(moment, -1, -1))
    def dies(file, start, data):
        if next(left): return write(file, start, data)
        write(file, start, bytes(memoryview(data).cast("B"))[:len(memoryview(data).cast("B"))*(moment % 3)//2])    # nothing, half, all of it
        os.kill(os.getpid(), signal.SIGKILL)
    with patch.object(nsnet.storage, "_write_behind", dies): append(None, out)


def whole(out):
    "Whether all rows are there, once, in the file and by key."
    store = Arrays(out/"store")
    assert sorted(store.keys) == sorted(key for i in range(40) for key in batch(i)[0])
    for i in range(40): assert np.array_equal(store.rows(batch(i)[0])[:], batch(i)[1])
    assert (out/"store/rows.bin").stat().st_size == 160*64*64*3 and (out/"store/keys.jsonl").read_bytes().count(b"\n") == 160


@pytest.mark.parametrize("moment", [0, 1, 2, 3, 7, 8, 9, 30, 52, 79])
def test_cut_off_in_the_middle_of_a_write(tmp_path, moment):
    "Rows or keys, nothing, half or all of a write: what is found afterwards is true, and the next run ends with the same arrays."
    process = SERVER.Process(target=append_and_die, args=(moment, tmp_path))
    process.start()
    assert finish(process) == -signal.SIGKILL
    found = Arrays(tmp_path/"store")
    for i in range(40):
        there = [key for key in batch(i)[0] if key in found]
        if there: assert np.array_equal(found.rows(there)[:], batch(i)[1][[int(key[-1]) for key in there]])
    append(None, tmp_path)
    whole(tmp_path)


def test_killed_while_it_writes(tmp_path):
    "Ten kills from outside, each a little later, with a reader who looks meanwhile."
    for n in range(10):
        process = start(append, None, tmp_path)
        def ready():
            seen = Arrays(tmp_path/"store")
            if seen.keys: assert np.array_equal(seen.rows(seen.keys[-1:])[0], batch(int(seen.keys[-1].partition("-")[0]))[1][int(seen.keys[-1][-1])])
            return len(seen.keys) >= 4*(n + 1) or not process.is_alive()
        while not ready(): time.sleep(.001)
        process.kill()
        assert finish(process) in (-signal.SIGKILL, 0)
    append(None, tmp_path)
    whole(tmp_path)


def test_two_writers_at_once(tmp_path):
    processes = [start(append, None, tmp_path) for _ in range(2)]
    assert [finish(process) for process in processes] == [0, 0]
    whole(tmp_path)


def learn(source, out):
    "Train with LoRA in the last block, slowly, so that there is time to be killed; source: images."
    torch.set_num_threads(1)
    add = Arrays.add
    def slow(self, keys, rows):
        add(self, keys, rows)
        time.sleep(.2)
    index = pd.read_json(out.parent/"index.json", dtype=dict(sha256=str))
    with patch.object(Arrays, "add", slow), patch("nsnet.lora.inference_batch_size", return_value=4):
        train(recipe_for("advanced", PRESET, **LAST), index, source, PRESET, seed=1, out=out/"run", cache=out/"cache", **quiet)


def test_killed_training_ends_the_same(world, tmp_path):
    "SIGKILL while canvases, text and the blocks below are being stored, and once while it trains."
    index, root = world
    index.to_json(tmp_path/"index.json")
    assert finish(start(learn, root, tmp_path/"whole")) == 0
    def found(kind): return lambda: rows_of(tmp_path/"cut/cache").get(kind, 0) > 0
    moments = [found("canvases"), lambda: rows_of(tmp_path/"cut/cache").get("blocks", 0) >= 6, lambda: rows_of(tmp_path/"cut/cache").get("blocks", 0) >= 30,
               (tmp_path/"cut/run/checkpoint.safetensors").exists]
    for ready in moments: kill(start(learn, root, tmp_path/"cut"), ready)
    assert finish(start(learn, root, tmp_path/"cut")) == 0
    for name in ("model.safetensors", "history.csv", "run.json"): assert (tmp_path/"cut/run"/name).read_bytes() == (tmp_path/"whole/run"/name).read_bytes(), name
    for kind in tmp_path.glob("whole/cache/*"):
        assert (tmp_path/"cut/cache"/kind.name/"rows.bin").stat().st_size == (kind/"rows.bin").stat().st_size
        a, b = Arrays(kind), Arrays(tmp_path/"cut/cache"/kind.name)
        assert sorted(a.keys) == sorted(b.keys) and torch.equal(a.rows(a.keys)[:], b.rows(a.keys)[:])


# Memory

def synthetic(folder, n, shape=(224, 224, 3), dtype="uint8"):
    "A store of n rows that takes no room: a sparse file. Written as `Arrays` would."
    folder.mkdir(parents=True)
    (folder/"header.json").write_text(json.dumps(dict(dtype=dtype, shape=shape)))
    with open(folder/"rows.bin", "wb") as file: file.truncate(n*int(np.prod(shape))*np.dtype(dtype).itemsize)
    with open(folder/"keys.jsonl", "w") as file: file.writelines(f'"{i:064x}"\n' for i in range(n))
    return Arrays(folder)


class Mean(torch.nn.Module):
    "A tower that costs nothing: the mean of each channel."
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(1))
    def forward(self, x): return x[:, ::16, ::16].float().mean((1, 2))*self.scale


class Stub:
    "As much of a backbone as features need."
    device, embed_dim, image_key = "cpu", 3, "mean"
    def image_tower(self): return Mean()


def epoch(n, out):
    "Features of n canvases, then an epoch of the reading loop without a tower; notes bytes, seconds and peak memory."
    torch.set_num_threads(1)
    store = synthetic(out/f"canvases-{n}", n)
    x = store.rows(store.keys)
    if n <= 10_000:
        features = Arrays(out/f"image-{n}")
        _embed(Stub(), features, zip(store.keys, x), n, 64, False)
        assert features.rows(features.keys).shape == (n, 3)
    part = Part(x, torch.zeros(n), Rows(store, np.zeros(n)))
    part.v.__class__ = type("Nothing", (Rows,), dict(__getitem__=lambda self, which: None))
    begin, busy, read = time.perf_counter(), time.process_time(), 0
    for _, images in _read(part, range(-(-n//64)), 64, seed=0): read += images.x.nbytes
    assert read == n*224*224*3
    seconds, peak = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024
    (out/f"{n}.json").write_text(json.dumps(dict(bytes=read, seconds=seconds, busy=time.process_time() - busy, peak=peak)))
    shutil.rmtree(out/f"canvases-{n}")


def measured(n, out):
    process = start(epoch, n, out)
    process.join(3000)
    assert process.exitcode == 0
    found = json.loads((out/f"{n}.json").read_text())
    rates = [found["bytes"]/found[key]/1e9 for key in ("seconds", "busy")]
    print("{:,} canvases: {:.2f} GB/s in {:.0f} s, {:.2f} GB/s of the processor's own time, peak {:,.0f} MB".format(
        n, rates[0], found["seconds"], rates[1], found["peak"]/1e6))
    return found


def test_ten_times_the_images_in_the_same_memory(tmp_path):
    "900 MB of canvases more, features and an epoch: memory within 200 MB."
    few, many = measured(660, tmp_path), measured(6600, tmp_path)
    assert many["peak"] - few["peak"] < 200e6


@pytest.mark.slow
def test_as_large_as_genimage(tmp_path):
    "324,000 canvases of 224 pixels, 49 GB: one epoch in random order, in less than 2 GB."
    found = measured(324_000, tmp_path)
    assert found["peak"] < 2e9 and found["bytes"]/found["busy"] > 1e9
