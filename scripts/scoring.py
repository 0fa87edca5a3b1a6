"""Score many pictures from the command line: memory, throughput beside that of each stage alone, and kills at five moments.

`make scoring` writes reports/scoring/ with 20,000 pictures.
"""
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import psutil

from nsnet.storage import asset


def pictures(folder: Path, n: int) -> Path:
    "A folder with n pictures: the packaged ones of the mini world, again and again under other names."
    with zipfile.ZipFile(asset("images.zip")) as archive: archive.extractall(folder/"own")
    files = sorted((folder/"own").rglob("*.jpg"))
    for i in range(n):
        link = folder/"pictures"/f"{i//1000:03}"/f"{i:06}.jpg"
        link.parent.mkdir(parents=True, exist_ok=True)
        os.link(files[i % len(files)], link)
    return folder/"pictures"


def begin(folder: Path, out: Path) -> subprocess.Popen:
    "Start `nsnet score`; its progress is not shown."
    return subprocess.Popen([sys.executable, "-m", "nsnet.cli", "score", str(folder), "--out", str(out)],
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def rows(out: Path) -> int:
    "How many rows of an unfinished table are on the disk."
    journal = out.with_name(out.name + ".unfinished.jsonl")
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def memory(process: subprocess.Popen) -> float:
    "Megabytes that a process and its workers have for themselves, shared pages counted once."
    tree = [psutil.Process(process.pid)]
    tree += tree[0].children(recursive=True)
    return sum(p.memory_full_info().pss for p in tree)/1e6


def watched(folder: Path, out: Path, n: int) -> dict:
    "Run the command; memory when 200 rows are written, and at its most, and pictures per second in between."
    process, seen = begin(folder, out), []
    while process.poll() is None:
        if (done := rows(out)) >= min(200, n//4):
            try: seen.append((time.perf_counter(), done, memory(process)))
            except psutil.NoSuchProcess: break
        time.sleep(max(.05, n/40000))
    assert process.wait() == 0
    (start, first, early), (end, last, _) = seen[0], max(seen, key=lambda s: s[1])
    return dict(pictures=n, memory_early=round(early), memory_most=round(max(m for *_, m in seen)),
                images_per_second=round((last - first)/(end - start), 1))


def stages(folder: Path, n: int, rounds: int = 3) -> dict:
    "Pictures per second of each stage alone, on the same n pictures; medians of rounds in which all take turns."
    from functools import partial

    from nsnet.captions import load_captioner
    from nsnet.detector import Detector
    from nsnet.images import Image
    from nsnet.scoring import _answer, _rows, _seen
    from nsnet.images import open_collection
    detector, captioner, table = Detector.from_pretrained("mini"), load_captioner("mini"), _rows(folder)[:n]
    look, sources = partial(_seen, config=detector.preprocess, to_caption=True), list(zip(table.source, table.caption))
    times, captions = {}, []
    for _ in range(rounds + 1):                                          # the first warms up
        start, opened = time.perf_counter(), []
        for batch, _ in open_collection(sources, look, batch_size=64, progress=False): opened += [seen for _, seen in batch]
        times.setdefault("open and cut", []).append(time.perf_counter() - start)
        start, captions = time.perf_counter(), []
        for i in range(0, n, 64): captions += captioner.generate([Image.fromarray(small) for _, small, _ in opened[i:i + 64]])
        times.setdefault("caption", []).append(time.perf_counter() - start)
        start = time.perf_counter()
        for i in range(0, n, 64): _answer(detector, np.stack([array for array, *_ in opened[i:i + 64]]), captions[i:i + 64])
        times.setdefault("embed and decide", []).append(time.perf_counter() - start)
    return {name: round(n/statistics.median(taken[1:]), 1) for name, taken in times.items()}


def killed(folder: Path, out: Path, n: int, moments: int = 5) -> list[int]:
    "Run the command to its end in spite of kills; how many rows had been written at each."
    found = []
    for k in range(1, moments + 1):
        process = begin(folder, out)
        while rows(out) < k*n//(moments + 1) and process.poll() is None: time.sleep(.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        found.append(rows(out))
    assert begin(folder, out).wait() == 0
    return found


def main(n: int, report: Path, rounds: int = 3) -> dict:
    "Everything, in one run; writes scoring.json."
    from nsnet.scoring import read_scores
    with tempfile.TemporaryDirectory() as folder:
        folder, start = Path(folder), time.perf_counter()
        images = pictures(folder, n)
        before = stages(images, min(n, 960), rounds)
        found = watched(images, folder/"whole.csv", n)
        after = stages(images, min(n, 960), rounds)
        alone = {name: round((before[name] + after[name])/2, 1) for name in before}
        at = killed(images, folder/"killed.csv", n)
        whole, again = (read_scores(folder/f"{name}.csv").drop(columns="seconds") for name in ("whole", "killed"))
        result = found | dict(stages=alone, of_slowest_stage=round(found["images_per_second"]/min(alone.values()), 3), killed_at=at,
                              same_table=bool(whole.equals(again)), threads=int(os.environ.get("OMP_NUM_THREADS", 0)),
                              cores=len(os.sched_getaffinity(0)), seconds=round(time.perf_counter() - start))
    report.mkdir(parents=True, exist_ok=True)
    (report/"scoring.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__": print(json.dumps(main(int(sys.argv[1]), Path(sys.argv[2])), indent=1))
