"What can be tested of a GPU without one: all tensors are on it, and half precision learns and captions as single precision does."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from packaging.version import Version
from torch._subclasses.fake_tensor import FakeTensorMode

from nsnet import clip
from nsnet.captions import load_captioner
from nsnet.clip import load_backbone, text_features
from nsnet.config import RECIPES, preprocess_config, preset, recipe_for
from nsnet.detector import Detector
from nsnet.generators import index_mini
from nsnet.images import open_image
from nsnet.inference import build_network, predict
from nsnet.losses import nsnet_loss
from nsnet.patches import select_patches, select_patches_batch
from nsnet.scenes import CONTENTS, render_photo
from nsnet.training import run_key

PRESET = preset("mini")
NS_NETS = [name for name, r in RECIPES.items() if r.kind == "nsnet"]


def system(name, **changes):
    "A system of the mini preset on a backbone of its own, and eight inputs: x, y, v."
    torch.manual_seed(0)
    recipe, backbone = recipe_for(name, PRESET, **changes), load_backbone("mini", "cpu")
    P = torch.eye(backbone.embed_dim) if recipe.projection in ("global", "as_released", "leace", "mean") else None
    net = build_network(recipe, backbone, P)
    x = torch.randint(256, (8, 64, 64, 3), dtype=torch.uint8) if recipe.lora_rank else torch.randn(8, backbone.embed_dim)
    return recipe, net, (x, torch.tensor([0., 1.]*4), torch.randn(8, backbone.embed_dim))


def loss_of(recipe, net, x, y, v):
    "The three terms together."
    f, logits, m, _, u = net(x, v)
    return nsnet_loss(f, logits, y, m, u, recipe.bce_weight, recipe.align_weight, recipe.temperature, recipe.contrastive,
                      recipe.align_reduction).total


@pytest.fixture
def gpu():
    "Tensors that know their device and compute nothing: one on the CPU beside one on the GPU is an error, as with a real GPU."
    if Version(torch.__version__) < Version("2.10"): pytest.skip("older versions of PyTorch pretend only where there is a GPU")
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield FakeTensorMode(allow_non_fake_inputs=True)
    torch.__future__.set_overwrite_module_params_on_conversion(False)


def put_on(gpu, what):
    "A network or tensors, on the GPU."
    move = lambda t: gpu.from_tensor(t).to("cuda:0")
    return what._apply(move) if isinstance(what, torch.nn.Module) else [move(t) for t in what]


@pytest.fixture
def no_bf16(monkeypatch): monkeypatch.setattr(clip, "has_bf16", lambda device: False)


@pytest.mark.parametrize("name", NS_NETS)
def test_all_of_a_system_is_on_the_gpu(name, gpu, no_bf16):
    recipe, net, inputs = system(name)
    with gpu:
        assert loss_of(recipe, put_on(gpu, net).train(), *put_on(gpu, inputs)).device.type == "cuda"
        said = predict(net, gpu.from_tensor(inputs[0]), gpu.from_tensor(inputs[2]))
        assert net.training is False and said.logits.device.type == "cpu" and said.logits.shape == (8,)


def test_a_tensor_left_behind_is_an_error(gpu, no_bf16):
    recipe, net, inputs = system("advanced")
    with gpu:
        put_on(gpu, net)
        net.tower.mean = net.tower.mean.cpu()
        with pytest.raises(Exception, match="device"): loss_of(recipe, net, *put_on(gpu, inputs))


def test_captions_are_embedded_on_the_gpu(gpu):
    backbone = load_backbone("mini", "cpu")
    with gpu:
        on_gpu = replace(backbone, model=put_on(gpu, backbone.model), device="cuda:0")
        assert text_features(on_gpu, ["a red ball", "a ring"], progress=False).device.type == "cpu"


@pytest.mark.parametrize("recompute", [False, True])
def test_bfloat16_tower_learns_the_same(recompute, monkeypatch):
    recipe, net, inputs = system("advanced", dropout=0., gradient_checkpointing=recompute)
    for name, p in net.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(p, std=.02)         # at zero, half of the gradients are zero
    gradients = []
    for low in (False, True):
        monkeypatch.setattr(clip, "has_bf16", lambda device: low)
        loss = loss_of(recipe, net.train(), *inputs)
        loss.backward()
        assert loss.dtype == torch.float32
        gradients.append(torch.cat([p.grad.flatten() for n, p in net.named_parameters() if "lora_" in n]))
        net.zero_grad()
    assert not torch.equal(*gradients)                                  # it was computed in low precision
    assert torch.cosine_similarity(*gradients, dim=0) > .99


def test_precisions_are_kept_apart(monkeypatch):
    "Features, runs and scores of one precision are never taken for those of the other."
    recipe, net, _ = system("advanced")
    backbone, config = load_backbone("mini", "cpu"), preprocess_config(recipe, PRESET)
    index = pd.DataFrame([["a", 0, "train", "a ring"]], columns=["sha256", "label", "split", "caption"])
    detector, marks = Detector(recipe, config, backbone, net), []
    for low in (False, True):
        monkeypatch.setattr(clip, "has_bf16", lambda device: low)
        marks.append([backbone.image_key, run_key(recipe, config, index, backbone, 0), detector.fingerprint()])
    assert all(single != half for single, half in zip(*marks)) and marks[0][0] == backbone.weights


def test_half_precision_describes_as_single_does(tmp_path):
    index = index_mini(tmp_path, 16, 4, progress=False)
    images = [open_image(tmp_path/p) for p in index.path[:32]]
    captioner = load_captioner("mini", device="cpu")
    single = np.array(captioner.generate(images))
    captioner.model.half()
    assert len(set(single)) > 8 and (single == captioner.generate(images)).mean() > .9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("shape", [(128, 128), (70, 200), (40, 33), (1024, 1024)])
def test_patches_chosen_on_a_gpu_are_those_of_the_cpu(shape):
    photos = [np.asarray(render_photo(CONTENTS[i], i).resize(shape[::-1])) for i in range(8)]
    flat = [np.full((*shape, 3), level, np.uint8) for level in (0, 200)]
    images = torch.from_numpy(np.stack(photos + flat))
    for patch, canvas in ((16, 64), (32, 224)):
        found = select_patches_batch(images.cuda(), patch, canvas, 3)
        assert found.is_cuda and np.array_equal(found.cpu(), [select_patches(x, patch, canvas, 3) for x in images.numpy()])
