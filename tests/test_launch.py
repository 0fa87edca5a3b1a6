"The script that 23_training shows for several GPUs, run as it stands by `accelerate launch`, on a CPU and with a smaller preset."
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
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
