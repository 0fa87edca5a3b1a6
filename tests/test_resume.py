"Training that stops at any step follows the same course as training that is left alone, to the bit."
import pytest
import torch

from nsnet import training
from nsnet.clip import load_backbone
from nsnet.config import preset, recipe_for
from nsnet.inference import build_network
from nsnet.model import trained_state

BACKBONE = load_backbone("mini", "cpu")
SETTINGS = {
    "lora": dict(),
    "parts and dropout": dict(gradient_accumulation=2, lora_dropout=.2, optimizer="adam", schedule="constant", weight_decay=.01,
                              gradient_checkpointing=True, reshuffle=True),
    "no mapper": dict(projection="none", mapper=False, align_weight=0., select="last"),
    "frozen": dict(lora_rank=0, contrastive="as_released", logits_on="raw", align_reduction="sum", align_weight=.01),
}


def recipe_with(setting, **changes):
    "A short run: 3 epochs of 3 steps, the last of 4 images."
    return recipe_for("advanced", preset("mini"), **dict(epochs=3, batch_size=8, lora_rank=2, lora_blocks=(0,)) | SETTINGS[setting] | changes)


def parts_for(recipe):
    "20 training and 10 validation images of noise, canvases or features."
    g = torch.Generator().manual_seed(0)
    def part(n):
        side, d = BACKBONE.image_size, BACKBONE.embed_dim
        if recipe.lora_rank: x = torch.randint(256, (n, side, side, 3), generator=g, dtype=torch.uint8)
        else: x = torch.randn(n, d, generator=g)
        return training.Part(x, torch.arange(n).remainder(2).float(), torch.randn(n, d, generator=g), patch=16)
    return {"train": part(20), "val": part(10)}


def fit(recipe, **options):
    "Loss trace, validation, best epoch and weights of a run."
    torch.manual_seed(0)
    net = build_network(recipe, BACKBONE)
    run = training.fit(net, parts_for(recipe), recipe, seed=3, progress=False, **options)
    return run["history"], run["validation"], run["best_epoch"], trained_state(net)


def same(a, b):
    "Equal to the last bit."
    return a[:3] == b[:3] and a[3].keys() == b[3].keys() and all(torch.equal(a[3][k], b[3][k]) for k in a[3])


class PowerCut(Exception): pass


def fit_until(step, monkeypatch, recipe, **options):
    "A run that dies just before a step is taken."
    take_step, calls = training.train_step, iter(range(step + 1))
    def dies(*args):
        if next(calls) == step: raise PowerCut
        return take_step(*args)
    with monkeypatch.context() as changed, pytest.raises(PowerCut):
        changed.setattr(training, "train_step", dies)
        fit(recipe, **options)


@pytest.mark.parametrize("setting", SETTINGS)
def test_same_course_after_interruptions(setting, tmp_path, monkeypatch):
    "Twice interrupted, each time some steps after the last checkpoint."
    recipe, options = recipe_with(setting), dict(checkpoint=tmp_path/"c.safetensors", checkpoint_every=2, key="a")
    whole = fit(recipe)
    assert len(whole[0]) == 9 and len({h["total"] for h in whole[0]}) == 9
    fit_until(5, monkeypatch, recipe, **options)      # step 4 is the last that is kept
    fit_until(3, monkeypatch, recipe, **options)      # takes 4, 5, 6 and dies at 7, in the last epoch
    assert same(fit(recipe, **options), whole)


@pytest.mark.parametrize("step", [1, 3, 8])
def test_same_course_from_any_step(step, tmp_path, monkeypatch):
    recipe, options = recipe_with("lora"), dict(checkpoint=tmp_path/"c.safetensors", checkpoint_every=1)
    fit_until(step, monkeypatch, recipe, **options)
    assert same(fit(recipe, **options), fit(recipe))
