"""Which label, split and generator the images of a folder tree get, for every way of naming the folders."""
from itertools import product

import numpy as np
import pytest
from PIL import Image

from nsnet.benchmarks import index_any, pairs, recognise
from nsnet.index import LAYOUTS, Layout, index_folder, split


def build(root, *folders, files=("1.png", "2.png")):
    "A tree with different pictures in every folder."
    for i, name in enumerate(f"{folder}/{file}" for folder in folders for file in files):
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root/name)
    return root


def facts(index):
    "{(split, label, generator)} of an index."
    return set(index[["split", "label", "generator"]].itertuples(index=False, name=None))


def both(*folders, labels=("0_real", "1_fake")):
    "Each folder with its two label folders."
    return [f"{folder}/{label}" for folder in folders for label in labels]


TRAIN, VAL, TEST = ("train", "training", "Train", "TRAINING"), ("val", "valid", "validation", "Val", "VALID"), ("test", "testing", "Test")
LABEL_NAMES = (("real", "fake"), ("REAL", "FAKE"), ("0_real", "1_fake"), ("Real", "Fake"))
WRAPPED = ("", "data/", "download/archive (1)/")


@pytest.mark.parametrize("wrapping, names", [*product(WRAPPED, LABEL_NAMES)])
def test_labels_alone(tmp_path, wrapping, names):
    root = build(tmp_path, *(wrapping + name for name in names))
    assert recognise(root) == "folder"
    assert facts(index_any(root, progress=False)) == facts(index_folder(root, progress=False)) == {("", 0, "real"), ("", 1, "fake")}


@pytest.mark.parametrize("wrapping, names", [*product(WRAPPED, LABEL_NAMES)])
def test_labels_with_generators(tmp_path, wrapping, names):
    real, fake = (wrapping + name for name in names)
    root = build(tmp_path, real, f"{fake}/gan", f"{fake}/SDXL/2023/summer")
    assert recognise(root) == "folder"
    assert facts(index_any(root, progress=False)) == {("", 0, "real"), ("", 1, "gan"), ("", 1, "SDXL")}


@pytest.mark.parametrize("train, test", [*product(TRAIN, TEST)])
@pytest.mark.parametrize("wrapping, names", [*product(("", "data/"), LABEL_NAMES[:2]), ("a/b/", ("0_real", "1_fake"))])
def test_split_folders_are_never_generators(tmp_path, train, test, wrapping, names):
    root = build(tmp_path, *(f"{wrapping}{part}/{name}" for part in (train, test) for name in names))
    assert recognise(root) == "folder"
    for index in (index_any(root, progress=False), index_folder(root, progress=False)):
        assert facts(index) == {(s, *lg) for s in ("train", "test") for lg in ((0, "real"), (1, "fake"))}


def test_a_wrapping_folder_named_after_a_generator(tmp_path):
    root = build(tmp_path, *both("Midjourney/train", "Midjourney/test", labels=("real", "fake")))
    assert facts(index_any(root, progress=False)) == {(s, *lg) for s in ("train", "test") for lg in ((0, "real"), (1, "fake"))}


@pytest.mark.parametrize("val", VAL)
def test_three_parts(tmp_path, val):
    root = build(tmp_path, *(f"{part}/{name}" for part in ("train", val, "test") for name in ("real", "fake/gan")))
    assert recognise(root) == "folder"
    assert facts(index_any(root, progress=False)) == {(s, *lg) for s in ("train", "val", "test") for lg in ((0, "real"), (1, "gan"))}


@pytest.mark.parametrize("val", VAL)
def test_val_serves_as_test_and_says_so(tmp_path, val, capsys):
    root = build(tmp_path, *(f"{part}/{name}" for part in ("train", val) for name in ("real", "fake")))
    index = index_any(root, progress=False)
    assert facts(index) == {(s, *lg) for s in ("train", "test") for lg in ((0, "real"), (1, "fake"))}
    assert "val serve as test" in capsys.readouterr().out
    parts = split(index)
    assert set(parts.path[parts.split.eq("test")]) == {p for p in index.path if p.startswith(val)}


def test_split_inside_label(tmp_path):
    "real/train, fake/train and fake/<generator>/train."
    root = build(tmp_path, "real/train", "real/test", "fake/Train", "fake/gan/test", "fake/test/flow")
    assert recognise(root) == "folder"
    assert facts(index_any(root, progress=False)) == {
        ("train", 0, "real"), ("test", 0, "real"), ("train", 1, "fake"), ("test", 1, "gan"), ("test", 1, "flow")}


def test_folders_that_archives_repeat(tmp_path):
    root = build(tmp_path, "train/train/real/real", "train/train/FAKE/fake", "test/test/real", "test/Test/fake")
    assert facts(index_any(root, progress=False)) == {(s, *lg) for s in ("train", "test") for lg in ((0, "real"), (1, "fake"))}


@pytest.mark.parametrize("folders", [both("gan", "flow", labels=("real", "fake")), both("GAN", "flow"), both("x/gan", "x/flow")])
def test_generators_above_labels(tmp_path, folders):
    root = build(tmp_path, *folders)
    assert recognise(root) == "community_forensics"
    assert {g.lower() for _, _, g in facts(index_any(root, progress=False))} == {"real", "gan", "flow"}


@pytest.mark.parametrize("order", ["{part}/{generator}", "{generator}/{part}", "any/{part}/{generator}", "any/{generator}/{part}"])
@pytest.mark.parametrize("parts", [("train", "test"), ("Training", "TESTING")])
def test_generators_and_splits_above_labels(tmp_path, order, parts):
    folders = [order.format(part=p, generator=g) for p in parts for g in ("gan", "flow")]
    index = index_any(build(tmp_path, *both(*folders, labels=("real", "fake"))), progress=False)
    assert facts(index) == {(s, *lg) for s in ("train", "test") for lg in ((0, "real"), (1, "gan"), (1, "flow"))}


def test_own_label_names(tmp_path):
    root = build(tmp_path, "data/Train/Human", "data/Train/AI/gan", "data/Test/Human", "data/Test/AI")
    expected = {("train", 0, "real"), ("train", 1, "gan"), ("test", 0, "real"), ("test", 1, "fake")}
    for labels in ({"ai": 1, "human": 0}, {"AI": 1, "HUMAN": 0}):
        assert recognise(root, labels) == "folder"
        assert facts(index_any(root, labels=labels, progress=False)) == facts(index_folder(root, labels, progress=False)) == expected
    with pytest.raises(ValueError, match="0 is real, 1 is generated"): index_folder(root, {"ai": "fake"})
    with pytest.raises(ValueError, match="name of a split"): index_folder(root, {"Train": 1})


@pytest.mark.parametrize("index", [index_any, index_folder])
def test_unknown_trees_say_how(tmp_path, index):
    root = build(tmp_path, "train/nature", "train/ai", "test/nature", "test/ai")
    with pytest.raises(ValueError) as error: index(root, progress=False)
    assert "train/ai, train/nature" in str(error.value) and "labels={'ai': 0 or 1, 'nature': 0 or 1}" in str(error.value)
    assert facts(index(root, labels={"ai": 1, "nature": 0}, progress=False)) == {
        (s, *lg) for s in ("train", "test") for lg in ((0, "real"), (1, "fake"))}
    with pytest.raises(ValueError, match="labels={'cats': 0 or 1, 'dogs': 0 or 1}"): index(build(tmp_path/"b", "cats", "dogs"), progress=False)
    (tmp_path/"c").mkdir()
    with pytest.raises(ValueError, match="no images in this folder"): index(tmp_path/"c", progress=False)
    with pytest.raises(ValueError, match="no such folder"): index(tmp_path/"d", progress=False)
    with pytest.raises(ValueError, match="4 real images and no generated one"): index(build(tmp_path/"e", "real", "real/x"), layout_or_none(index), progress=False)


def layout_or_none(index): return "folder" if index is index_any else None


@pytest.mark.parametrize("folders, says", [
    (("real", "fake", "real/fake"), "real/fake can be read in two ways, as generated and as real"),
    (("train/real", "train/fake", "train/test/real"), "as test and as train"),
    (("ai/real", "ai/fake"), "as generated and as real"),
    (("real", "fake", "sdxl/real", "sdxl/fake"), r"decide with layout='\w+' or layout='\w+'"),
    (("train/real", "train/fake", "real", "fake"), "4 images are in folders of a split and 4 are in none"),
])
def test_ambiguous_trees_are_refused(tmp_path, folders, says):
    with pytest.raises(ValueError, match=says): index_any(build(tmp_path, *folders), labels={"ai": 1}, progress=False)


def test_two_layouts_that_disagree_on_the_split(tmp_path):
    "In GenImage val is the test set; elsewhere it is not."
    root, labels = build(tmp_path, *both("ADM/train", "ADM/val", "ADM/test", labels=("nature", "ai"))), {"nature": 0, "ai": 1}
    with pytest.raises(ValueError) as error: index_any(root, labels=labels, progress=False)
    assert "'genimage'" in str(error.value) and "'folder'" in str(error.value)
    index = index_any(root, "folder", labels, progress=False)
    assert set(index.split) == {"train", "val", "test"}


def test_a_layout_of_ones_own(tmp_path):
    root = build(tmp_path, "camera/2019", "made/by-gan/2020")
    index = index_any(root, Layout({"{label:camera}/{}": "", "{label:made}/by-{generator}/{}": ""}), {"camera": 0, "made": 1}, progress=False)
    assert facts(index) == {("", 0, "real"), ("", 1, "gan")} and index.attrs["layout"] == "yours"
    with pytest.raises(ValueError, match="unknown layout 'genimagee'; known are folder, dalle"): index_any(root, "genimagee")


# Every packing of the benchmarks that is in circulation: folder of its own, folders inside, {split: generators} or None: splits unused
PACKINGS = {
    "forensynths": ("CNNDetection", both("train/airplane", "val/cat", "test/progan/cat", "test/stylegan2/car", "test/biggan", "test/san"),
                    dict(train="progan", val="progan", test="progan stylegan2 biggan san")),
    "forensynths test": ("test", both("progan/cat", "biggan", "crn", "whichfaceisreal"), {"": "progan biggan crn whichfaceisreal"}),
    "forensynths class train": ("x", both("train/airplane", "train/train", "val/train", "val/dog", "test/progan/train", "test/progan/cat"),
                                dict(train="progan", val="progan", test="progan")),
    "forensynths test, class train": ("x", both("progan/cat", "progan/train", "biggan"), {"": "progan biggan"}),
    "forensynths wrapped": ("x", both("cnn/biggan", "cnn/san"), {"": "biggan san"}),
    "forensynths one": ("x", both("biggan"), {"": "biggan"}),
    "forensynths train": ("x", both("train/airplane", "train/cat", "val/dog"), dict(train="progan", test="progan")),
    "universalfakedetect": ("diffusion_datasets", ["imagenet/0_real", "laion/0_real", "guided/1_fake", "ldm_200_cfg/1_fake", "dalle/1_fake"],
                            {"": "guided ldm_200_cfg dalle"}),
    "universalfakedetect repack": ("ufd", both("guided", "ldm_100", "glide_50_27"), {"": "guided ldm_100 glide_50_27"}),
    "genimage": ("GenImage", both("ADM/imagenet_ai_0508_adm/train", "ADM/imagenet_ai_0508_adm/val", "Midjourney/imagenet_midjourney/val",
                                  labels=("nature", "ai")), dict(train="ADM", test="ADM Midjourney")),
    "genimage wrapped": ("x", both("GenImage/ADM/imagenet_ai_0508_adm/train", "GenImage/ADM/imagenet_ai_0508_adm/val", labels=("nature", "ai")),
                         dict(train="ADM", test="ADM")),
    "genimage inner": ("inner", both("imagenet_ai_0419_sdv4/val", "imagenet_glide/train", labels=("nature", "ai")),
                       dict(train="glide", test="stable_diffusion_v_1_4")),
    "genimage repack": ("repack", both("ADM", "wukong", "VQDM", "BigGAN"), {"": "ADM wukong VQDM BigGAN"}),
    "aigibench": ("AIGIBench", both("train/car", "train/sdv1.4", "val/horse", "test/ProGAN", "test/R3GAN", "test/FLUX1-dev", "test/SocialRF"),
                  dict(train="ProGAN sdv1.4", val="ProGAN", test="ProGAN R3GAN FLUX1-dev SocialRF")),
    "aigibench part": ("part", both("train/car", "train/cat", "train/sdv1.4", "test/SDXL"), dict(train="ProGAN sdv1.4", test="SDXL")),
    "aigcdetect": ("AIGC", both("test/progan/cat", "test/ADM", "test/DALLE2", "test/sd_xl", "test/Glide"), dict(test="progan ADM DALLE2 sd_xl Glide")),
    "chameleon": ("parent", both("Chameleon/test"), dict(test="chameleon")),
    "chameleon itself": ("Chameleon", both("test"), dict(test="chameleon")),
    "community_forensics": ("cf", both("sd-turbo", "my gan v1.2", labels=("real", "fake")), {"": "sd-turbo|my gan v1.2"}),
    "dalle": ("kaggle", ["real", "fakeV2/fake-v2"], {"": "dalle"}),
    "dalle wrapped": ("kaggle", ["archive/real", "archive/fakeV2/fake-v2"], {"": "dalle"}),
    "dalle mirror": ("dalle-recognition-dataset", both("train", "test", labels=("real", "fake")), dict(train="dalle", test="dalle")),
    "folder": ("plain", ["real", "fake/one", "fake/two"], {"": "one two"}),
}


@pytest.mark.parametrize("name", PACKINGS)
def test_packings_of_the_benchmarks(tmp_path, name):
    home, folders, expected = PACKINGS[name]
    root = build(tmp_path/home, *folders, files=("375_adm_64.PNG", "a.b.JPEG"))
    assert recognise(root) == name.split()[0] and name.split()[0] in LAYOUTS
    index = index_any(root, progress=False)
    assert len(index) == 2*len(folders) and not index.attrs["skipped"] and not index.attrs["rejected"]
    fakes = index[index.label.eq(1)].groupby("split").generator.agg(set).to_dict()
    assert fakes == {part: set(names.split("|" if "|" in names else " ")) for part, names in expected.items()}
    real = index.path.str.contains("real|nature|imagenet/|laion")
    assert set(index.generator[index.label.eq(0)]) == {"real"} and (index.label.eq(0) == real.where(~index.path.str.contains("fake|/ai/"), False)).all()
    for rows in pairs(index).values(): assert set(rows.label) == {0, 1}


def test_what_does_not_belong_is_reported(tmp_path):
    root = build(tmp_path/"GenImage", *both("ADM/imagenet_ai_0508_adm/val", labels=("nature", "ai")), "papers/figures")
    (root/"ADM/imagenet_ai_0508_adm/val/ai/empty.png").touch()
    index = index_folder(root, layout="genimage", progress=False)
    assert index.attrs["skipped"] == {"papers/figures": 2} and len(index) == 4
    assert index.attrs["rejected"] == [("ADM/imagenet_ai_0508_adm/val/ai/empty.png", "the file is empty")]
