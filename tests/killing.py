"Work in a clean process of its own, which is waited for or killed."
import multiprocessing
import signal
import time

import psutil

SERVER = multiprocessing.get_context("forkserver")   # imports once, hands out clean processes
SERVER.set_forkserver_preload(["nsnet.captions", "nsnet.training", "nsnet.detector", "open_clip", "peft", "accelerate", "sklearn.metrics",
                               "transformers.models.blip.modeling_blip", "transformers.models.blip.processing_blip", "transformers.generation"])


def start(run, source, out):
    "Begin `run(source, out)`."
    out.mkdir(exist_ok=True)
    process = SERVER.Process(target=run, args=(source, out))
    process.start()
    return process


def finish(process):
    "Wait for the end and return the exit code."
    process.join(300)
    return process.exitcode


def alive(process):
    "Whether a process still runs."
    try: return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess: return False


def kill(process, ready):
    "Kill a process as soon as `ready()` says so; what it started ends too."
    deadline = time.time() + 300
    while not ready() and time.time() < deadline: time.sleep(0.002)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    assert finish(process) == -signal.SIGKILL
    deadline = time.time() + 30
    while any(map(alive, workers)) and time.time() < deadline: time.sleep(0.1)
    assert not any(map(alive, workers)), "worker processes stay behind"


def lines(path):
    "How many lines a file has; none while it is absent."
    return path.read_bytes().count(b"\n") if path.exists() else 0
