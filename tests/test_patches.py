"The choice of patches: the same bytes on every processor, one by one and in a batch, and as the released notebooks choose."
import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from nsnet import patches
from nsnet.config import PreprocessConfig
from nsnet.inference import _config_key
from nsnet.patches import (cut_patches, select_patches, select_patches_as_released, select_patches_batch,
                           spectral_entropy)
from nsnet.scenes import CONTENTS, render_photo

REPO = Path(__file__).resolve().parents[1]
AVX512 = "AVX512_SPR AVX512_ICL X86_V4 AVX512_CNL AVX512_CLX AVX512_SKX AVX512CD AVX512F"      # of all versions of NumPy
AVX2 = dict(NPY_DISABLE_CPU_FEATURES=AVX512, OPENBLAS_CORETYPE="Haswell", MKL_ENABLE_INSTRUCTIONS="AVX2",
            ONEDNN_MAX_CPU_ISA="AVX2", ATEN_CPU_CAPABILITY="avx2", OMP_NUM_THREADS="1")
PLAIN = dict(NPY_DISABLE_CPU_FEATURES=f"{AVX512} X86_V3 AVX2 FMA3", OPENBLAS_CORETYPE="Prescott",
             MKL_ENABLE_INSTRUCTIONS="SSE4_2", ATEN_CPU_CAPABILITY="default", OMP_NUM_THREADS="1")
THREADS = dict.fromkeys(["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"], "2")


def as_jpeg(image, quality):
    "What is left of an image after a JPEG."
    file = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def pictures():
    "(image, patch, canvas): photographs, scenes, margins, flat, repeated, mirrored, tiny and very dark ones."
    rng = np.random.default_rng(0)
    for name in ("china.jpg", "flower.jpg"):
        photo = load_sample_image(name)
        for patch in (8, 16, 32, 56): yield photo, patch, 224
        yield as_jpeg(Image.fromarray(photo).resize((1000, 700), Image.BICUBIC), 92), 32, 224
        yield np.pad(photo, ((200, 200), (200, 200), (0, 0)), constant_values=255), 32, 224
        yield np.concatenate([photo, photo[::-1], photo[:, ::-1]]), 32, 224
        yield photo//64, 32, 224
    for i in range(60): yield as_jpeg(render_photo(CONTENTS[5*i % len(CONTENTS)], i), (75, 92)[i % 2]), 16, 64
    for i in range(40):
        h, w = rng.integers(16, 150, 2)
        yield rng.integers(0, 1 + rng.integers(1, 256), (h, w, 3), dtype=np.uint8), 16, 64
    for value in (0, 1, 90, 255): yield np.full((300, 400, 3), value, np.uint8), 32, 224
    ramp = np.linspace(0, 255, 320).astype(np.uint8)
    yield np.broadcast_to(ramp[None, :, None], (320, 320, 3)), 32, 224
    yield np.broadcast_to(ramp[:, None, None]//2 + ramp[None, :, None]//2, (320, 320, 3)), 32, 224
    yield np.tile(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8), (12, 9, 1)), 32, 224
    yield np.where(rng.random((320, 320, 1)) < .001, 255, 250).astype(np.uint8).repeat(3, 2), 32, 224


def canvases(file):
    "One hash for each picture of a file: of its canvases by both rules for two seeds, and of the one made from a tensor."
    for name, x in np.load(file).items():
        patch, canvas = map(int, name.split("-")[1:])
        made = [rule(x, patch, canvas, seed) for rule in (select_patches, select_patches_as_released) for seed in (0, 7)]
        made += [*select_patches_batch(torch.from_numpy(x)[None], patch, canvas).numpy()]
        yield hashlib.sha256(np.stack(made)).hexdigest()[:12]


def elsewhere(code, *args, **settings):
    "What a program of its own prints under other settings of the processor."
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join([str(REPO), str(REPO/"tests")])) | settings
    return subprocess.run([sys.executable, "-W", "ignore", "-c", f"import sys, test_patches as t; {code}", *map(str, args)],
                          env=environment, capture_output=True, text=True, check=True).stdout.split()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    "The pictures, made once: rendering them rounds as well."
    path = tmp_path_factory.mktemp("pictures")/"all.npz"
    np.savez(path, **{f"{i}-{patch}-{canvas}": x for i, (x, patch, canvas) in enumerate(pictures())})
    return path


@pytest.fixture(scope="module")
def here(file): return list(canvases(file))


@pytest.mark.parametrize("settings", [AVX2, PLAIN, THREADS], ids=["avx2", "plain", "threads"])
def test_every_processor_makes_the_same_canvases(settings, file, here):
    assert len(here) > 100 and elsewhere("print(*t.canvases(sys.argv[1]))", file, **settings) == here


def test_the_settings_do_change_the_rounding():
    "Otherwise the test above would show nothing."
    code = "p = t.cut_patches(t.load_sample_image('china.jpg')); print(t.hashlib.sha256(t.spectral_entropy(p)).hexdigest())"
    if len({elsewhere(code, **settings)[0] for settings in (AVX2, PLAIN, {})}) == 1:
        pytest.skip("the libraries of this machine round alike under all settings")


def test_a_shaken_entropy_changes_nothing(monkeypatch, file, here):
    "Errors of 32-bit numbers as large as they are taken to be, at random."
    measure, rng = patches.spectral_entropy, np.random.default_rng(1)
    def shaken(p): return measure(p) + np.float32(.9*patches._ERROR*p.shape[1])*rng.uniform(-1, 1, len(p)).astype(np.float32)
    monkeypatch.setattr(patches, "spectral_entropy", shaken)
    assert list(canvases(file)) == here


def difficult(n, count=100):
    "Patches on which 32-bit numbers do badly: nearly constant, nearly periodic, single bright pixels."
    rng, y, x = np.random.default_rng(n), *np.mgrid[:n, :n]
    def some(high): return rng.integers(0, high, (count, 1, 1))
    level, waves = some(256), np.round(60*np.cos(2*np.pi*x*some(n)/n)).astype(int)
    for found in (level + 0*x, level + (rng.random((count, n, n)) < .01), level + waves, level + x*some(4), level + (x + y)*some(3)//2,
                  level + (x < some(n))*some(256), level + (x + y) % 2*some(100), level + ((x == some(n)) & (y == some(n)))*some(256)):
        yield np.clip(found, 0, 255).astype(np.uint8)[..., None].repeat(3, 3)
    yield rng.integers(0, 256, (count, n, n, 3), dtype=np.uint8)


def by_definition(p):
    "Equation 13 in 64 bits, by another library's transform."
    a = np.abs(np.fft.fft2(p.mean(-1))).reshape(len(p), -1)
    share = a/(a.sum(1, keepdims=True) + 1e-8)
    return -(share*np.log(np.maximum(share, 1e-300))).sum(1)


@pytest.mark.parametrize("n", [7, 8, 15, 16, 32, 56, 64, 112])
def test_errors_stay_far_below_what_is_allowed(n):
    batches = [*difficult(n), *(cut_patches(load_sample_image(name), n) for name in ("china.jpg", "flower.jpg"))]
    for p in batches:
        exact = by_definition(p)
        for found in (spectral_entropy(p), patches._entropies_of_tensor(torch.from_numpy(p)).numpy()):
            assert np.abs(found - exact).max() < patches._ERROR*n/4
        assert np.abs(patches._entropies(p, np.float64) - exact).max() < 1e-10


def test_batch_equals_one_by_one():
    for x, patch, canvas in pictures():
        if max(x.shape) > 700: continue
        pair = torch.from_numpy(np.stack([x, x[::-1]]))
        single = np.stack([select_patches(image, patch, canvas, 3) for image in pair.numpy()])
        for batch in (pair, pair.movedim(3, 1)): assert np.array_equal(select_patches_batch(batch, patch, canvas, 3), single)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 63, 198, 260])
def test_released_pool_has_the_released_size(count):
    "The released code takes idx[:n//4] and idx[-n//4:] of the ascending order, in which Python reads -n//4 as -⌈n/4⌉."
    x = np.random.default_rng(count).integers(0, 256, (8, 8*count, 3), dtype=np.uint8)
    p = cut_patches(x, 8)
    order = np.argsort(by_definition(p))
    released = {p[i].tobytes() for i in [*order[:count//4], *order[-count//4:]]}
    seen = cut_patches(select_patches_as_released(x, 8, 224), 8)
    assert {s.tobytes() for s in seen} == released and len(released) == -(-count//4) + count//4


def test_canvases_chosen_by_older_rules_are_not_used_again():
    for kind in ("spectral", "as_released"): assert _config_key(PreprocessConfig(kind, 32, 224)).endswith("-v2")
    for kind in ("whole", "spectrum"): assert "v2" not in _config_key(PreprocessConfig(kind, 32, 224))
