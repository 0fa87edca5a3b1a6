"`train` in two processes: one result on the disk, which both return, and the course that one process takes."
import json
import os
import socket

import numpy as np
import pandas as pd
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image

from nsnet.config import preset, recipe_for
from nsnet.detector import Detector
from nsnet.index import index_folder
from nsnet.training import train

PRESET = preset("smoke")
SYSTEMS = {name: recipe_for(name, PRESET, **changes) for name, changes in {
    "advanced": dict(epochs=2, batch_size=8, gradient_accumulation=2, lora_rank=2, dropout=0.),
    "ns_net": dict(epochs=2, batch_size=8, lora_rank=0, null_rank=8),
    "advanced_as_released": dict(epochs=2, dropout=0.), "linear_probe": {}}.items()}


def images(folder):
    "An index of 17 training images, so that the last batch of an epoch holds a single one, 8 for validation, and a file that cannot be used."
    for i in range(26):
        file, noise = folder/("fake" if i % 2 else "real")/f"{i:02}.png", np.random.default_rng(i).normal(128, 8 + 24*(i % 2), (96, 96, 3))
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(file)
    index = index_folder(folder, progress=False).sort_values("path", key=lambda paths: paths.str[-6:], ignore_index=True)
    index["split"], index["caption"] = ["train"]*18 + ["val"]*8, [f"a {c} ball on grass" for c in np.resize(["red", "blue", "white"], 26)]
    (folder/index.path[17]).write_bytes(b"not an image")
    return index


def run(folder, out, cache):
    "Train every system; the index is the same in every process."
    index = pd.read_json(folder/"index.json").fillna("")
    return {name: train(r, index, folder, PRESET, seed=1, out=out/name, cache=cache, progress=False) for name, r in SYSTEMS.items()}


def work(rank, port, folder, out):
    "One of two processes."
    torch.set_num_threads(1)
    os.environ.update(CUDA_VISIBLE_DEVICES="", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="1")
    for name, detector in run(folder, out, out/"cache").items(): detector.save_pretrained(out/f"{name}-{rank}")
    if torch.distributed.is_initialized(): torch.distributed.destroy_process_group()


def work_alone(rank, folder, out):
    "The one process that they are compared with: on a processor like them, also where there is a GPU."
    os.environ.update(CUDA_VISIBLE_DEVICES="")
    run(folder, out, None)


@pytest.fixture(scope="module")
def outs(tmp_path_factory):
    "What one process leaves, and what two leave."
    folder, one, two = (tmp_path_factory.mktemp(name) for name in ("images", "one", "two"))
    images(folder).to_json(folder/"index.json")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(work, (port, folder, two), nprocs=2)
    mp.spawn(work_alone, (folder, one), nprocs=1)
    return one, two


@pytest.mark.parametrize("system", SYSTEMS)
def test_both_processes_return_what_is_saved(outs, system):
    one, two = outs
    weights = (two/system/"model.safetensors").read_bytes()
    for rank in range(2): assert (two/f"{system}-{rank}/model.safetensors").read_bytes() == weights
    assert json.loads((two/system/"run.json").read_text())["key"] == json.loads((one/system/"run.json").read_text())["key"]
    assert not list((two/system).glob("*checkpoint*"))
    assert pd.read_csv(two/system/"rejected.csv").path.tolist() == ["fake/17.png"]


@pytest.mark.parametrize("system", SYSTEMS)
def test_two_processes_find_what_one_finds(outs, system):
    one, two = (Detector.from_pretrained(out/system).net.state_dict() for out in outs)
    for name in one: torch.testing.assert_close(one[name], two[name], rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.parametrize("system", [name for name, r in SYSTEMS.items() if r.kind == "nsnet"])
def test_the_losses_are_the_same(outs, system):
    one, two = (pd.read_csv(out/system/"history.csv") for out in outs)
    assert len(one) == 2*3 and one.step.tolist() == two.step.tolist()
    np.testing.assert_allclose(one[["total", "contrastive", "bce", "alignment"]], two[["total", "contrastive", "bce", "alignment"]], atol=1e-3)
    np.testing.assert_allclose(one.total[0], two.total[0], rtol=2e-6)
