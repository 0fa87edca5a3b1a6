"Towers in full size with random weights: loaded, adapted, trained for a step, scored, saved and loaded again."
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from nsnet.clip import check_canvas, load_backbone, text_features
from nsnet.config import preset, recipe
from nsnet.detector import Detector
from nsnet.index import index_folder, split
from nsnet.lora import add_lora
from nsnet.scenes import CONTENTS, render_photo
from nsnet.training import train

sys.path.insert(0, str(Path(__file__).parents[1]))
from scripts.random_weights import random_backbone, random_captioner

LARGE = [pytest.param(*values, marks=pytest.mark.slow, id=values[0].split("/")[0]) for values in (
    ("ViT-L-14/openai", 224, 32, 768, 24, True),
    ("ViT-L-14-336/openai", 336, 28, 768, 24, True),
    ("ViT-L-14-336/openai", 336, 48, 768, 24, True),
    ("ViT-L-16-SigLIP-256/webli", 256, 32, 1024, 24, False),
    ("ViT-SO400M-14-SigLIP/webli", 224, 32, 1152, 27, False))]
TOWERS = [pytest.param("ViT-B-16-SigLIP/webli", 224, 32, 768, 12, False, id="ViT-B-16-SigLIP"), *LARGE]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "Eight images, captioned: their index and their folder."
    root = tmp_path_factory.mktemp("pictures")
    for i in range(8):
        file = root/("fake" if i % 2 else "real")/f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(render_photo(CONTENTS[i], seed=i)).resize((400, 360)).save(file)
    found = split(index_folder(root, progress=False), n_train=3, n_test=1)
    return found.assign(caption=[f"picture number {i}" for i in range(len(found))]), root


@pytest.mark.parametrize("name, canvas, patch, embed_dim, blocks, quick", TOWERS)
def test_tower(name, canvas, patch, embed_dim, blocks, quick, pictures, tmp_path):
    "Every dimension comes from the model; LoRA finds its layers; a saved detector scores the same."
    index, root = pictures
    backbone = load_backbone(random_backbone(name, tmp_path/"weights"), "cpu")
    assert (backbone.image_size, backbone.embed_dim) == (canvas, embed_dim)
    assert any(type(m).__name__ == "QuickGELU" for m in backbone.model.modules()) is quick
    v = text_features(backbone, ["a red ring", "a blue square on sand"], progress=False)
    assert v.shape == (2, embed_dim) and not np.allclose(v[0], v[1])
    fits = f"takes a canvas of {canvas} pixels with patches of .*{patch}"
    with pytest.raises(ValueError, match=fits): check_canvas(backbone, canvas, 33)
    r = recipe("advanced", epochs=1, batch_size=4, gradient_checkpointing=True, select="last")
    P = preset("folder", patch=patch, canvas=canvas, backbone=backbone.name)
    detector = train(r, index, root, P, seed=0, backbone=backbone, out=tmp_path/"run", progress=False)
    learned = {n: p for n, p in detector.net.named_parameters() if "lora_B" in n}
    assert len(learned) == 2*blocks and all(p.abs().sum() > 0 for p in learned.values())
    tested = index[index.split == "test"]
    scores = detector.score(tested, root=root).score
    again = Detector.from_pretrained(tmp_path/"run", backbone=backbone).score(tested, root=root).score
    assert scores.between(0, 1).all() and pd.Series.equals(scores, again)


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="open_clip knows no 'ViT-Z-99/openai'"):
        random_backbone("ViT-Z-99/openai", tmp_path)


@pytest.mark.slow
def test_random_captioner(tmp_path):
    "It loads as a captioner, says something, and always the same."
    from nsnet.captions import load_captioner
    blip = load_captioner(random_captioner(tmp_path/"blip"), "cpu", max_new_tokens=3)
    images = [Image.fromarray(render_photo(CONTENTS[i], seed=i)) for i in range(2)]
    said = blip.generate(images)
    assert all(said) and said == blip.generate(images)


def test_detectors_share_the_frozen_weights():
    "Several adapted towers cost the memory of one, and the backbone's own stays as it is."
    tower = load_backbone("mini", "cpu").image_tower()
    own = {p.data_ptr(): p for p in tower.parameters()}
    before = [p.clone() for p in own.values()]
    adapted = [add_lora(tower, rank=2, targets=("attn", "mlp")) for _ in range(2)]
    for t in adapted:
        frozen = {p.data_ptr() for name, p in t.named_parameters() if "lora_" not in name}
        assert frozen and frozen <= own.keys()
    adapters = [{p.data_ptr() for name, p in t.named_parameters() if "lora_" in name} for t in adapted]
    assert not adapters[0] & adapters[1] and not own.keys() & (adapters[0] | adapters[1])
    for t in adapted:
        for name, p in t.named_parameters():
            if "lora_" in name: p.data.fill_(1.)
    assert all(np.array_equal(a, b) for a, b in zip(before, own.values()))
