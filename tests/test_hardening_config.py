"Nonsense in configurations, parameters, numbers and folders: refused in one line, before anything slow, or computed right."
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import get_args, get_type_hints

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import torch

from nsnet import config, study
from nsnet.losses import alignment_loss, bce_loss, supcon_loss, supcon_loss_as_released
from nsnet.metrics import (best_threshold, bootstrap, calibrate_threshold, evaluate, evaluate_seeds, point_metrics,
                           reliability)
from nsnet.nullspace import global_projection, global_projection_as_released, project_global, project_per_sample
from nsnet.report import read_history

REPO = Path(__file__).resolve().parents[1]
RECORDS = (config.RECIPES["advanced"], config.preset("mini"), config.PreprocessConfig())
NONSENSE = (math.nan, math.inf, -math.inf, 10**30, -1, 10**5000, "1e999", "nan", "", [], [[1]], {"a": 1}, {1}, object(),
            1j, "a\nb", "x"*10**5, [0]*2000, (np.zeros(3),), True, np.float64("nan"), "٣\x00")


def refusal(function, *args, **kwargs):
    "The message of the ValueError that a call must raise: one line, not long."
    with pytest.raises(ValueError) as error: function(*args, **kwargs)
    said = str(error.value)
    assert "\n" not in said and len(said) < 700, said
    return said


def kind_of(record, name):
    "The type of a field, without None."
    annotation = get_type_hints(type(record))[name]
    return get_args(annotation)[0] if NoneType in get_args(annotation) else annotation


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_every_field_has_a_type_and_bounds(record):
    for name in asdict(record):
        kind = kind_of(record, name)
        for value in NONSENSE:
            if kind in (str, tuple[str, ...]) and value in ("1e999", "nan"): continue                   # a name like others
            if kind is bool and value is True: continue
            if name == "training" and isinstance(value, (list, str, tuple)): continue           # looked at as a recipe
            assert name in refusal(config.override, record, **{name: value}), (name, value)
            assert name in refusal(type(record), **asdict(record) | {name: value}), (name, value)


def test_every_number_has_a_range_of_its_own():
    numbers = {name for r in RECORDS for name in asdict(r)
               if kind_of(r, name) in (int, float) or kind_of(r, name) == tuple[int, ...]}
    assert numbers <= config._RANGES.keys(), numbers - config._RANGES.keys()
    assert config._RANGES["lora_rank"][1] <= 4096 >= config._RANGES["canvas"][1]


def test_saved_records():
    for record in (*config.RECIPES.values(), config.PreprocessConfig("whole", 32, 224, 7)):
        saved = json.loads(json.dumps(asdict(record)))
        assert type(record).load(saved) == record
        for name in saved: assert "evil" in refusal(type(record).load, saved | {"evil" + name: 1})
        for wrong in (None, [], "x"*10**6, [["name", "a"]], {1: 2}, {"x"*10**6: 1}): refusal(type(record).load, wrong)
    assert "lora_rank=1000000000" in refusal(config.Recipe.load, dict(name="a", lora_rank=10**9))
    assert refusal(config.Recipe.load, {}) == "the Recipe has no name"
    assert "canvas=None" in refusal(config.PreprocessConfig.load, dict(canvas=None))


def test_presets_with_nonsense_for_training():
    for training in ((("evil", 1),), (("lora_rank", 10**9),)):
        assert training[0][0] in refusal(config.recipe_for, "advanced", config.preset("mini", training=training))
    for text in ("lr", "lr=1,lr=2", "=", "lr=1e-3,,x"): refusal(lambda: config.recipe("advanced", **config.parse_fields(text)))
    for name in (None, ["advanced"], 7, "x"*10**6): refusal(config.recipe, name), refusal(config.preset, name)


WRONG = dict(n_train=(-5, 0, 10**30, 2.5, "many", True), lora_rank=(10**9, -1), lr=("nan", -1, "1e999"), epochs=(0, "two"),
             batch_size=(0, -1), quality=(1000, 0), side=(0, 10**6), seeds=("",), out=("", "a\nb", "a\0b"), data=("",),
             match_formats=("maybe", 2), bce_weight=(math.nan,), canvas=(10**9,), sedes=(7,))


def test_parameters_are_checked_before_a_kernel_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "_execute", lambda *_: pytest.fail("started"))
    for name, values in WRONG.items():
        for value in values: assert name in refusal(study.run_study, "table1", **dict(out="out") | {name: value}), (name, value)
    assert not list(tmp_path.iterdir())


def first_cells():
    "The code of table1 up to the cell that loads the backbone, without its parameters."
    cells = [c for c in nbformat.read(REPO/"nbs/studies/table1.ipynb", 4).cells if c.cell_type == "code"]
    last = next(i for i, c in enumerate(cells) if "resolve(place" in c.source)
    sources = [c.source for c in cells[:last + 1] if not c.source.startswith("!")]
    return sources[0], [compile(source, f"cell {i}", "exec") for i, source in enumerate(sources[1:])]


NONSENSE_IN_A_STUDY = (
    dict(projection="evil"), dict(null_rank=0), dict(null_rank=1000, projection="global"), dict(systems="advnced"),
    dict(seeds="0,0"), dict(seeds="0,00"), dict(seeds="-1"), dict(seeds=str(2**40)), dict(seeds="0,,1"), dict(rule="evil"),
    dict(rule="crop"), dict(quality=1000), dict(side=-1), dict(preset="evil"), dict(canvas=100), dict(patch=7),
    dict(backbone="evil"), dict(out="/dev/null"), dict(data="/dev/null/x"), dict(out="/proc/nothing"), dict(lr=math.nan),
    *(dict(fields=f) for f in (
        "contrastive=evil", "optimizer=sgd", "lora_targets=evil", "lora_targets=", "lora_blocks=99", "dropout=2", "lr=-1",
        "epochs=0", "schedule=evil", "select=evil", "warmup=7", "temperature=0", "tau_sv=nan", "energy=0", "evil=1", "lr")))


def test_nonsense_in_a_study_is_refused_in_its_first_cells(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parameters, cells = first_cells()
    for wrong in NONSENSE_IN_A_STUDY:
        names = {}
        exec(parameters, names)
        names |= dict(out="out", data="data") | wrong
        def run():
            for cell in cells: exec(cell, names)
        assert refusal(run), wrong
    names = {}
    exec(parameters, names)
    names |= dict(out="out", data="data", seeds="3, 4", fields="warmup=.5, schedule=cosine")
    for cell in cells: exec(cell, names)
    assert names["seed_list"] == [3, 4] and {p.name for p in tmp_path.iterdir()} == {"out", "data"}
    assert not list((tmp_path/"out").iterdir())


@pytest.fixture
def toy(tmp_path):
    "A study of one cell, with a parameter that says what becomes of it."
    cells = ["out: str = 'out' # results\ndo: str = 'pass' # what happens", "exec(do)"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nb.cells[0].metadata["tags"] = ["parameters"]
    nb.metadata.kernelspec = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nb, tmp_path/"toy.ipynb")
    return tmp_path/"toy.ipynb"


def test_a_folder_that_takes_no_results(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "_execute", lambda *_: pytest.fail("started"))
    (tmp_path/"file").write_text("mine")
    for out in (tmp_path/"file", tmp_path/"file/below", "/dev/null", "/proc/out"):
        assert str(out) in refusal(study.run_study, toy, out=out)
    assert (tmp_path/"file").read_text() == "mine"
    class Full:
        def __enter__(self): return self
        def __exit__(self, *_): pass
        def write(self, data): raise OSError(28, "No space left on device")
    monkeypatch.setattr(study, "TemporaryFile", lambda **_: Full())
    assert "No space left on device" in refusal(study.run_study, toy, out=tmp_path/"full")
    assert not list((tmp_path/"full").iterdir())


def test_a_disk_that_becomes_full(toy, tmp_path, monkeypatch):
    def execute(notebook, partial, *_):
        partial.write_text('{"cells": [')
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(study, "_execute", execute)
    with pytest.raises(RuntimeError, match="^No space left on device: ") as error: study.run_study(toy, out=tmp_path/"out")
    assert "\n" not in str(error.value) and not list((tmp_path/"out").iterdir())


def test_what_killed_runs_leave(toy, tmp_path):
    "A killed run leaves its unfinished notebook; the next run removes it, and not that of a run that lives."
    code = f"from nsnet.study import run_study; run_study({str(toy)!r}, {str(tmp_path/'out')!r}, False, do='import time; time.sleep(99)')"
    run = subprocess.Popen([sys.executable, "-c", code], env=os.environ | dict(PYTHONPATH=str(REPO)), start_new_session=True)
    partial, start = tmp_path/f"out/.toy.{run.pid}.ipynb", time.time()
    while not partial.exists() and time.time() < start + 40: time.sleep(.1)
    study._remove_leftovers(tmp_path/"out", "toy")
    assert partial.exists()
    os.killpg(run.pid, 9)
    run.wait()
    (tmp_path/"out/.toy.mine.ipynb").touch()
    study._remove_leftovers(tmp_path/"out", "toy")
    assert [p.name for p in (tmp_path/"out").iterdir()] == [".toy.mine.ipynb"]


def test_labels_scores_and_thresholds():
    y, score = np.array([0, 1, 0, 1]), np.array([.1, .9, .6, .4])
    for wrong in ([1, 2, 1, 2], ["0", "1", "0", "1"], ["real", "fake"]*2, [0, None, 0, 1], [0, math.nan, 0, 1], [-1, 1, -1, 1],
                  [.5, 1, 0, 1], [0, 1], [], [[0, 1], [0, 1], [0, 1]]):
        for f in (best_threshold, calibrate_threshold, evaluate, point_metrics, reliability): refusal(f, wrong, score)
    for bad in (math.nan, math.inf, -math.inf, None):
        for f in (best_threshold, calibrate_threshold, evaluate, point_metrics, reliability): refusal(f, y, [.1, bad, .6, .4])
        for f in (evaluate, point_metrics, evaluate_seeds): refusal(f, y, score, bad)
        refusal(bootstrap, y, [score]*2, [.5, bad])
    for n in (1, 3): assert f"{n} thresholds for 2 rows" in refusal(bootstrap, y, [score]*2, [.5]*n)
    refusal(evaluate_seeds, y, [score]*3, [.5, .5]), refusal(evaluate, y, score, n_boot=-1), refusal(best_threshold, [], [])
    assert best_threshold(y.astype(object), score) == best_threshold(y.astype(bool), score) == best_threshold(pd.Series(y), score)
    assert bootstrap(y, [score]*2, [.5, .5], 5).shape == (5, 7) and best_threshold([0, 1], [-7., 3.])[0] == -2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_projections_in_half_precision(dtype):
    g, tolerance = torch.Generator().manual_seed(0), {torch.float16: 2e-3, torch.bfloat16: .02}[dtype]
    u = torch.randn(32, 768, generator=g).to(dtype)
    m = torch.nn.functional.normalize(torch.randn(32, 768, generator=g))
    assert torch.equal(project_per_sample(u, torch.zeros_like(u)), u)
    for length in (1e-3, 1, 255, 257, 3e4):
        scaled = (length*m).to(dtype)
        left, exact = project_per_sample(u, scaled), project_per_sample(u.double(), scaled.double())
        assert left.dtype == dtype and (left - exact).abs().max() < tolerance, length
        along = (u.double()*scaled.double()).sum(1).abs()
        assert ((left.double()*scaled.double()).sum(1).abs() < .2*along.max()).all(), length           # it is removed
    captions = torch.randn(9, 768, generator=g).to(dtype)
    P = global_projection(captions)
    assert torch.allclose(project_global(u, P).double(), u.double() @ P, atol=4*tolerance)
    assert global_projection_as_released(captions).isfinite().all()
    refusal(global_projection_as_released, captions*math.nan), refusal(global_projection, captions, tau_sv=math.nan)


def test_projection_of_full_precision_is_what_it_was():
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        u, m = torch.randn(2, 16, 99, generator=g, dtype=dtype)
        assert torch.equal(project_per_sample(u, m), u - (u*m).sum(-1, True)/(m*m).sum(-1, True).clamp_min(1e-8)*m)


def test_losses_in_half_precision():
    g, y = torch.Generator().manual_seed(0), torch.arange(16) % 2
    f = torch.nn.functional.normalize(torch.randn(16, 64, generator=g)).half()
    m, u, logits = 300*f, (-300*f).detach(), 6e4*f[:, 0]
    for loss, *args in ((supcon_loss, y), (supcon_loss_as_released, y), (alignment_loss, u), (bce_loss, y)):
        x = {alignment_loss: m, bce_loss: logits}.get(loss, f).clone().requires_grad_()
        found, exact = loss(x, *args), loss(x.detach().double(), *(a.double() if a is u else a for a in args))
        found.backward()
        assert found.dtype == torch.float32 and math.isclose(found.detach(), exact, rel_tol=1e-4) and x.grad.isfinite().all(), loss


def test_released_loss_at_low_temperatures():
    y, g = torch.arange(16) % 2, torch.Generator().manual_seed(0)
    f = torch.nn.functional.normalize(torch.randn(16, 64, generator=g)).requires_grad_()
    def released(f, temperature):
        "As it was written."
        weight = (f @ f.T/temperature).exp()*~torch.eye(16, dtype=torch.bool)
        return -(((weight*(y[:, None] == y)).sum(1) + 1e-8)/(weight.sum(1) + 1e-8)).log().sum()/16
    for temperature in (.07, .1, .0125): assert torch.equal(supcon_loss_as_released(f, y, temperature), released(f, temperature))
    for temperature in (.0124, .01, .005, .002):
        loss = supcon_loss_as_released(f, y, temperature)
        [grad] = torch.autograd.grad(loss, f)
        assert math.isclose(loss.detach(), released(f.detach().double(), temperature), rel_tol=1e-4) and grad.isfinite().all()
    for wrong in (0, -1, math.nan, math.inf):
        for loss in (supcon_loss, supcon_loss_as_released): assert "temperature" in refusal(loss, f, y, wrong)


def test_damaged_history(tmp_path):
    good = dict(history="epoch,contrastive,bce,alignment\n0,1,2,3\n", validation="accuracy\n0.5\n")
    def write(**texts):
        for name, text in texts.items(): (tmp_path/f"{name}.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    write(**good)
    assert len(read_history(tmp_path)) == 1
    for name in good:
        for bad in ("", "a\n1\n", b"\xff\xfe\x00", good[name].replace("0", "x"), '"'):
            write(**good | {name: bad})
            assert str(tmp_path) in refusal(read_history, tmp_path), (name, bad)
    (tmp_path/"validation.csv").unlink()
    refusal(read_history, tmp_path)
