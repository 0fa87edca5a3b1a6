"What can be tested of a GPU without one: all tensors are on it, and half precision learns and captions as single precision does."
from dataclasses import replace

import numpy as np
import pytest
import torch
from packaging.version import Version
from torch._subclasses.fake_tensor import FakeTensorMode

from nsnet import clip
from nsnet.captions import load_captioner
from nsnet.clip import load_backbone, text_features, to_device
from nsnet.config import RECIPES, preset, recipe_for
from nsnet.generators import index_mini
from nsnet.images import open_image
from nsnet.inference import build_network, predict
from nsnet.losses import nsnet_loss
from nsnet.patches import select_patches, select_patches_batch
from nsnet.scenes import CONTENTS, render_photo
from nsnet.training import Part, _accelerator, _optimizer, fit, train_step

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
def in_fp32(monkeypatch): monkeypatch.setattr(clip, "precision_of", lambda device: "fp32")


@pytest.mark.parametrize("name", NS_NETS)
def test_all_of_a_system_is_on_the_gpu(name, gpu, in_fp32):
    recipe, net, inputs = system(name)
    with gpu:
        assert loss_of(recipe, put_on(gpu, net).train(), *put_on(gpu, inputs)).device.type == "cuda"
        said = predict(net, gpu.from_tensor(inputs[0]), gpu.from_tensor(inputs[2]))
        assert net.training is False and said.logits.device.type == "cpu" and said.logits.shape == (8,)


def test_a_tensor_left_behind_is_an_error(gpu, in_fp32):
    recipe, net, inputs = system("advanced")
    with gpu:
        put_on(gpu, net)
        net.tower.mean = net.tower.mean.cpu()
        with pytest.raises(Exception, match="device"): loss_of(recipe, net, *put_on(gpu, inputs))


def test_captions_are_embedded_on_the_gpu(gpu, in_fp32):
    backbone = load_backbone("mini", "cpu")
    with gpu:
        on_gpu = replace(backbone, model=put_on(gpu, backbone.model), device="cuda:0")
        assert text_features(on_gpu, ["a red ball", "a ring"], progress=False).device.type == "cpu"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_tower_learns_the_same_in_half_precision(recompute, precision):
    recipe, net, inputs = system("advanced", dropout=0., gradient_checkpointing=recompute)
    for name, p in net.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(p, std=.02)         # at zero, half of the gradients are zero
    gradients = []
    for net.tower.forced in ("fp32", precision):
        loss = loss_of(recipe, net.train(), *inputs)
        loss.backward()
        assert loss.dtype == torch.float32
        gradients.append(torch.cat([p.grad.flatten() for n, p in net.named_parameters() if "lora_" in n]))
        net.zero_grad()
    assert not torch.equal(*gradients)                                  # it was computed in low precision
    assert torch.cosine_similarity(*gradients, dim=0) > .99


def test_half_precision_describes_as_single_does(tmp_path):
    index = index_mini(tmp_path, 16, 4, progress=False)
    images = [open_image(tmp_path/p) for p in index.path[:32]]
    captioner = load_captioner("mini", device="cpu")
    single = np.array(captioner.generate(images))
    captioner.model.half()
    assert len(set(single)) > 8 and (single == captioner.generate(images)).mean() > .9


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def run_on(device, precision, **options):
    "Train on 40 canvases of noise, finer where they count as generated."
    torch.manual_seed(0)
    recipe, backbone = recipe_for("advanced", PRESET, epochs=2, batch_size=8, dropout=0.), load_backbone("mini", device, precision)
    net, y, g = build_network(recipe, backbone), torch.tensor([0., 1.]*20), torch.Generator().manual_seed(1)
    x = (128 + torch.randn(40, 64, 64, 3, generator=g)*(8 + 24*y.view(-1, 1, 1, 1))).clamp(0, 255).to(torch.uint8)
    part = Part(x, y, torch.randn(40, backbone.embed_dim, generator=g))
    return fit(net, dict(train=part, val=part), recipe, progress=False, **options)


@on_a_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_learns_what_a_cpu_learns(precision, tmp_path):
    "In every precision; and an interrupted run goes on with the moments and the scale that it had."
    on_cpu, on_gpu = run_on("cpu", "fp32"), run_on("cuda", precision)
    assert ("skipped" in on_gpu["history"][0]) == (precision == "fp16")
    a, b = (np.array([row["total"] for row in run["history"]]) for run in (on_cpu, on_gpu))
    assert np.allclose(a, b, rtol=1e-3 if precision == "fp32" else .1)

    class PowerCut(Exception): pass
    def cut(*_): raise PowerCut
    file = tmp_path/"c.safetensors"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr("nsnet.training._validate", cut)
        run_on("cuda", precision, checkpoint=file, checkpoint_every=3)
    again = run_on("cuda", precision, checkpoint=file, checkpoint_every=3)
    assert np.allclose([row["total"] for row in again["history"]], b, rtol=1e-3 if precision == "fp32" else .02)


@on_a_gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_does_not_wait_for_the_gpu(precision):
    "Neither for its losses nor for its batch."
    recipe, backbone = recipe_for("advanced", PRESET), load_backbone("mini", "cuda", precision)
    net, (_, _, inputs) = build_network(recipe, backbone).train(), system("advanced")
    optimizer, scaler = _optimizer(net, recipe)
    def step(): return train_step(net, optimizer, Part(*inputs), torch.arange(8), recipe, _accelerator("cuda"), scaler)
    for _ in range(3): step()
    torch.cuda.set_sync_debug_mode("error")
    try: terms = step()
    finally: torch.cuda.set_sync_debug_mode("default")
    assert terms.is_cuda and terms.isfinite().all()


@on_a_gpu
def test_what_a_gpu_fetches_by_itself_arrives():
    for x in (torch.arange(7), torch.randint(256, (3, 64, 64, 3), dtype=torch.uint8).transpose(0, 1)):
        assert to_device(x, "cuda").is_cuda and torch.equal(to_device(x, "cuda").cpu(), x)


@on_a_gpu
@pytest.mark.parametrize("shape", [(128, 128), (70, 200), (40, 33), (1024, 1024)])
def test_patches_chosen_on_a_gpu_are_those_of_the_cpu(shape):
    photos = [np.asarray(render_photo(CONTENTS[i], i).resize(shape[::-1])) for i in range(8)]
    flat = [np.full((*shape, 3), level, np.uint8) for level in (0, 200)]
    images = torch.from_numpy(np.stack(photos + flat))
    for patch, canvas in ((16, 64), (32, 224)):
        found = select_patches_batch(images.cuda(), patch, canvas, 3)
        assert found.is_cuda and np.array_equal(found.cpu(), [select_patches(x, patch, canvas, 3) for x in images.numpy()])
