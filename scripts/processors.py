"""Run the study as other processors would, and compare what goes in and what comes out with a run as this machine is.

    python scripts/processors.py [OUT] [preset=mini] [settings=AVX2,SSE4,"two threads"] [seeds=0] [NAME=VALUE ...]

Each setting tells NumPy, OpenBLAS, oneDNN, PyTorch and MKL to leave instructions out, or takes two threads, and runs
table1 in a data folder of its own. What goes in (pictures, splits, captions, canvases) has to be the same to the byte.
What comes out of training is compared image by image. OUT (reports/processors) gets processors.csv and processors.md.
"""
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

from nsnet import config, report, study
from nsnet.captions import caption
from nsnet.images import open_image
from nsnet.metrics import by_generator
from nsnet.patches import select_patches

HERE = [f for f in __cpu_dispatch__ if __cpu_features__.get(f)]                # of NumPy, beyond what it always uses
AVX512 = [f for f in HERE if "512" in f or f == "X86_V4"]
SETTINGS = {
    "as it is": dict(OMP_NUM_THREADS="1"),
    "AVX2": dict(OMP_NUM_THREADS="1", NPY_DISABLE_CPU_FEATURES=" ".join(AVX512), OPENBLAS_CORETYPE="Haswell",
                 ONEDNN_MAX_CPU_ISA="AVX2", ATEN_CPU_CAPABILITY="avx2", MKL_ENABLE_INSTRUCTIONS="AVX2"),
    "SSE4": dict(OMP_NUM_THREADS="1", NPY_DISABLE_CPU_FEATURES=" ".join(HERE), OPENBLAS_CORETYPE="Nehalem",
                 ONEDNN_MAX_CPU_ISA="SSE41", ATEN_CPU_CAPABILITY="default", MKL_ENABLE_INSTRUCTIONS="SSE4_2"),
    "two threads": dict(OMP_NUM_THREADS="2")}
FROZEN = ("linear_probe", "spectrum_probe")
INPUTS = ("pictures", "splits", "captions", "canvases")


def digest(parts):
    "A hash of a sequence of texts or bytes."
    return hashlib.sha256(b"\n".join(p if isinstance(p, bytes) else str(p).encode() for p in parts)).hexdigest()[:16]


def inputs(preset, data):
    "Hashes of all that a study of a preset trains and tests on."
    base = config.preset(preset)
    index, root = study.study_index(base, cache=data, progress=False)
    index = caption(index, root, base.captioner, progress=False)
    canvases = (select_patches(open_image(root/p), base.patch, base.canvas).tobytes() for p in index.path)
    return dict(zip(INPUTS, map(digest, (index.sha256, index.path + index.split, index.caption, canvases))))


def run(setting, folder, preset, params):
    "The inputs and the scores of the study under a setting."
    env, data = os.environ | SETTINGS[setting], folder/setting.replace(" ", "-")
    def python(*arguments):
        done = subprocess.run([sys.executable, *map(str, arguments)], env=env, capture_output=True, text=True)
        if done.returncode: sys.exit(f"{setting}: {done.stderr[-2000:]}")
        return done.stdout
    params = dict(preset=preset, data=data, out=data/"report") | params
    python("-m", "nsnet.cli", "study", "table1", *(word for name, value in params.items() for word in ("-p", name, value)))
    return json.loads(python(__file__, "--inputs", preset, data)), pd.read_csv(data/"report/scores.csv")


def auroc(scores):
    "Mean AUROC over the generators, each with all photographs, of each system and seed."
    names = list(scores.generator[scores.label.eq(1)].unique())
    def one(rows): return by_generator(rows.label, rows.generator, rows.score, (), names, np.ones((1, len(rows))))[0, 0].mean()
    return scores.groupby(["system", "seed"]).apply(one, include_groups=False)


def compare(setting, result, first):
    "One row per system: are the inputs the same, and how far do scores, decisions and the AUROC move?"
    both = result[1].merge(first[1], on=["system", "seed", "path", "label", "generator"], suffixes=("", "_first"))
    assert len(both) == len(first[1]), f"{setting}: other pictures were scored"
    same = {name: result[0][name] == first[0][name] for name in INPUTS}
    moved = (auroc(result[1]) - auroc(first[1])).groupby("system").mean()
    both["change"], both["flip"] = (both.score - both.score_first).abs(), (both.score >= .5) != (both.score_first >= .5)
    return [dict(setting=setting, system=name) | same | dict(
        largest_change=rows.change.max(), median_change=rows.change.median(), decisions_changed=rows.flip.mean(),
        auroc_change=moved[name]) for name, rows in both.groupby("system", sort=False)]


def write(table, out, command):
    "The table as CSV and as Markdown, with the spread of the AUROC between the seeds of the full study beside it."
    full = study.resolve("reports/table1-full/scores.csv")
    if full.exists(): table["auroc_sd_of_seeds"] = table.system.map(auroc(pd.read_csv(full)).groupby("system").std())
    report.write_csv(table.round(6), out/"processors.csv")
    text = f"# The study as other processors compute it\n\n`{command}`, compared with a run as the machine is; scores image by image. The pictures come from the package's archive. "
    text += "The last column is the standard deviation of the same AUROC between the seeds of table1-full.\n\n"
    report.write_text(text + report.markdown_table(table.round(5)) + "\n", out/"processors.md")


def main(arguments):
    "Run all settings, and write what was found."
    out = study.resolve(arguments.pop(0) if arguments and "=" not in arguments[0] else "reports/processors", make=True)
    params = dict(a.split("=", 1) for a in arguments)
    preset, chosen = params.pop("preset", "mini"), params.pop("settings", ",".join(list(SETTINGS)[1:])).split(",")
    params = {"seeds": "0"} | params
    with tempfile.TemporaryDirectory() as folder:
        results = {name: run(name, Path(folder), preset, params) for name in ["as it is", *chosen]}
    first = results.pop("as it is")
    table = pd.DataFrame([row for name, result in results.items() for row in compare(name, result, first)])
    write(table, out, " ".join(["python scripts/processors.py", f"preset={preset}", f"settings='{','.join(chosen)}'",
                                *(f"{k}={v}" for k, v in params.items())]))
    frozen = table[table.system.isin(FROZEN)]
    if not table[list(INPUTS)].all(axis=None): sys.exit("what goes in differs between the settings")
    if (frozen.largest_change > 1e-3).any(): sys.exit("a frozen system moved by more than 1e-3")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inputs"]: print(json.dumps(inputs(sys.argv[2], sys.argv[3])))
    else: main(sys.argv[1:])
