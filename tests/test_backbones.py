"Towers in their true size with random weights: loaded, adapted, trained for a step, scored, saved and loaded again."
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from nsnet import Detector, recipes
from nsnet.clip import check_canvas, image_tower, load_backbone, random_backbone, text_features
from nsnet.datasets import index_folder, split
from nsnet.mini import CONTENTS, render_photo
from nsnet.train import train

LARGE = [pytest.param(*values, marks=pytest.mark.slow, id=values[0].split("/")[0]) for values in (
    ("ViT-L-14/openai", 224, 32, 768, 24, True),
    ("ViT-L-14-336/openai", 336, 28, 768, 24, True),
    ("ViT-L-14-336/openai", 336, 48, 768, 24, True),
    ("ViT-L-16-SigLIP-256/webli", 256, 32, 1024, 24, False),
    ("ViT-SO400M-14-SigLIP/webli", 224, 32, 1152, 27, False))]
TOWERS = [pytest.param("ViT-B-16-SigLIP/webli", 224, 32, 768, 12, False, id="ViT-B-16-SigLIP"), *LARGE]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    "Eight pictures, captioned."
    root = tmp_path_factory.mktemp("pictures")
    for i in range(8):
        file = root/("fake" if i % 2 else "real")/f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(render_photo(CONTENTS[i], seed=i)).resize((400, 360)).save(file)
    found = split(index_folder(root, progress=False), n_train=3, n_test=1)
    return found.assign(caption=[f"picture number {i}" for i in range(len(found))])


@pytest.mark.parametrize("name, canvas, patch, dim, blocks, quick", TOWERS)
def test_tower(name, canvas, patch, dim, blocks, quick, index, tmp_path):
    "Every dimension comes from the model; LoRA finds its layers; a saved detector scores the same."
    backbone = load_backbone(random_backbone(name, tmp_path/"weights"), "cpu")
    assert (backbone.size, backbone.dim) == (canvas, dim)
    assert any(type(m).__name__ == "QuickGELU" for m in backbone.model.modules()) is quick
    v = text_features(backbone, ["a red ring", "a blue square on sand"], progress=False)
    assert v.shape == (2, dim) and not np.allclose(v[0], v[1])
    with pytest.raises(ValueError, match=f"takes a canvas of {canvas} pixels with patches of .*{patch}"): check_canvas(backbone, canvas, 33)
    P = recipes.preset("folder", patch=patch, canvas=canvas, backbone=backbone.name)
    r = recipes.recipe("advanced", epochs=1, batch_size=4, checkpoint_blocks=True, select="last")
    detector = train(r, index, P, backbone, seed=0, out=tmp_path/"run", progress=False)
    learned = {n: p for n, p in detector.net.named_parameters() if "lora_B" in n}
    assert len(learned) == 2*blocks and all(p.abs().sum() > 0 for p in learned.values())
    scores = detector.score(index[index.split == "test"], root=index.attrs["root"]).score
    again = Detector.from_pretrained(tmp_path/"run", backbone=backbone).score(index[index.split == "test"], root=index.attrs["root"]).score
    assert scores.between(0, 1).all() and pd.Series.equals(scores, again)


def test_detectors_share_the_frozen_weights(tmp_path):
    "Several adapted towers cost the memory of one."
    from nsnet.clip import add_lora, merge_lora
    tower = image_tower(load_backbone("mini", "cpu"))
    own = {p.data_ptr() for p in tower.parameters()}
    adapted = [add_lora(tower, rank=2, targets=("attn", "mlp")) for _ in range(2)]
    assert all(own >= {p.data_ptr() for n, p in t.named_parameters() if "lora_" not in n} for t in adapted)
    assert not own & {p.data_ptr() for p in merge_lora(adapted[0]).parameters()}
