"""Open every file of a folder in a process of its own, and report crashes, hangs, memory and the reasons of refusals.

    python scripts/corpus.py FOLDER [--seconds 20] [--megabytes 1024] [--workers N] [--csv FILE] [--detectors]

A file is opened, or refused by an `ImageError` of one line. Everything else is a hole and makes the exit status 1:
a signal, a hang, more memory than allowed, another exception, a message of several lines, output on the screen,
a program that is started, a connection. With --detectors the folders that hold a model.safetensors are loaded with
`Detector.from_pretrained` instead (refused: a `ValueError`), and one that loads has to score a picture. Linux only.
"""
import argparse
import csv
import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from itertools import islice
from pathlib import Path

from PIL import Image

from nsnet.images import ImageError, open_image

FIELDS = ("path", "outcome", "reason", "seconds", "megabytes")
GOOD = ("opened", "refused")
OUTSIDE = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "socket.connect",
           "socket.getaddrinfo"}


def use_image(path):
    "Open a picture."
    image = open_image(path)
    assert image.mode == "RGB" and min(image.size) > 0, f"opened as {image.mode}, {image.size}"


def use_detector(folder):
    "Load a detector and score a picture with it. What loads has to score."
    from nsnet.detector import Detector
    detector = Detector.from_pretrained(folder, device="cpu")
    try: score = detector.score([Image.radial_gradient("L")], ["a picture"], batch_size=1).score[0]
    except ValueError as error: raise RuntimeError(f"loaded, and then: {error}") from None
    assert 0 <= score <= 1, f"a score of {score}"


def pages(column):
    "Memory of this process in bytes: 0 is its address space, 1 what lies in memory."
    return int(Path("/proc/self/statm").read_text().split()[column])*resource.getpagesize()


def judge(work, refusal, path):
    "(outcome, reason) of one use."
    try: work(path)
    except Exception as error:
        said, causes = str(error), [error]
        while cause := causes[-1].__cause__ or causes[-1].__context__: causes.append(cause)
        if any(isinstance(e, MemoryError) or "allocate memory" in str(e) for e in causes): return "memory", said
        if not isinstance(error, refusal): return "exception", f"{type(error).__name__}: {said}"
        if len(said.splitlines()) != 1 or len(said) > 1000: return "message", said
        return "refused", getattr(error, "reason", said)
    return "opened", ""


def limited(work, refusal, path, seconds, megabytes, report, screen):
    "The life of a worker: use one file within the limits, write to `report` what happened, and end."
    outside = []
    sys.addaudithook(lambda event, what: outside.append(f"{event} {str(what):.80}") if event in OUTSIDE else None)
    for stream in (1, 2): os.dup2(screen, stream)
    os.write(report, f"{pages(1)}\n".encode())
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (pages(0) + megabytes*2**20, most))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)            # ends the process, in whatever library it hangs
    signal.alarm(seconds)
    try: found = judge(work, refusal, path)
    finally: resource.setrlimit(resource.RLIMIT_AS, (most, most))
    if outside: found = "outside", outside[0]
    for stream in (sys.stdout, sys.stderr): stream.flush()
    os.write(report, json.dumps(found).encode())


def start(*task):
    "Begin a worker; returns its process id, the files it writes and the time."
    report, screen = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    sys.stdout.flush()
    pid = os.fork()
    if pid: return pid, (report, screen, time.monotonic())
    try: limited(*task, report.fileno(), screen.fileno())
    except BaseException: os._exit(1)
    os._exit(0)


def verdict(path, status, usage, report, screen, begun):
    "What became of a file, when its worker has ended."
    for file in (report, screen): file.seek(0)
    base, _, found = report.read().decode().partition("\n")
    printed = screen.read().decode(errors="replace").strip()
    outcome, reason = json.loads(found) if found else ("crash", f"exit status {os.waitstatus_to_exitcode(status)}")
    if os.WIFSIGNALED(status): outcome, reason = "crash", signal.Signals(os.WTERMSIG(status)).name
    if reason == "SIGALRM": outcome = "hang"
    if printed and outcome in GOOD: outcome, reason = "printed", printed
    used = max(0, usage.ru_maxrss*1024 - int(base or 0))/2**20
    return dict(zip(FIELDS, (path, outcome, reason[:1000], round(time.monotonic() - begun, 3), round(used))))


def examine(work, refusal, paths, seconds, megabytes, workers):
    "Yield what becomes of every file, in the order in which they end."
    waiting, running = iter(paths), {}
    while True:
        for path in islice(waiting, workers - len(running)):
            pid, begun = start(work, refusal, path, seconds, megabytes)
            running[pid] = path, begun
        if not running: return
        pid, status, usage = os.wait3(0)
        path, begun = running.pop(pid)
        yield verdict(path, status, usage, *begun)


def summary(results, seconds):
    "The lines of the report."
    counts = Counter(r["outcome"] for r in results)
    yield f"{len(results)} files in {seconds:.1f} s: " + ", ".join(f"{n} {what}" for what, n in counts.most_common())
    for what, unit in (("megabytes", "MB at most above an idle worker"), ("seconds", "s for the slowest")):
        worst = max(results, key=lambda r: r[what])
        yield f"{worst[what]} {unit}: {str(worst['path'])!r}"
    alike = {}
    for r in results:
        if r["outcome"] == "refused":
            reason = re.sub(r"0x[0-9a-f]+|\d+", "#", r["reason"].replace(str(r["path"]), "…"))
            alike.setdefault(reason, []).append(r)
    for reason, found in sorted(alike.items(), key=lambda item: -len(item[1])):
        yield f"  refused {len(found)} × {reason}, e.g. {found[0]['path'].name!r}"
    for r in results:
        if r["outcome"] not in GOOD: yield f"HOLE {r['outcome']}: {str(r['path'])!r}: {r['reason'][:300]!r}"


def main(arguments=None):
    "Examine a folder as the command line says; the exit status."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=int, default=20, help="a file may take")
    parser.add_argument("--megabytes", type=int, default=1024, help="a file may take")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--csv", type=Path, help="table of all files to write")
    parser.add_argument("--detectors", action="store_true", help="load the folders that hold a model.safetensors")
    args = parser.parse_args(arguments)
    paths, work, refusal = sorted(p for p in args.folder.rglob("*") if p.is_file()), use_image, ImageError
    if args.detectors:
        paths, work, refusal = [p.parent for p in paths if p.name == "model.safetensors"], use_detector, ValueError
    if not paths: parser.error(f"{args.folder}: nothing to open here")
    if args.detectors: use_detector("mini")                  # what libraries import on first use is there for all
    else: Image.init()
    begun = time.monotonic()
    results = sorted(examine(work, refusal, paths, args.seconds, args.megabytes, args.workers), key=lambda r: r["path"])
    print(*summary(results, time.monotonic() - begun), sep="\n")
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            table = csv.DictWriter(file, FIELDS)
            table.writeheader()
            table.writerows(results)
    return int(any(r["outcome"] not in GOOD for r in results))


if __name__ == "__main__": sys.exit(main())
