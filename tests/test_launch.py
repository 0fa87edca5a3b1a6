"The script that 11_train shows for several cards, run as it stands by `accelerate launch`, on a processor and with a smaller preset."
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from nsnet import Detector, recipes
from nsnet.datasets import load_index, read_records, save_index, study_index

REPO = Path(__file__).resolve().parents[1]


def test_script_for_several_cards(tmp_path):
    "Two processes caption, train and score together; one process finds everything done, and the scores are its own."
    source = "\n".join(c.source for c in nbformat.read(REPO/"nbs/11_train.ipynb", 4).cells if c.cell_type == "markdown")
    script = re.search(r"```python\n(.*?)```", source, re.S)[1].replace('preset("dalle")', 'preset("smoke")').replace('PartialState()', 'PartialState(cpu=True)')
    P = recipes.preset("smoke")
    index = study_index("mini", tmp_path/"mini", 20, 15, P.seen, cache=tmp_path/"data", progress=False)
    save_index(index, tmp_path/"index.csv")
    (tmp_path/"images").symlink_to(index.attrs["root"])
    (tmp_path/"run.py").write_text(script)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]), OMP_NUM_THREADS="1")
    # accelerate starts several processes on a processor through MPI only; told to start them for cards, it starts these
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "run.py"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    parts = [read_records(tmp_path/f"scores.part{rank}.jsonl") for rank in (0, 1)]
    tested = load_index(tmp_path/"index.csv", root=tmp_path/"images").query("split == 'test'")
    assert all(parts) and len({r["key"] for part in parts for r in part}) == len(tested)
    words = {r["sha256"]: r["caption"] for rank in (0, 1) for r in read_records(tmp_path/f"captions.part{rank}.jsonl")}
    tested = tested.assign(caption=tested.sha256.map(words)).reset_index(drop=True)
    detector = Detector.from_pretrained(tmp_path/"run", device="cpu")
    scores = detector.score(tested, root=tmp_path/"images", batch_size=64)
    kept = detector.score(tested, root="/nowhere", store=tmp_path/"scores.jsonl")
    assert kept.score.tolist() == pytest.approx(scores.score.tolist(), abs=1e-5)
