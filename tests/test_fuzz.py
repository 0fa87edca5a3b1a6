"""Seeded mutations of pictures and of saved detectors: each is used, or refused in one line, within time and memory.

Every file is used in a process of its own by scripts/corpus.py, which can be pointed at any other folder of files.
"""
import csv
import io
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load

from nsnet.storage import asset, fingerprint

REPO = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONPATH=str(REPO))
LARGE = (0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, 0x7fffffff, 0xffffffff)
HUGE, NAN, LARGE_TENSOR = 10**30, float("nan"), 400*2**20


def examine(folder, *options):
    "{name: row} of the table that scripts/corpus.py writes, and what it prints."
    with tempfile.NamedTemporaryFile(suffix=".csv") as table:
        command = [sys.executable, REPO/"scripts/corpus.py", folder, "--csv", table.name, *options]
        ran = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
        with open(table.name, newline="", encoding="utf-8") as file: rows = list(csv.DictReader(file))
    assert rows, ran.stderr
    return {Path(row["path"]).name: row for row in rows}, ran.stdout


def holes(found):
    "What was neither opened nor refused."
    bad = {name: r for name, r in found.items() if r["outcome"] not in ("opened", "refused")}
    return {name: (r["outcome"], r["reason"][:200]) for name, r in bad.items()}


def mode_of(image, mode):
    "A picture in any mode, the ones with 16 bits too."
    if mode == "I;16": return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16)*257)
    return image.convert(mode)


def pictures():
    "Small pictures of six formats in their modes and compressions: [(extension, bytes)]."
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((48, 36))
    exif = Image.Exif()
    exif[274] = 6
    plans = [("JPEG", "jpg", m, o) for m in ("RGB", "L", "CMYK") for o in (dict(exif=exif), dict(progressive=True))]
    plans += [("PNG", "png", m, {}) for m in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")]
    frames = dict(save_all=True, append_images=[image.convert("P").rotate(9)])
    plans += [("GIF", "gif", "P", {}), ("GIF", "gif", "P", frames)]
    packings = [("RGB", "raw"), ("I;16", "tiff_lzw"), ("F", "raw"), ("1", "group4"), ("CMYK", "tiff_adobe_deflate"),
                ("RGB", "jpeg"), ("RGBA", "packbits"), ("RGB", "tiff_lzw")]
    plans += [("TIFF", "tif", m, dict(compression=c)) for m, c in packings]
    plans += [("WEBP", "webp", "RGB", {}), ("WEBP", "webp", "RGBA", dict(lossless=True, exif=exif))]
    plans += [("BMP", "bmp", m, {}) for m in ("RGB", "P", "1")]
    for kind, extension, mode, options in plans:
        file = io.BytesIO()
        mode_of(image, mode).save(file, kind, **options)
        yield extension, file.getvalue()


def mutated(data, other, rng):
    "The bytes with one to three faults: flipped bits, large numbers, cuts, repeats, parts of another file."
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(min(len(data), rng.choice((32, 256, 10**6))))
        width, order, end = rng.choice((1, 2, 4)), rng.choice(("little", "big")), at + rng.randint(1, 64)
        fault = rng.randrange(7)
        if fault == 0: data[at] ^= 1 << rng.randrange(8)
        if fault == 1: data[at:at + width] = (rng.choice(LARGE) % 256**width).to_bytes(width, order)
        if fault == 2 and at > 8: del data[at:]
        if fault == 3: del data[at:end]
        if fault == 4: data[at:at] = data[at:end]*rng.randint(1, 9)
        if fault == 5: data[at:end] = other[at:end]
        if fault == 6: data[at:end] = rng.randbytes(end - at)
        data = data or bytearray(b"\0")
    return bytes(data)


def with_checksums(data):
    "A PNG whose chunks have the right checksums again, so that a fault is not refused for its checksum alone."
    out, at = data[:8], 8
    while at + 12 <= len(data):
        end = at + 8 + struct.unpack(">I", data[at:at + 4])[0]
        if end + 4 > len(data): break
        out, at = out + data[at:end] + struct.pack(">I", zlib.crc32(data[at + 4:end])), end + 4
    return out + data[at:]


def test_500_mutated_pictures(tmp_path):
    rng, sources = random.Random(11), list(pictures())
    for i in range(500):
        extension, data = sources[i % len(sources)]
        bad = data
        while bad == data:
            bad = mutated(data, rng.choice(sources)[1], rng)
            if extension == "png" and i % 3: bad = with_checksums(bad)
        (tmp_path/(f"{i:03}\nline.{extension}" if i % 50 == 0 else f"{i:03}.{extension}")).write_bytes(bad)
    found, printed = examine(tmp_path, "--seconds", "10")
    assert len(found) == 500 and not holes(found), str(holes(found))
    assert all(sum(r["outcome"] == what for r in found.values()) > 50 for what in ("opened", "refused")), printed


def taken_apart():
    "The detector that ships: its configuration and its tensors."
    data = (asset("detector")/"model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(json.loads(data[8:8 + length])["__metadata__"]["nsnet"]), load(data)


CONFIG, STATE = taken_apart()
KINDS = {np.dtype(np.float32): "F32", np.dtype(np.float64): "F64", np.dtype(np.int64): "I64"}


def packed(config=CONFIG, state=STATE, header={}, honest=True):
    "The bytes of a saved detector; an honest one names the fingerprint of its tensors, as an attacker would too."
    if isinstance(config, dict) and honest and state is not STATE: config = config | dict(weights=fingerprint_of(state))
    text = config if isinstance(config, str) else json.dumps(config)
    fields, data, at = {"__metadata__": {"nsnet": text}}, [], 0
    for name, x in state.items():
        fields[name] = dict(dtype=KINDS[x.dtype], shape=list(x.shape), data_offsets=[at, at + x.nbytes])
        data, at = [*data, x.tobytes()], at + x.nbytes
    head = json.dumps(fields | header).encode()
    return struct.pack("<Q", len(head)) + head + b"".join(data)


def fingerprint_of(state):
    "What the detector's file says of its tensors."
    import torch
    return fingerprint({name: torch.from_numpy(x.copy()) for name, x in state.items()})


def changed(path, value, config=CONFIG):
    "A copy of the configuration with one value put in at a path of keys."
    key, *rest = path
    return config | {key: changed(rest, value, config[key]) if rest else value}


def chosen(path, n):
    "Which two of the wrong values a field gets: a number NaN and the huge one, the others in turn."
    part = CONFIG
    for key in path: part = part[key]
    return (2, 3) if part is None or type(part) in (int, float) else (n % 5, (n + 2) % 5)


def wrong_fields():
    "{name: bytes} of detectors with one wrong value, in every field of the configuration."
    paths = [(part, field) for part in ("recipe", "preprocess") for field in CONFIG[part]]
    paths += [(field,) for field in CONFIG if field not in ("trained_on", "weights")]
    values = [{"a": 1}, [[1]], NAN, HUGE, -HUGE]
    cases = {(*path, i): changed(path, values[i]) for n, path in enumerate(paths) for i in chosen(path, n)}
    named = [(("recipe", "lora_rank"), v) for v in (10**9, 10**5, -1, 2.5, "many")]
    named += [(("preprocess", "canvas"), v) for v in (10**9, 0, 100, "64.5", None)]
    named += [(("recipe", "lora_targets"), v) for v in (["evil"], [], 7, ["attn"]*10**5)]
    named += [(("recipe", "lora_blocks"), v) for v in ([10**9], [-1], "a", [0.5])]
    named += [(("recipe", field), v) for field, v in (("kind", "evil"), ("projection", "global"), ("mapper", "maybe"),
              ("name", None), ("dropout", 1.5), ("patches", "../evil"), ("evil", 1), ("kind", "x"*10**6))]
    named += [(("threshold",), v) for v in (NAN, float("inf"), -float("inf"), None, [.5], "half")]
    named += [(("captioner",), v) for v in ("evil/captioner", "../captioner", "/etc", 5, None, "evil\ncaptioner")]
    named += [(("backbone",), v) for v in ("evil", "hf-hub:evil/model", "local-dir:/tmp", "evil\nmodel", "", None, 5)]
    named += [(("embed_dim",), 10**9), (("trained_on",), {"a": 1}), (("weights",), None), (("preprocess", "evil"), 1)]
    cases |= {("named", *path, i): changed(path, value) for i, (path, value) in enumerate(named)}
    cases |= {("missing", key): {k: v for k, v in CONFIG.items() if k != key} for key in CONFIG}
    return {"-".join(map(str, name)): packed(config) for name, config in cases.items()}


def wrong_texts():
    "{name: bytes} of detectors whose metadata is no configuration."
    text = json.dumps(CONFIG)
    texts = dict(empty="", list="[]", null="null", number="1", nested="["*10**5, digits="9"*10**5, cut=text[:-40],
                 infinite=text.replace("0.07", "1e999"), twice=text[:-1] + ', "threshold": NaN}')
    return {f"text-{name}": packed(text) for name, text in texts.items()}


def wrong_tensors():
    "{name: bytes} of detectors with tensors that do not fit, each with the right fingerprint."
    name = max((name for name, x in STATE.items() if len(set(x.shape)) == 2), key=lambda name: STATE[name].size)
    x, others = STATE[name], {k: v for k, v in STATE.items() if k != name}
    spoilt = x.copy()
    spoilt.flat[7] = NAN
    instead = dict(rows=x[:-1], flat=x.ravel(), turned=x.reshape(x.shape[::-1]), nan=spoilt, infinite=x/0,
                   whole=x.astype(np.int64))
    states = {what: others | {name: y} for what, y in instead.items()}
    states |= dict(missing=others, none={}, extra=STATE | dict(evil=x), line=others | {"evil\nname": x})
    shape = dict(dtype="F32", shape=[2**40, 2**40], data_offsets=[0, 4])
    cases = {f"tensors-{what}": packed(state=state) for what, state in states.items()}
    at = sum(x.nbytes for x in STATE.values())
    large = dict(dtype="F32", shape=[LARGE_TENSOR//4], data_offsets=[at, at + LARGE_TENSOR])
    cases |= {"tensors-large": packed(header=dict(evil=large))}
    return cases | {"tensors-overlap": packed(header={name: shape}), "tensors-lie": packed(header={"evil": shape})}


def wrong_bytes(rng):
    "Endlessly: (name, bytes) of a detector with faults in its header or anywhere, which may still be one."
    data = packed()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    for length in (0, 1, 2**31, 2**63, 2**64 - 1): yield f"length-{length}", struct.pack("<Q", length) + data[8:]
    for end in (0, 7, 8, 100, start, start + 1, len(data) - 1): yield f"cut-{end}", data[:end]
    for i in range(10**6):
        header = i % 2 == 1
        yield f"bytes-{i}", mutated(data[:start], data, rng) + data[start:] if header else mutated(data, data, rng)


@pytest.fixture(scope="module")
def detectors():
    "What becomes of 200 mutated detectors, which of them have to be refused, and the printed report."
    with np.errstate(all="ignore"): cases = wrong_fields() | wrong_texts() | wrong_tensors()
    refused, others = set(cases), wrong_bytes(random.Random(11))
    assert len(cases) < 190
    while len(cases) < 200: cases |= [next(others)]
    with tempfile.TemporaryDirectory() as folder:
        for name, data in cases.items():
            file = Path(folder, name, "model.safetensors")
            file.parent.mkdir()
            file.write_bytes(data)
            if name == "tensors-large": os.truncate(file, len(data) + LARGE_TENSOR)      # a hole, which takes no disk
        found, printed = examine(folder, "--detectors", "--seconds", "20")
    return found, refused, printed


def test_200_mutated_detectors(detectors):
    found, _, printed = detectors
    assert len(found) == 200 and not holes(found), str(holes(found))


def test_wrong_detectors_are_refused(detectors):
    "Where a field, a text or a tensor is wrong, not only some byte, nothing is loaded."
    found, refused, _ = detectors
    taken = sorted(name for name in refused if found[name]["outcome"] == "opened")
    assert not taken, str(taken)
    nameless = {name: r["reason"] for name, r in found.items() if r["outcome"] == "refused" and name not in r["reason"]}
    assert not nameless, str(nameless)


def test_detectors_stay_small(detectors):
    found, _, _ = detectors
    large = {name: r["megabytes"] for name, r in found.items() if int(r["megabytes"]) > 200}
    assert not large, str(large)


def test_what_the_corpus_script_notices(tmp_path):
    "None of the outcomes of a file is overlooked."
    deeds = dict(crash="os.abort()", end="os._exit(3)", hang="signal.pause()", memory="bytearray(2**30)",
                 exception="1/0", message="raise ValueError('a\\nb')", printed="os.write(2, b'warning')",
                 outside="subprocess.run(['true'])", refused="raise ValueError('no')", opened="pass")
    code = ("import os, signal, subprocess, sys; sys.path.insert(0, 'scripts'); import corpus\n"
            f"deeds = {deeds!r}\n"
            "found = corpus.examine(lambda deed: exec(deeds[deed]), ValueError, list(deeds), 1, 256, 2)\n"
            "for r in found: print(r['path'], r['outcome'])")
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=REPO, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    found = dict(line.split() for line in ran.stdout.splitlines())
    assert found == {name: name for name in deeds} | dict(end="crash"), (found, ran.stderr)
