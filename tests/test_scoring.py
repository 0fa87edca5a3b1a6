"Scoring from the command line: memory that does not grow, kills at any moment, and the committed figures."
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nsnet.detector import Detector
from nsnet.scoring import read_scores

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script():
    "scripts/scoring.py as a module."
    spec = importlib.util.spec_from_file_location("scoring_script", REPO/"scripts/scoring.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def detector(): return Detector.from_pretrained("mini", device="cpu")


def test_killed_at_five_moments(script, tmp_path):
    "The table is that of a run without kills, every picture once; the memory stays where it was."
    found = script.main(480, tmp_path, rounds=1)
    assert found["same_table"] and found["pictures"] == 480
    assert sorted(found["killed_at"]) == found["killed_at"] and len(set(found["killed_at"])) >= 3
    assert found["memory_most"] - found["memory_early"] < 100


def test_committed_figures():
    "What the report says of 20,000 pictures keeps what was promised."
    found = json.loads((REPO/"reports/scoring/scoring.json").read_text())
    assert found["pictures"] == 20_000 and found["same_table"] and len(found["killed_at"]) == 5
    assert found["memory_most"] - found["memory_early"] < 100
    assert found["of_slowest_stage"] >= .9


def test_names_that_are_no_text(detector, tmp_path):
    "A comma, quotes, a line break and bytes that are no UTF-8 in a file's name, and captions that look like numbers or like nothing."
    names = ["a,b.png", 'say "hi".png', "two\nlines.png", "\udcff.png"]
    for i, name in enumerate(names):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (80, 80, 3), dtype=np.uint8)).save(tmp_path/name)
    captions = ["NA", "0123", "None", "a, \"b\"\n"]
    for ending in ("csv", "parquet"):
        found = read_scores(detector.score([tmp_path/name for name in names], captions, out=tmp_path/f"s.{ending}"))
        assert found.caption.tolist() == captions and found.score.notna().all()
        known = names[:3] + ["?.png"] if ending == "parquet" else names
        assert found.path.tolist() == [str(tmp_path/name) for name in known]
        again = read_scores(detector.score([tmp_path/name for name in names], captions, out=tmp_path/f"s.{ending}"))
        if ending == "csv": assert again.equals(found)                  # seconds too: nothing was scored twice


def test_unusable_pictures_have_a_reason(detector, tmp_path):
    "A warning, and a table with the reasons; without a file an error where most cannot be used."
    for i in range(3): (tmp_path/f"{i}.jpg").write_text("nothing")
    with pytest.warns(UserWarning, match="3 of 3 images cannot be used"): detector.score(tmp_path, out=tmp_path/"none.csv")
    with pytest.raises(ValueError, match="3 of 3 images cannot be used"): detector.score(tmp_path)
    Image.new("RGB", (80, 80), "red").save(tmp_path/"3.jpg")
    with pytest.warns(UserWarning, match="3 of 4 images cannot be used"): detector.score(tmp_path, "a ring", out=tmp_path/"s.csv")
    assert read_scores(tmp_path/"none.csv").reason.ne("").all()
    assert read_scores(tmp_path/"s.csv").reason.ne("").tolist() == [True]*3 + [False]
