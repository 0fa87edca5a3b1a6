"The main study as a user meets it: run twice, misspelt, on a folder of damaged files, on real pictures."
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import pytest
from PIL import Image

from nsnet.images import content_hash
from nsnet.metrics import evaluate
from nsnet.study import parameters_of
from studies import environment, run_in

REPO = Path(__file__).resolve().parents[1]
WILD = REPO.parent/"shared/wild"
FIGURES = {"spectrum", "patches", "training", "generators", "scores", "curves", "errors", "removed", "tsne", "explained"}


def study(folder, out="out", data="data", **params):
    "Run the study in a folder; seconds it took."
    start = time.perf_counter()
    run_in(folder, "table1", out, data, **params)
    return time.perf_counter() - start


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    "A folder with a finished smoke run in out/, its data in data/, and the seconds it took."
    folder = tmp_path_factory.mktemp("smoke")
    return folder, study(folder)


def same_tables(a, b):
    "Both tables are equal to the byte."
    return all((a/name).read_bytes() == (b/name).read_bytes() for name in ("table1.csv", "scores.csv", "table1.md"))


def complete(out):
    "Every file of the report is there; the scores."
    assert {"table1.csv", "table1.md", "scores.csv", "rejected.csv", "run.json", "table1.ipynb", "figures"} <= {p.name for p in out.iterdir()}
    assert FIGURES <= {p.stem for p in (out/"figures").glob("*.png")}
    assert not list(out.glob(".*")) and not list(out.glob("*.failed.ipynb"))
    return pd.read_csv(out/"scores.csv")


def test_second_run_only_reads(smoke):
    folder, _ = smoke
    study(folder, "again")
    complete(folder/"again")
    assert same_tables(folder/"out", folder/"again")
    seconds = [json.loads((folder/out/"run.json").read_text())["seconds"] for out in ("out", "again")]
    assert seconds[1]["train"] < seconds[0]["train"] / 3


def test_same_seed_from_nothing(smoke, tmp_path):
    study(tmp_path)
    assert same_tables(smoke[0]/"out", tmp_path/"out")


def test_table_follows_from_scores(smoke):
    scores, table = complete(smoke[0]/"out"), pd.read_csv(smoke[0]/"out/table1.csv")
    measured = table[table.test.ne("paper") & ~table.test.str.startswith("all ")]
    assert {"Original (paper)", "Ours (paper)", "advanced", "ns_net", "no_projection", "ns_net_as_released"} <= set(table.system)
    assert set(measured.seen) == {"yes", "no"}
    for row in measured.itertuples():
        own = scores[scores.system.eq(row.system) & (scores.label.eq(0) | scores.generator.eq(row.test))]
        found = [evaluate(one.label, one.score, n_boot=0) for _, one in own.groupby("seed")]
        for metric in ("accuracy", "real_accuracy", "fake_accuracy", "average_precision", "auroc"):
            assert np.isclose(np.mean([f[metric] for f in found]), getattr(row, metric), atol=1e-6)


def test_record_names_no_folder_of_this_machine(smoke):
    for file in (smoke[0]/"out").glob("*.*"):
        text = file.read_text()
        assert str(smoke[0]) not in text and str(REPO) not in text, file.name


def test_misspelt_parameter_is_refused(tmp_path):
    with pytest.raises(ValueError) as refusal: study(tmp_path, sedes=7)
    assert "sedes" in str(refusal.value) and "\n" not in str(refusal.value)
    assert all(name in str(refusal.value) for name in ("preset", "seeds", "null_rank", "out"))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="n_train"): study(tmp_path, n_train="many")


@pytest.mark.parametrize("name, value, said", [
    ("seeds", "0,,1", "whole numbers are expected"), ("canvas", 100, "with patches of 8, 16, 32"),
    ("n_train", -5, "n_train=-5: a whole number from 1"), ("epochs", "two", "epochs='two': a whole number from 1"),
    ("fields", "temprature=.1", "'temprature': one of"), ("sedes", 7, "unknown table1 field 'sedes': one of preset, seeds"), ("rule", "crop", "a size in pixels is needed")])
def test_plain_papermill_refuses_nonsense_before_anything_slow(tmp_path, name, value, said):
    with pytest.raises(papermill.PapermillExecutionError, match=said):
        papermill.execute_notebook(REPO/"nbs/studies/table1.ipynb", tmp_path/"out.ipynb", {name: value, "data": str(tmp_path/"data")}, progress_bar=False)
    assert not (tmp_path/"data").exists()


def test_plain_papermill(tmp_path):
    "The command of the README, with a rank of one's own for the main system."
    set_to = dict(seeds=7, projection="global", null_rank=16, systems="advanced,no_projection", fields="temperature=0.1, optimizer=adamw",
                  lora_rank=None, data="data", out="out")
    command = [sys.executable, "-m", "papermill", REPO/"nbs/studies/table1.ipynb", "out.ipynb", "--no-progress-bar"]
    for name, value in set_to.items(): command += ["-p", name, str(value)]
    subprocess.run(list(map(str, command)), cwd=tmp_path, check=True, capture_output=True, timeout=300)
    scores = pd.read_csv(tmp_path/"out/scores.csv")
    assert set(scores.seed) == {7} and set(scores.system) == {"advanced", "no_projection"}
    assert set(set_to) <= parameters_of("table1").keys()
    settings = json.loads((tmp_path/"out/run.json").read_text())["parameters"]
    assert settings["null_rank"] == 16 and settings["lora_rank"] is None and settings["seeds"] == "7"


def picture(seed, size=(96, 80)):
    "Noise on a ramp, uint8."
    rng = np.random.default_rng(seed)
    ramp = np.linspace(40, 200, size[0])[None, :, None] * rng.uniform(.5, 1, 3)
    return (ramp + rng.normal(0, 4 + 4 * (seed % 2), (size[1], size[0], 3))).clip(0, 255).astype(np.uint8)


def make_usable(folder):
    "Unusual files that can be read, half of them called real."
    real, fake, rng = folder/"real", folder/"fake", np.random.default_rng(0)
    Image.fromarray(picture(101)).convert("CMYK").save(real/"cmyk.jpg")
    Image.fromarray(rng.integers(0, 2**16, (80, 96), dtype=np.uint16)).save(fake/"sixteen.png")
    Image.fromarray(picture(102)).quantize(16).save(fake/"palette.png", transparency=3)
    frames = [Image.fromarray(picture(s)) for s in (103, 104, 105)]
    frames[0].save(real/"moving.gif", save_all=True, append_images=frames[1:], duration=50)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(106)).save(real/"rotated.jpg", exif=exif)
    Image.fromarray(picture(107)).save(fake/"two.dots.png")
    Image.fromarray(picture(108)).save(real/"UPPER.JPG")
    return ["real/cmyk.jpg", "fake/sixteen.png", "fake/palette.png", "real/moving.gif", "real/rotated.jpg", "fake/two.dots.png", "real/UPPER.JPG"]


def make_unusable(folder):
    "Files that cannot be used, and a word of the reason expected."
    (folder/"real/empty.jpg").touch()
    Image.fromarray(picture(109, (400, 300))).save(folder/"whole.jpg", quality=95)
    (folder/"fake/truncated.jpg").write_bytes((folder/"whole.jpg").read_bytes()[:5000])
    (folder/"whole.jpg").unlink()
    (folder/"real/text.jpg").write_text("this is no picture\n")
    Image.fromarray(picture(110, (5, 7))).save(folder/"fake/tiny.png")
    Image.new("1", (20000, 10000)).save(folder/"real/huge.png")
    return {"real/empty.jpg": "empty", "fake/truncated.jpg": "truncated", "real/text.jpg": "not an image", "fake/tiny.png": "5", "real/huge.png": "200 megapixels"}


def test_folder_of_damaged_files(tmp_path):
    images = tmp_path/"images"
    for i in range(48):
        file = images/("fake" if i % 2 else "real")/f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i)).save(file)
    usable, unusable = make_usable(images), make_unusable(images)
    study(tmp_path, preset="folder", root="images", systems="advanced,linear_probe", epochs=1)

    scores = complete(tmp_path/"out")
    rejected = pd.read_csv(tmp_path/"out/rejected.csv").set_index("path").reason
    assert set(rejected.index) == set(unusable)
    assert all(word in rejected[path] for path, word in unusable.items()), rejected.to_dict()
    said = "".join(f.read_text() for f in (tmp_path/"data/captions").rglob("*.jsonl"))
    assert all(content_hash(images/path) in said for path in usable)
    assert set(scores.label) == {0, 1} and scores.score.between(0, 1).all()


def test_seen_generator_that_is_not_tested(tmp_path):
    "The usual protocol: trained on one generator, tested on others. There is no row for the seen one, and none of the paper's."
    for i, part in enumerate(f"{split}/{name}/{label}" for split, name in (("train", "sdv1.4"), ("train", "car"), ("test", "R3GAN"), ("test", "SDXL"))
                             for label in ("0_real", "1_fake")):
        for j in range(12):
            file = tmp_path/"AIGIBench"/part/f"{j}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(100*i + j)).save(file)
    study(tmp_path, preset="any", root="AIGIBench", seen="sdv1.4", backbone="mini", captioner="mini", canvas=64, patch=16,
          n_train=12, n_test=8, systems="linear_probe,no_projection", epochs=1)
    scores = complete(tmp_path/"out")
    assert set(scores.generator) == {"real", "R3GAN", "SDXL"}
    table = (tmp_path/"out/table1.md").read_text()
    assert "R3GAN (unseen)" in table and "(paper)" not in table and "(seen)" not in table


def test_executed_notebook_is_small(smoke):
    assert (smoke[0]/"out/table1.ipynb").stat().st_size < 600_000


def test_real_pictures(tmp_path):
    if not WILD.is_dir(): pytest.skip("the folder shared/wild with real pictures is not beside this checkout")
    study(tmp_path, preset="folder", root=str(WILD), systems="advanced,linear_probe", n_train=12, n_test=6, epochs=1)
    scores = complete(tmp_path/"out")
    assert scores.groupby(["system", "label"]).size().eq(6).all()
    assert "never seen a real photograph" in (tmp_path/"out/table1.md").read_text()


def test_files_encoded_alike(tmp_path):
    "With a size rule every image is cut and encoded again before anything looks at it; the study says what the files still tell."
    for i in range(40):
        file = tmp_path/"images"/("fake" if i % 2 else "real")/f"{i:02d}.{'png' if i % 2 else 'jpg'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i, (120, 100) if i % 2 else (96, 80))).save(file)
    study(tmp_path, preset="folder", root="images", systems="spectrum_probe", rule="crop", side=64, quality=80)
    facts = pd.read_csv(tmp_path/"out/formats.csv").set_index("feature")
    assert facts.auroc[["format", "size", "pixels"]].eq(.5).all() and "JPEG" in facts.generated["format"] and "64 × 64" in facts.real["size"]
    used = pd.read_csv(tmp_path/"out/scores.csv").path
    assert all((tmp_path/"data/encoded/crop64-q80"/path).is_file() for path in used)
    study(tmp_path, "plain", preset="folder", root="images", systems="spectrum_probe")
    assert "format (1.00)" in (tmp_path/"plain/table1.md").read_text()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"cells": [{"source": "!ls", "metadata": {"tags": ["parameters"]}}]}'])
def test_a_file_that_is_no_study(tmp_path, text):
    (file := tmp_path/"mine.ipynb").write_text(text)
    with pytest.raises(ValueError, match="mine.ipynb is no notebook, or its parameters cell is not plain Python"):
        parameters_of(file)
