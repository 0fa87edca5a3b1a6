"The command `nsnet` as somebody types it: results, streams, exit codes, nonsense, Ctrl-C, two processes."
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

import nsnet
from nsnet.captions import caption_store
from nsnet.cli import main
from nsnet.generators import index_mini
from nsnet.model import load_weights
from nsnet.storage import Records, asset

REPO = Path(__file__).resolve().parents[1]
WILD = REPO.parent/"shared/wild"
ENV = os.environ | dict(PYTHONPATH=os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
# accelerate starts several processes on a CPU through MPI only; told to start them for GPUs, it starts these
LAUNCH = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
          "--main_process_port", "0", "-m")


def command(*words, launch=(), **options):
    "The real command in a process of its own: exit code, stdout, stderr."
    line = [sys.executable, "-m", *launch, "nsnet.cli", *map(str, words)]
    done = subprocess.run(line, env=ENV, capture_output=True, text=True, timeout=300, **options)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "pictures/ with 8 photographs and 8 fakes and a file that is none; collection/ with real/ and fake/ of 24 each; models/."
    folder = tmp_path_factory.mktemp("cli")
    index = index_mini(folder/"mini", n_train=24, n_test=8, seen="deconv", seed=3, progress=False)
    for split, n, place in ("test", 8, lambda row: f"pictures/{'real-fake'.split('-')[row.label]}-{Path(row.path).name}"), ("train", 24, lambda row: f"collection/{('real', 'fake')[row.label]}/{Path(row.path).name}"):
        for _, rows in index[index.split.eq(split) & index.generator.isin(["real", "deconv"])].groupby("label"):
            for row in rows[:n].itertuples():
                (target := folder/place(row)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder/"mini"/row.path, target)
    (folder/"pictures/broken.png").write_text("no picture")
    (folder/"empty").mkdir()
    shutil.copytree(asset("detector"), folder/"models/damaged")
    weights = folder/"models/damaged/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    return folder


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    "The current folder, and nothing of several processes."
    monkeypatch.chdir(folder)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture
def run(capsys):
    "The command in this process: exit code, stdout, stderr."
    def run(line):
        capsys.readouterr()
        return main(line.split() if isinstance(line, str) else line), *capsys.readouterr()
    return run


VERBS = "score", "explain", "caption", "train", "study", "export", "page"


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example(verb, run):
    code, out, err = run(f"{verb} --help")
    assert code == 0 and f"example:\n  nsnet {verb} " in out and not err
    example = out[out.rindex("example:\n  nsnet ") + len("example:\n  nsnet "):].split()
    main.parser().parse_args(example)                       # the example is one that the command takes


def test_help_answers_at_once():
    heavy = "'torch', 'numpy', 'pandas', 'transformers', 'matplotlib'"
    code = f"import sys; from nsnet.cli import main; main(['--help']); print([m for m in ({heavy}) if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and all(f"    {verb} " in done.stdout for verb in VERBS) and "example:\n  nsnet score" in done.stdout

    def seconds():
        start = time.perf_counter()
        assert command("--help")[0] == 0
        return time.perf_counter() - start
    assert statistics.median(seconds() for _ in range(5)) < .5


def test_streams_of_the_real_command(folder):
    "stdout has the results and nothing else, stderr the rest, and a broken file among good ones is no failure."
    code, out, err = command("score", "pictures", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(rows) == 17
    bad = next(row for row in rows if row["path"] == "pictures/broken.png")
    assert "not an image" in bad["reason"] and bad["score"] is None
    assert all(0 <= row["score"] <= 1 and row["verdict"] in ("real", "unsure", "generated") for row in rows if row is not bad)
    assert all(line.startswith("nsnet: ") for line in err.splitlines()), err
    assert "rejected: pictures/broken.png: not an image" in err and "trained on pictures of nsnet's procedural mini world" in err and "no proof" in err


def test_closed_pipe_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "nsnet.cli", "study", "--list"], env=ENV, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_real_pictures():
    if not WILD.is_dir(): pytest.skip("the folder shared/wild with real pictures is not beside this checkout")
    start = time.perf_counter()
    code, out, err = command("score", WILD)
    assert time.perf_counter() - start < 60 and code == 0
    head, *rows = out.splitlines()
    assert head.split() == ["verdict", "probability", "path", "note"] and len(rows) > 100
    assert all(row.split()[0] in ("real", "unsure", "generated", "rejected") for row in rows)
    assert "on any other picture its answer means nothing" in err


def test_table_for_a_person(run):
    code, out, err = run("score pictures")
    head, *rows = out.splitlines()
    assert code == 0 and len(rows) == 17 and sum(row.startswith("rejected") for row in rows) == 1
    fakes, reals = ([row.startswith("generated") for row in rows if f"/{kind}-" in row] for kind in ("fake", "real"))
    assert sum(fakes) > 4 > sum(reals)                        # it can tell them apart
    column = head.index("path")
    assert all(row[column:].startswith("pictures/") for row in rows)


def test_json_agrees_with_the_library(run):
    code, out, _ = run("score pictures/real-test_00000.jpg --json --caption ball")
    row = json.loads(out)
    score = nsnet.Detector.from_pretrained("mini", device="cpu")("pictures/real-test_00000.jpg", "ball")
    assert row["score"] == pytest.approx(score.score, abs=1e-5) and row["verdict"] == score.verdict and row["caption"] == "ball" and row["caption_from"] == "given"


def test_patterns_and_a_list_on_stdin(run, monkeypatch):
    assert len(run(["score", "pictures/real-*.jpg", "pictures/real-test_00000.jpg", "--json"])[1].splitlines()) == 8
    monkeypatch.setattr("sys.stdin", StringIO("pictures/fake-test_00000.jpg\npictures/gone.jpg\n"))
    code, out, err = run("score - --json")
    assert code == 0 and len(out.splitlines()) == 2 and "rejected: pictures/gone.jpg: no such file" in err


@pytest.mark.parametrize("name", ["scores.csv", "deep/down/scores.parquet"])
def test_scores_in_a_file(name, run, tmp_path):
    code, out, _ = run(["score", "pictures", "--out", str(tmp_path/name)])
    table = pd.read_csv(tmp_path/name) if name.endswith("csv") else pd.read_parquet(tmp_path/name)
    assert code == 0 and len(table) == 17 and table.score.notna().sum() == 16
    head, row = (line.split() for line in out.splitlines())
    counts = dict(zip(head, row))
    assert counts["rejected"] == "1" and int(counts["generated"]) == table.verdict.eq("generated").sum() and counts["file"] == str(tmp_path/name)
    before = (tmp_path/name).read_bytes()
    code, out, _ = run(["score", "pictures", "--out", str(tmp_path/name), "--json"])
    assert code == 0 and json.loads(out)["rejected"] == 1 and (tmp_path/name).read_bytes() == before


def test_name_of_a_file_may_be_anything(run, folder, tmp_path):
    odd = str(tmp_path/"two\nlines, é.jpg")
    shutil.copy(folder/"pictures/real-test_00000.jpg", odd)
    code, out, err = run(["score", odd])
    assert code == 0 and len(out.splitlines()) == 2 and r"two\nlines" in out
    code, out, _ = run(["score", odd, "--json"])
    assert json.loads(out)["path"] == odd
    code, out, err = run(["score", odd[:-4] + ".png"])
    assert code == 1 and len(err.splitlines()) == 1


NONSENSE = {                                                   # line: exit code, what stderr says
    "score nowhere": (1, "nowhere: no such file or folder"),
    "score pictures/*.webp": (1, "no file that fits it"),
    "score empty": (1, "empty: no pictures in this folder"),
    "score pictures/broken.png": (1, "none of the pictures can be used"),
    "score pictures --model nobody/nothing": (1, "nobody/nothing: neither a folder nor a repository"),
    "score pictures --model models/damaged": (1, "models/damaged/model.safetensors is damaged"),
    "score pictures --model empty": (1, "empty/model.safetensors: no such file"),
    "score pictures --out scores.txt": (1, "ends in .csv or .parquet"),
    "score pictures --out empty": (1, "ends in .csv or .parquet"),
    "score pictures --out /proc/scores.csv": (1, "nothing can be written to /proc"),
    "score pictures --out pictures/broken.png/scores.csv": (1, "nothing can be written to"),
    "score pictures --device abacus": (1, "--device abacus: not on this machine"),
    "score pictures --device cuda:99": (1, "--device cuda:99: not on this machine"),
    "score pictures --caption ball": (2, "--caption: one picture, not 17"),
    "score pictures --batch-size -1": (2, "'-1': a whole number above 0"),
    "score pictures --batch-size many": (2, "'many': a whole number above 0"),
    "score pictures --prevalence 1.5": (2, "'1.5': a number above 0 and below 1"),
    "score pictures --modle mini": (2, "unrecognized arguments: --modle mini"),
    "score": (2, "required: PATH"),
    "scroe pictures": (2, "invalid choice: 'scroe'"),
    "": (2, "required: VERB"),
    "explain pictures/broken.png --out x.png": (1, "not an image that Pillow knows"),
    "explain nowhere.png --out x.png": (1, "nowhere.png: no such file"),
    "explain pictures/real-test_00000.jpg --out x.gif": (1, "ends in .png or .jpg or .pdf or .svg"),
    "explain pictures/real-test_00000.jpg": (2, "required: --out"),
    "caption --root nowhere": (1, "nowhere: no such folder"),
    "caption --root pictures": (1, "none of the known layouts"),
    "caption --root empty": (1, "no images in this folder"),
    "caption --root collection --model nobody": (1, "captioner nobody: cannot be loaded"),
    "caption --root collection --out index.parquet": (1, "ends in .csv"),
    "train --root collection --out t --recipe advnaced": (1, "unknown system 'advnaced': one of advanced"),
    "train --root collection --out t --preset ayn": (1, "unknown preset 'ayn': one of smoke"),
    "train --root collection --out t --preset folder -p epcohs 2": (1, "unknown Recipe field 'epcohs'"),
    "train --root collection --out t --preset folder -p epochs two": (1, "epochs='two': a whole number"),
    "train --root collection --out t --preset folder -p epochs": (2, "-p: expected 2 arguments"),
    "train --root collection --out /proc/t --preset folder": (1, "nothing can be written to /proc/t"),
    "train --root nowhere --out t --preset folder": (1, "nowhere: no such folder"),
    "train --out t": (2, "--preset any needs --root"),
    "train --root collection --out t --seed -1": (2, "'-1': a whole number above -1"),
    "study tabel1": (1, "unknown study 'tabel1': one of ablation"),
    "study tabel1 --help": (1, "unknown study 'tabel1'"),
    "study table1 -p sedes 7": (1, "unknown table1 field 'sedes': one of preset"),
    "study table1 -p n_train many": (1, "n_train='many': a whole number"),
    "study table1 -p out /proc/x": (1, "nothing can be written to /proc/x"),
    "study": (2, "--list shows all"),
    "export --out mini.bin": (1, ""),
    "page --port 99999": (2, "'99999': a whole number above 0 and below 65536"),
}


@pytest.mark.parametrize("line", NONSENSE)
def test_nonsense(line, run, folder):
    before = sorted(folder.rglob("*"))
    code, out, err = run(line)
    expected, words = NONSENSE[line]
    assert code == expected and words in err and (not out or "broken.png" in line) and "Traceback" not in err
    assert code == 2 or len(err.splitlines()) == 1 + err.count("rejected: "), err
    assert [p for p in sorted(folder.rglob("*")) if p not in before and "data" not in p.parts and p.name != "t"] == []


def test_empty_list_on_stdin(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", StringIO(""))
    assert run("score -") == (1, "", "nsnet: no picture: the list on stdin is empty\n")


def test_package_that_is_missing(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "nsnet.page", None)
    code, out, err = run("page")
    assert code == 1 and not out and len(err.splitlines()) == 1


def test_explain(run, tmp_path):
    code, out, err = run(["explain", "pictures/fake-test_00000.jpg", "--out", str(tmp_path/"why.png"), "--caption", "a red ball"])
    assert code == 0 and "a red ball" in out and out.splitlines()[-1] == str(tmp_path/"why.png") and "no proof" in err
    assert (tmp_path/"why.png").read_bytes().startswith(b"\x89PNG")


def test_caption(run, tmp_path):
    code, out, _ = run(["caption", "--root", "collection", "--data", str(tmp_path)])
    head, *rows = out.splitlines()
    assert code == 0 and head.split() == ["caption", "path"] and len(rows) == 48
    code, out, _ = run(["caption", "--root", "collection", "--data", str(tmp_path), "--out", str(tmp_path/"index.csv")])
    index = pd.read_csv(tmp_path/"index.csv")
    assert code == 0 and len(index) == 48 and all(f"{r.caption:31}" in row for r, row in zip(index.itertuples(), rows))
    code, out, _ = run(["caption", "--root", "collection", "--data", str(tmp_path), "--json"])
    assert [json.loads(line)["caption"] for line in out.splitlines()] == list(index.caption)


TRAIN = "train", "--root", "collection", "--recipe", "advanced", "--preset", "folder", "-p", "epochs", "1", "-p", "batch_size", "8", "-p", "dropout", "0"


@pytest.fixture(scope="module")
def trained(folder):
    "A detector trained by the real command, its captions and features, and what was said."
    return folder/"one", command(*TRAIN, "--out", "one", "--data", "kept-one", cwd=folder)


def test_train(trained, run):
    out, (code, said, err) = trained
    head, row = (line.split(None, 5) for line in said.splitlines())
    assert code == 0 and head == ["test", "seen", "n_real", "n_fake", "auroc", "accuracy, calibrated"] and row[:2] == ["fake", "yes"] and row[-1].endswith("]")
    assert all(line.startswith("nsnet: ") for line in err.splitlines()) and "nsnet: warning: validation has" in err, err
    assert {"model.safetensors", "config.json", "images.csv", "measured.csv", "history.csv"} <= {p.name for p in out.iterdir()}
    assert set(pd.read_csv(out/"images.csv").split) == {"train", "val", "test"}
    detector = nsnet.Detector.from_pretrained(out, device="cpu")
    assert (detector.recipe.name, detector.recipe.epochs, detector.recipe.batch_size) == ("advanced", 1, 8)
    assert "advanced, trained on" in run(f"score pictures --model {out}")[2]


def test_two_processes_train_as_one(trained, folder):
    code, out, err = command(*TRAIN, "--out", "two", "--data", "kept-two", launch=LAUNCH, cwd=folder)
    assert code == 0, err
    assert out == trained[1][1]
    one, two = (load_weights(folder/name/"model.safetensors")[0] for name in ("one", "two"))
    assert one.keys() == two.keys() and all(np.allclose(one[name], two[name], atol=2e-3) for name in one)


def test_two_processes_caption_as_one(folder, trained):
    code, out, err = command("caption", "--root", "collection", "--data", "kept-together", "--out", "together.csv", launch=LAUNCH, cwd=folder)
    assert code == 0 and out == "together.csv\n", err
    stores = [caption_store(folder/data, "mini") for data in ("kept-one", "kept-together")]
    parts = [Records(store.with_name(f"{store.stem}.part{rank}.jsonl")).rows for store in stores[1:] for rank in (0, 1)]
    assert all(parts) and not stores[1].exists()              # each process described some
    one, both = ({r["sha256"]: r["caption"] for r in Records(store).rows} for store in stores)
    assert one == both == dict(pd.read_csv(folder/"together.csv")[["sha256", "caption"]].itertuples(index=False))


def test_two_processes_score_as_one(folder, run, tmp_path):
    code, out, err = command("score", "pictures", "collection", "--batch-size", "8", "--out", "both.csv", launch=LAUNCH, cwd=folder)
    assert code == 0 and len(out.splitlines()) == 2 and err.count("no proof") == 1, err
    assert run(f"score pictures collection --batch-size 8 --out one.csv")[0] == 0
    one, both = pd.read_csv("one.csv"), pd.read_csv("both.csv")
    assert list(one.path) == list(both.path) and one.drop(columns="seconds").equals(both.drop(columns="seconds"))
    assert not list(folder.glob("both*part*"))


def test_several_processes_need_a_file(run, monkeypatch):
    import nsnet.cli
    together = nsnet.cli.processes()
    monkeypatch.setattr(nsnet.cli, "processes", lambda: type(together)(**vars(together) | dict(num_processes=2)))
    code, out, err = run("score pictures")
    assert code == 2 and "several processes need --out" in err and not out


def test_ctrl_c_says_what_is_kept(folder, tmp_path):
    "One line, no traceback, and the same command goes on where it stopped."
    line = [sys.executable, "-m", "nsnet.cli", "score", "mini", "--batch-size", "4", "--out", str(tmp_path/"s.csv")]
    process = subprocess.Popen(line, env=ENV, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))    # a background job's is ignored
    while process.poll() is None and not any(p.stat().st_size > 500 for p in tmp_path.iterdir()): time.sleep(.02)
    os.killpg(process.pid, signal.SIGINT)                     # as a terminal does: the workers too
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and not out and "the rows made so far are beside" in err and "Traceback" not in err, err
    assert len([line for line in err.splitlines() if line.startswith("nsnet: stopped")]) == 1
    assert main(["score", "mini", "--batch-size", "4", "--out", str(tmp_path/"s.csv")]) == 0
    assert main(["score", "mini", "--batch-size", "4", "--out", str(tmp_path/"whole.csv")]) == 0
    stopped, whole = (pd.read_csv(tmp_path/name).drop(columns="seconds") for name in ("s.csv", "whole.csv"))
    assert stopped.equals(whole)


def test_studies_are_listed_and_explained(run):
    names = {p.stem for p in (REPO/"nbs/studies").glob("*.ipynb")}
    code, out, _ = run("study --list")
    assert code == 0 and {line.split()[0] for line in out.splitlines()} == names and all(len(line.split()) > 3 for line in out.splitlines())
    code, out, _ = run("study table1 --help")
    assert code == 0 and "seeds 0" in out and "of training, comma-separated" in out and "example" not in out
    assert "example" in run("study --help")[1]


def test_study_runs(folder, tmp_path):
    "What it prints is progress; the result is the path of the executed notebook."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in ("n: int = 1 # how many\nout: str = 'out' # results", "print('n is', n)")])
    nb.cells[0].metadata["tags"] = ["parameters"]
    nb.metadata.kernelspec = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nb, tmp_path/"toy.ipynb")
    code, out, err = command("study", "toy.ipynb", "-p", "n", 7, "-p", "out", "results", cwd=tmp_path)
    assert code == 0 and out == f"{tmp_path/'results/toy.ipynb'}\n" and "n is 7" in err, err
    assert nbformat.read(tmp_path/"results/toy.ipynb", 4).cells[-1].outputs[0].text == "n is 7\n"


def test_export(run, tmp_path):
    pytest.importorskip("nsnet.export")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    code, out, err = run(["export", "--out", str(tmp_path/"mini.onnx")])
    assert code == 0 and out == f"{tmp_path/'mini.onnx'}\n", err
    code, out, err = run(["score", "pictures", "--json", "--model", str(tmp_path/"mini.onnx")])
    rows, same = (list(map(json.loads, text.splitlines())) for text in (out, run("score pictures --json")[1]))
    assert code == 0 and [row["verdict"] for row in rows] == [row["verdict"] for row in same], err


def test_page(run, monkeypatch):
    page, asked = pytest.importorskip("nsnet.page"), []
    monkeypatch.setattr(page, "launch", lambda *args, **options: asked.append((args, options)) or print("running"))
    assert run("page --port 1234 --share") == (0, "", "running\n")
    assert asked == [(("mini",), dict(host="127.0.0.1", port=1234, share=True))]
