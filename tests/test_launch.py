"The script that 23_training shows for several GPUs, run as it stands by `accelerate launch`, on a CPU and with a smaller preset."
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from nsnet.config import preset
from nsnet.detector import Detector
from nsnet.generators import index_mini
from nsnet.index import load_index, save_index, split
from nsnet.scoring import read_scores
from nsnet.storage import Records

REPO = Path(__file__).resolve().parents[1]


def test_script_for_several_gpus(tmp_path):
    "Two processes caption, train and score together; one process finds everything done, and the scores are its own."
    notebook = nbformat.read(REPO/"nbs/23_training.ipynb", 4)
    source = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    script = re.search(r"```python\n(.*?)```", source, re.S)[1]
    script = script.replace('preset("dalle")', 'preset("smoke")').replace("PartialState()", "PartialState(cpu=True)")
    images = tmp_path/"images"
    index = split(index_mini(images, 20, 15, preset("smoke").seen, progress=False))
    save_index(index, tmp_path/"index.csv")
    (tmp_path/"run.py").write_text(script)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]), OMP_NUM_THREADS="1")
    # accelerate starts several processes on a CPU through MPI only; told to start them for GPUs, it starts these
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
               "--mixed_precision", "no", "--dynamo_backend", "no", "run.py"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    tested = load_index(tmp_path/"index.csv").query("split == 'test'")
    captions = {r["sha256"]: r["caption"] for r in Records(tmp_path/"captions.jsonl").rows}
    tested = tested.assign(caption=tested.sha256.map(captions)).reset_index(drop=True)
    kept, detector = read_scores(tmp_path/"scores.csv"), Detector.from_pretrained(tmp_path/"run", device="cpu")
    assert kept.path.tolist() == tested.path.tolist() and not list(tmp_path.glob("*unfinished*"))
    scores = detector.score(tested, root=images, batch_size=64)
    assert kept.score.tolist() == pytest.approx(scores.score.tolist(), abs=1e-5)


STUDY = """
import sys
import pandas as pd
from accelerate import PartialState
from nsnet import report
from nsnet.captions import caption
from nsnet.config import TABLE, preset, recipe_for
from nsnet.index import load_index
from nsnet.scoring import read_scores
from nsnet.training import train

me, settings, out, found = PartialState(cpu=True), preset("smoke"), sys.argv[1], []
mine = dict(rank=me.process_index, ranks=me.num_processes)
index = load_index("index.csv")
caption(index, "images", settings.captioner, f"{out}/captions.jsonl", progress=False, **mine)
me.wait_for_everyone()
index = caption(index, "images", settings.captioner, f"{out}/captions.jsonl", progress=False)
tested = index[index.split == "test"].reset_index(drop=True)
for name in TABLE.split(","):
    r = recipe_for(name, settings)
    if r.kind == "nsnet": r = recipe_for(name, settings, dropout=0.)          # what is dropped depends on the process
    detector = train(r, index, "images", settings, out=f"{out}/{name}", cache=f"{out}/cache", progress=False)
    detector.score(tested, root="images", out=f"{out}/{name}.csv", **mine)
    me.wait_for_everyone()
    if me.is_main_process: detector.score(tested, root="images", out=f"{out}/{name}.csv")
    me.wait_for_everyone()
    found.append(tested[["path", "label", "generator"]].assign(system=name, seed=0, threshold=detector.threshold,
                                                               score=read_scores(f"{out}/{name}.csv").score))
if me.is_main_process:
    scores = pd.concat(found)
    report.write_csv(scores, f"{out}/scores.csv")
    report.write_csv(report.table(scores, settings.seen.split(","), n_boot=50), f"{out}/table.csv")
"""


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    "Every system of the table, from captions to the table, by one process and by two; their folders."
    folder = tmp_path_factory.mktemp("study")
    save_index(split(index_mini(folder/"images", 30, 12, preset("smoke").seen, progress=False)), folder/"index.csv")
    (folder/"study.py").write_text(STUDY)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    launch = "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"
    for out, command in ("one", ()), ("two", ("-m", *launch)):
        done = subprocess.run([sys.executable, *command, "study.py", out], cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder/"one", folder/"two"


def test_two_processes_shared_every_stage(studies):
    "Each described some images, and what both would need was made once."
    one, two = studies
    parts = [Records(two/f"captions.part{rank}.jsonl").rows for rank in (0, 1)]
    assert all(parts) and not (two/"captions.jsonl").exists()
    stores = sorted(p.parent.name for p in one.glob("cache/*/keys.jsonl"))
    assert stores and stores == sorted(p.parent.name for p in two.glob("cache/*/keys.jsonl"))
    for name in stores:
        a, b = (sorted((out/"cache"/name/"keys.jsonl").read_text().splitlines()) for out in studies)
        assert a == b


def test_two_processes_write_the_table_of_one(studies):
    "Scores agree but for the order of sums, and no decision falls differently: the same table."
    one, two = (pd.read_csv(out/"scores.csv") for out in studies)
    pd.testing.assert_frame_equal(one, two, atol=2e-3)
    one, two = (pd.read_csv(out/"table.csv") for out in studies)
    measured = [c for c in one.columns if c.split("_")[0] in ("accuracy", "real", "fake", "average", "auroc") and not c.endswith(("low", "high"))]
    assert len(one) == len(two) > 20 and len(measured) > 4
    pd.testing.assert_frame_equal(one[["system", "test", *measured]], two[["system", "test", *measured]], atol=2e-3)
