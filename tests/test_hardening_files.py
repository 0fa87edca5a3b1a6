"""Files, folders and stores that strangers made: nothing runs, nothing leaves its folder, nothing is silently wrong."""
import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw, features

from nsnet.benchmarks import index_any
from nsnet.captions import caption
from nsnet.config import PreprocessConfig
from nsnet.formats import normalise_format
from nsnet.generators import index_mini
from nsnet.images import ImageError, _look_alikes, _perceptual_hash, as_rgb, content_hash, open_image
from nsnet.index import index_folder, list_images, load_index, save_index, scan, split
from nsnet.inference import preprocess_all
from nsnet.storage import Arrays, Records

ENVIRONMENT = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).resolve().parents[1]))


def scene(seed, side=96):
    "A drawing of eight discs."
    image, rng = Image.new("RGB", (side, side), "gray"), np.random.default_rng(seed)
    for x, y, r, *color in rng.integers((0, 0, 8, 0, 0, 0), (side, side, side//3, 256, 256, 256), (8, 6)).tolist():
        ImageDraw.Draw(image).ellipse((x - r, y - r, x + r, y + r), tuple(color))
    return image


def build(root, *folders, n=4):
    "A tree with drawings in every folder."
    for i, file in enumerate(root/folder/f"{i}.png" for folder in folders for i in range(n)):
        file.parent.mkdir(parents=True, exist_ok=True)
        scene(1000 + i).save(file)
    return root


def run(code, *args):
    "A Python program of its own: (what it prints, what it writes to stderr)."
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


# Point 3: paths and deletions

def test_a_generator_name_does_not_leave_its_folder(tmp_path):
    index = index_folder(build(tmp_path/"in", "real", "fake"), progress=False)
    for name in ("../../ESCAPED", "/tmp/ESCAPED", "a/../../../ESCAPED", ""):
        with pytest.raises(ValueError, match="leads out of"):
            normalise_format(index.assign(generator=name), tmp_path/"in", tmp_path/"a/b/out", progress=False)
    assert not list(tmp_path.rglob("*ESCAPED*"))


@pytest.mark.parametrize("path", ["../x.png", "/etc/x.png"])
def test_a_saved_path_stays_below_the_root(tmp_path, path):
    index = index_folder(build(tmp_path, "real", "fake"), progress=False)
    save_index(index.assign(path=path), tmp_path/"index.csv")
    with pytest.raises(ValueError, match="leads out of"): load_index(tmp_path/"index.csv")


def test_a_damaged_file_in_a_cache_is_not_deleted(tmp_path):
    (tmp_path/"mine.safetensors").write_bytes(b"somebody else's")
    store = Arrays(tmp_path)
    store.add(["a"], np.zeros((1, 2), np.float32))
    assert (tmp_path/"mine.safetensors").exists() and Arrays(tmp_path).rows(["a"])[:].shape == (1, 2)


# Point 4: one picture, one answer

def test_memory_and_file_agree(tmp_path):
    exif = Image.Exif()
    for orientation in range(10):
        exif[0x0112] = orientation
        for kind in ("jpg", "png", "tif", "webp"):
            file = tmp_path/f"{orientation}.{kind}"
            scene(1).resize((60, 40)).save(file, exif=exif)
            found = open_image(file)
            with Image.open(file) as image: assert np.array_equal(as_rgb(image), found)
            row = scan(pd.DataFrame(dict(path=[file.name], label=0, generator="real", split="")), tmp_path, progress=False)
            assert (row.width[0], row.height[0]) == found.size == ((40, 60) if 5 <= orientation <= 8 else (60, 40))


# Point 5: splits share no picture

def test_copies_saved_again_stay_on_one_side(tmp_path):
    for i in range(24):
        folder, image = tmp_path/("real", "fake")[i % 2], scene(i)
        folder.mkdir(exist_ok=True)
        image.save(folder/f"{i}.png")
        (folder/f"{i}.b.png").write_bytes((folder/f"{i}.png").read_bytes() + b"\0")       # a trailing byte
        Image.fromarray(np.asarray(image)).save(folder/f"{i}.c.png", compress_level=1)     # equal pixels
        image.save(folder/f"{i}.d.jpg", quality=95)
        image.resize((150, 150)).save(folder/f"{i}.e.jpg", quality=85)
    index = index_folder(tmp_path, progress=False)
    for options in ({}, dict(seed=3), dict(n_train=30, n_test=10), dict(n_test=7)):
        parts = split(index, **options)
        number = parts.path.str.extract(r"/(\d+)\.")[0]
        assert parts.attrs["groups"] == 24 and parts.groupby(number).split.nunique().max() == 1
        assert set(zip(parts.label, parts.split)) == {(a, b) for a in (0, 1) for b in ("train", "val", "test")}
    picture = index.path.str.extract(r"/(\d+)\.")[0].astype(int)
    given = split(index.assign(split=["train" if n < 12 else ("train", "test")[i % 2] for i, n in enumerate(picture)]))
    assert given.groupby(given.path.str.extract(r"/(\d+)\.")[0]).split.nunique().max() == 1
    files = split(index, distance=None)
    assert files.groupby(files.path.str.extract(r"/(\d+)\.")[0]).split.nunique().max() > 1


def test_an_index_without_hashes_is_split_by_content(tmp_path):
    index = index_folder(build(tmp_path, "real", "fake", n=20), progress=False)
    save_index(index, tmp_path/"index.csv")
    assert load_index(tmp_path/"index.csv").phash.equals(index.phash)
    bare = split(index.drop(columns="phash"))
    assert bare.equals(split(index.assign(phash="")).drop(columns="phash")) and len(bare) == len(split(index))
    mixed = split(pd.concat([index, index.drop(columns="phash").assign(path="x" + index.path)], ignore_index=True))
    assert set(mixed.path) == set(bare.path)


def test_groups_are_those_of_all_pairs():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2, (150, 256), dtype=np.uint8)
    bits = np.concatenate([base, *(base[:50] ^ (rng.random((50, 256)) < share) for share in (.01, .03, .06))])
    hashes = [row.tobytes().hex() for row in np.packbits(bits, axis=1)]
    far = (bits[:, None] != bits[None]).sum(2)
    for distance in (0, 1, 12, 20):
        group = list(range(len(bits)))
        for a, b in np.argwhere(far <= distance): group = [group[a] if g == group[b] else g for g in group]
        found = _look_alikes(hashes, distance)
        assert len(set(found)) == len(set(group)) == len(set(zip(found, group)))
    assert _look_alikes(["", "", hashes[0]], 12)[0] != _look_alikes(["", ""], None)[1]
    assert _perceptual_hash(Image.new("RGB", (50, 50), "red")) == ""


# Point 6: trees

@pytest.mark.parametrize("folders, answer", [
    (["training/real", "training/fake", "testing/real", "testing/fake"], {"train", "test"}),
    (["train/real", "train/fake"], {"train"}),
    (["archive/real", "archive/fake"], {""}),
    ([f"{g}/{s}/{k}" for g in ("gan", "flow") for s in ("train", "test") for k in ("real", "fake")], {"train", "test"}),
    (["real", "fake", "train/real", "train/fake"], "8 images are in folders of a split and 8 are in none")])
def test_trees(tmp_path, folders, answer):
    build(tmp_path, *folders)
    if isinstance(answer, set):
        index = index_any(tmp_path, progress=False)
        assert set(index.split) == answer and not {"train", "test", "archive"} & set(index.generator)
        assert set(split(index).split) == {"train", "val", "test"}
    else:
        with pytest.raises(ValueError, match=answer): index_any(tmp_path, progress=False)


@pytest.mark.parametrize("folders", [["train/real", "train/fake", "test/fake"], ["train/real", "train/fake", "test/real"],
                                     ["test/real", "test/fake"]])
def test_official_test_images_are_never_trained_on(tmp_path, folders):
    index = index_any(build(tmp_path, *folders), progress=False)
    with pytest.raises(ValueError, match="of one label there are 0; .*index.assign"): split(index)
    assert set(split(index.assign(split="")).split) == {"train", "val", "test"}


def test_validation_images_train_where_there_is_a_test_set(tmp_path):
    index = index_any(build(tmp_path, "val/real", "val/fake", "test/real", "test/fake"), progress=False)
    parts = split(index)
    assert set(parts.path[parts.split.eq("test")]) == set(index.path[index.split.eq("test")])


def test_what_is_left_out_is_always_said(tmp_path, capsys):
    index_any(build(tmp_path, "train/real", "train/fake", "train/ev\nil", "extra/stuff"), progress=False)
    assert capsys.readouterr().out == "left out: 4 in extra/stuff, 4 in train/ev\\nil\n"


def test_an_unreadable_folder_is_an_error(tmp_path, monkeypatch):
    build(tmp_path, "real", "fake/a", "fake/b")
    scandir = os.scandir
    def guarded(path):
        if str(path).endswith("b"): raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(ValueError, match=r"fake/b: cannot be read \(Permission denied\)"): list_images(tmp_path)


# Point 11 as far as indexes and stores go

@pytest.mark.parametrize("wrong", [dict(label=2), dict(label="real"), dict(split="exam")])
def test_a_wrong_index_names_the_column(tmp_path, wrong):
    save_index(index_folder(build(tmp_path, "real", "fake"), progress=False).assign(**wrong), tmp_path/"index.csv")
    with pytest.raises(ValueError, match=f"index.csv: a {next(iter(wrong))} is"): load_index(tmp_path/"index.csv")


def test_records_of_a_damaged_scan_are_made_again(tmp_path):
    build(tmp_path, "real", "fake")
    first = index_folder(tmp_path, cache=tmp_path/"c.jsonl", progress=False)
    sha = first.sha256[0]
    for bad in (dict(sha256=sha), dict(sha256=sha, width="evil", height=3, phash=""), dict(a=1), dict(sha256=[1])):
        (tmp_path/"c.jsonl").unlink()
        Records(tmp_path/"c.jsonl").append([bad])
        assert index_folder(tmp_path, cache=tmp_path/"c.jsonl", progress=False).equals(first)


@pytest.mark.parametrize("row", [[[np.nan, 1]], [[1.]], [[1., 2., 3.]], [[1, 2]]])
def test_damaged_features_are_named(tmp_path, row):
    store = Arrays(tmp_path)
    store.add(["a"], np.float32([[1, 2]]))
    with pytest.raises(ValueError, match=f"{tmp_path}.* damaged .* delete"):
        store.add(["b"], np.array(row, np.float32 if np.isnan(row).any() else None))
        Arrays(tmp_path).rows(["a", "b"])[:]


# Point 12: pictures

def test_messages_are_one_line(tmp_path):
    (tmp_path/"two\nlines\x1b[31m.jpg").write_text("no picture")
    for use in (open_image, lambda file: content_hash(f"{file}/x")):
        error = pytest.raises(ImageError, use, tmp_path/"two\nlines\x1b[31m.jpg").value
        assert "two\\nlines\\x1b[31m.jpg" in str(error) and "\n" not in str(error)
    build(tmp_path, "real", "fake/a\nb")
    for file in tmp_path.rglob("*.png"): file.write_text("x")
    for use in (index_folder, index_any):
        assert "\n" not in str(pytest.raises(ValueError, use, tmp_path, progress=False).value)


def test_no_program_is_started(tmp_path):
    scene(0).save(tmp_path/"a.eps")
    eps = (tmp_path/"a.eps").read_bytes()
    def field(a, b, data): return bytes([0x1c, a, b]) + len(data).to_bytes(2, "big") + data
    iptc = (field(3, 60, b"\x01\0") + field(3, 20, b"\0\x60") + field(3, 30, b"\0\x60") + field(3, 120, b"\0\x05"))
    (tmp_path/"b.png").write_bytes(iptc + field(8, 10, eps[:30000]))
    (tmp_path/"a.png").write_bytes(eps)
    code = """
import sys
from nsnet.images import ImageError, as_rgb, open_image
from PIL import Image
def hook(event, args):
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"): print("STARTED", args)
sys.addaudithook(hook)
for file in sys.argv[1:]:
    for use in (open_image, lambda file: as_rgb(Image.open(file))):
        try: use(file)
        except ImageError as error: print(error.reason)
        except Exception as error: print(error)
"""
    out, _ = run(code, tmp_path/"a.eps", tmp_path/"a.png", tmp_path/"b.png")
    assert out.count("EPS is not opened") == 4 and "STARTED" not in out, out


def test_libtiff_is_silent(tmp_path):
    for kind in ("tiff_lzw", "tiff_adobe_deflate", "group4", "jpeg", "packbits"):
        image = scene(0).convert("1" if kind == "group4" else "RGB")
        image.save(tmp_path/"a.tif", compression=kind)
        data = bytearray((tmp_path/"a.tif").read_bytes())
        for at in range(12, 400, 7): data[at] ^= 0x55
        (tmp_path/f"{kind}.tif").write_bytes(data)
        (tmp_path/f"{kind} cut.tif").write_bytes((tmp_path/"a.tif").read_bytes()[:-300])
    code = """
import sys
from nsnet.images import ImageError, open_image
for file in sys.argv[1:]:
    try: open_image(file)
    except ImageError: print("refused")
"""
    out, screen = run(code, *sorted(tmp_path.glob("*.tif")))
    assert "refused" in out and not screen, screen


def test_100_megapixels_stay_below_1_gb(tmp_path):
    for mode, width in (("I;16", 2), ("F", 4), ("RGBA", 4)):
        file = tmp_path/f"{mode.replace(';', '')}.tif"
        Image.new(mode, (10_000, 1)).save(file)
        with Image.open(file) as image: tags = {tag: image.tag_v2[tag] for tag in (273, 279)}
        data = file.read_bytes().replace((10_000*width).to_bytes(4, "little"), (10_000*10_000*width).to_bytes(4, "little"))
        at = next(data.index(b"\x01\x01" + kind) for kind in (b"\4\0\1\0\0\0", b"\3\0\1\0\0\0") if b"\1\1" + kind in data)
        data = data[:at + 8] + (10_000).to_bytes(4, "little") + data[at + 12:]
        data = data.replace(b"\x16\x01\x03\0\x01\0\0\0\x01\0\0\0", b"\x16\x01\x03\0\x01\0\0\0\x10\x27\0\0")    # rows a strip
        file.write_bytes(data)
        os.truncate(file, tags[273][0] + 10_000*10_000*width)                                # a hole, which takes no disk
    for file in tmp_path.glob("*.tif"): assert highest(file) == ((10_000, 10_000), True), file


def highest(file):
    "The size of a picture that is opened in a process of its own, and whether that took less than 1 GB of memory."
    code = """
import sys
from nsnet.images import open_image
print(open_image(sys.argv[1]).size)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])   # ru_maxrss knows the parent
"""
    size, kilobytes = run(code, file)[0].splitlines()
    return eval(size), int(kilobytes) < 1e6


def test_decoders_that_take_more_have_a_lower_limit(tmp_path):
    "The limit is one of memory: WebP, JPEG 2000, AVIF, progressive JPEG and compressed TIFF keep more copies."
    small = Image.new("RGB", (64, 48), "red")
    small.save(tmp_path/"a.webp", lossless=True)
    data = (tmp_path/"a.webp").read_bytes()
    at = data.index(b"VP8L") + 9                          # after the signature 14 bits of width - 1, then of height - 1
    for side, ok in ((7072, False), (7000, True)):
        head = int.from_bytes(data[at:at + 4], "little") >> 28 << 28 | (side - 1) << 14 | (side - 1)
        (tmp_path/"a.webp").write_bytes(data[:at] + head.to_bytes(4, "little") + data[at + 4:])
        reason = "cannot be read" if ok else "7072x7072 is 50.01 megapixels, the limit is 50 for this kind of WEBP"
        with pytest.raises(ImageError, match=reason): open_image(tmp_path/"a.webp")
    plans = dict(jpg=("JPEG", dict(progressive=True), 12), tif=("TIFF", dict(compression="tiff_lzw"), 12),
                 png=("PNG", {}, 8), jpeg=("JPEG", {}, 8), jp2=("JPEG2000", {}, 24), avif=("AVIF", {}, 24))
    for kind, (name, options, width) in plans.items():
        if name in ("JPEG2000", "AVIF") and not features.check(dict(JPEG2000="jpg_2000", AVIF="avif")[name]): continue
        small.save(tmp_path/f"a.{kind}", name, **options)
        assert open_image(tmp_path/f"a.{kind}").size == (64, 48)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nsnet.images._MAX_PIXELS", 64*48*width//8 - 1)
            with pytest.raises(ImageError, match="the limit"): open_image(tmp_path/f"a.{kind}")
            patch.setattr("nsnet.images._MAX_PIXELS", 64*48*width//8)
            open_image(tmp_path/f"a.{kind}")


def test_the_largest_webp_stays_below_1_gb(tmp_path):
    Image.new("RGB", (7071, 7071)).save(tmp_path/"a.webp", lossless=True, quality=0, method=0)
    assert highest(tmp_path/"a.webp") == ((7071, 7071), True)


def test_a_forked_worker_opens_while_another_thread_does(tmp_path):
    "A lock that is held when a process forks would be held in the worker for ever."
    scene(0).save(tmp_path/"a.png")
    code = """
import os, sys, threading
from nsnet.images import open_image
def hammer():
    while True: open_image(sys.argv[1])
for _ in range(3): threading.Thread(target=hammer, daemon=True).start()
for _ in range(60):
    pid = os.fork()
    if not pid:
        open_image(sys.argv[1])
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
os._exit(0)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, tmp_path/"a.png"], env=ENVIRONMENT, check=True, timeout=60)


def test_grey_of_every_range(tmp_path):
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    for top, kind in ((1, np.float32), (1.02, np.float32), (255, np.float32), (65535, np.float32), (255, np.int32),
                      (65535, np.int32), (2**31 - 1, np.int32), (65535, np.uint16)):
        Image.fromarray((ramp*top).astype(kind)).save(tmp_path/"a.tif")
        found = np.asarray(open_image(tmp_path/"a.tif"))[..., 0].astype(int)
        assert found.max() == 255 and np.abs(found - ramp*255).max() <= 6, (top, kind)
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path/"nan.tif")
    with pytest.raises(ImageError, match="nan.tif: it has pixels that are NaN"): open_image(tmp_path/"nan.tif")


@pytest.mark.filterwarnings("ignore:Image was not the expected size")
def test_an_icon_cannot_hide_a_large_picture(tmp_path, monkeypatch):
    monkeypatch.setattr("nsnet.images._MAX_PIXELS", 1000)
    file = io.BytesIO()
    Image.new("RGB", (100, 100)).save(file, "PNG")
    png = file.getvalue()
    head = b"\0\0\1\0\1\0" + bytes([16, 16, 0, 0, 1, 0, 32, 0]) + len(png).to_bytes(4, "little") + (22).to_bytes(4, "little")
    (tmp_path/"a.png").write_bytes(head + png)
    with pytest.raises(ImageError, match="the limit"): open_image(tmp_path/"a.png")


def test_a_damaged_picture_of_the_mini_world_is_made_again(tmp_path):
    first = index_mini(tmp_path, 2, 1, progress=False)
    for file in (tmp_path/first.path[0], tmp_path/first.path[2]): file.write_bytes(file.read_bytes()[:99])
    (tmp_path/first.path[1]).write_bytes(b"")
    assert index_mini(tmp_path, 2, 1, progress=False).equals(first)


def test_a_damaged_encoded_picture_is_made_again(tmp_path):
    index = index_folder(build(tmp_path/"in", "real", "fake"), progress=False)
    first, root = normalise_format(index, tmp_path/"in", tmp_path/"out", progress=False)
    for path in first.path: (root/path).write_bytes((root/path).read_bytes()[:99])
    assert normalise_format(index, tmp_path/"in", tmp_path/"out", progress=False)[0].equals(first)


# Point 13: two writers, one store

def test_writers_share_a_store(tmp_path):
    code = """
import sys
from nsnet.storage import Records
store = Records(sys.argv[1])
for i in range(100): store.append([dict(writer=sys.argv[2], i=i, j=j, text="x"*200) for j in range(8)])
"""
    threads = [threading.Thread(target=run, args=(code, tmp_path/"s.jsonl", n)) for n in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    rows = Records(tmp_path/"s.jsonl").rows
    assert len(rows) == len({(r["writer"], r["i"], r["j"]) for r in rows}) == 3200


# What a new user does wrong

def test_what_is_no_index_is_refused_in_one_line(tmp_path):
    index = index_folder(build(tmp_path, "real", "fake"), progress=False)
    for use in (split, lambda x: caption(x), lambda x: normalise_format(x, tmp_path, tmp_path/"out")):
        for wrong in (str(tmp_path), tmp_path, None, ["a.png"], "a\nb"):
            said = str(pytest.raises(ValueError, use, wrong).value)
            assert "a table is expected" in said and "nsnet.index_folder" in said and "\n" not in said
    with pytest.raises(ValueError, match="no column sha256"): split(index.drop(columns="sha256"))
    with pytest.raises(ValueError, match="no images"): split(index[:0])


def test_a_wrong_root_is_named_with_the_first_missing_file(tmp_path):
    index = index_folder(build(tmp_path, "real", "fake"), progress=False)
    uses = (lambda root: caption(index, root, progress=False), lambda root: scan(index[["path", "label", "generator", "split"]], root, progress=False),
            lambda root: preprocess_all(index, root, PreprocessConfig(), progress=False),
            lambda root: normalise_format(index, root, tmp_path/"out", progress=False))
    for use in uses:
        with pytest.raises(ValueError, match=r"no such file\); the first is .*\.png, looked for in root='.*wrong'"): use(tmp_path/"wrong")
