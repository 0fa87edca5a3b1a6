"ONNX files: that they answer as the detector does, and what happens to files that are damaged, or made to do harm."
import copy
import json
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="the extra nsnet[onnx] is not installed")
for _extra in ("onnxruntime", "onnxscript"): pytest.importorskip(_extra, reason="the extra nsnet[onnx] is not installed")

import nsnet.export
import nsnet.runtime
from nsnet.clip import inference_batch_size, load_backbone, text_features
from nsnet.config import RECIPES, preprocess_config, preset, recipe_for
from nsnet.detector import Detector
from nsnet.export import export_onnx
from nsnet.generators import index_mini
from nsnet.inference import build_network, network_inputs, predict, preprocess_all, verdicts
from nsnet.model import trained_state
from nsnet.runtime import _sealed, load_detector, load_onnx
from nsnet.scenes import true_caption
from nsnet.storage import fingerprint
from nsnet.training import train

GATE = ("mini", "ns_net_highest", "linear_probe", "spectrum_probe")
LINE = 1000                # characters: longer than that is no line


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A small mini world with true captions, and its folder."
    root = tmp_path_factory.mktemp("world")
    index = index_mini(root, n_train=40, n_test=20, progress=False)
    return index.assign(caption=[true_caption(*row) for row in index[["shape", "color", "ground", "sky"]].values]), root


@pytest.fixture(scope="module")
def detectors(world):
    "The detector that ships and three that are trained in a second each, on one backbone."
    shipped, (index, root) = Detector.from_pretrained("mini", device="cpu"), world
    with pytest.warns(UserWarning, match="chance"):
        made = {name: train(recipe_for(name, preset("smoke"), epochs=6), index, root, "smoke", backbone=shipped.backbone, progress=False)
                for name in GATE[1:]}
    return dict(mini=shipped) | made


@pytest.fixture(scope="module")
def files(detectors, tmp_path_factory):
    "Their files."
    folder = tmp_path_factory.mktemp("files")
    for name, detector in detectors.items(): export_onnx(detector, folder/f"{name}.onnx")
    return {name: folder/f"{name}.onnx" for name in detectors}


def untrained(name, backbone, **changes):
    "A detector of a recipe with random weights, whose logits differ by more than rounding."
    recipe = recipe_for(name, preset("mini"), **changes)
    torch.manual_seed(0)
    net = build_network(recipe, backbone, P=torch.eye(backbone.embed_dim)*.5)
    with torch.no_grad():
        for part in net.parameters(): part += torch.randn_like(part)*.02*part.requires_grad
        getattr(net, "classifier", net).weight.normal_(0, 3 if recipe.kind == "nsnet" else .3)
    return Detector(recipe, preprocess_config(recipe, preset("mini")), backbone, net)


def seen(detector, world):
    "What the network of a detector, and a graph, get to see of all test images; their captions' embeddings."
    index, root = world
    index = index[index.split == "test"]
    arrays, *_ = preprocess_all(index, root, detector.preprocess, progress=False)
    x = network_inputs(arrays, None, detector.recipe, detector.preprocess, detector.backbone, progress=False)
    return x, arrays[:], text_features(detector.backbone, list(index.caption), progress=False)


def refusal(function, *args, **options):
    "The one line that a call is refused with."
    with pytest.raises(ValueError) as error: function(*args, **options)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < LINE
    return str(error.value)


@pytest.mark.parametrize("name", GATE)
def test_the_gate(name, detectors, files, world):
    "Logits within 1e-4 at batches 1, 2 and 7, and the same decisions, on every test image."
    detector, loaded = detectors[name], load_onnx(files[name])
    x, arrays, v = seen(detector, world)
    known = predict(detector.net, x, v)
    assert known.logits.std() > .1, "logits that hardly differ prove nothing"
    for batch in (1, 2, 7):
        found = predict(loaded.net, arrays, v, batch)
        assert (found.logits - known.logits).abs().max() <= 1e-4
        for a, b in zip(found, known):
            if name == "spectrum_probe" and a is not b: continue
            assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-4))
        scores = [out.logits.double().sigmoid().numpy() for out in (found, known)]
        assert ((scores[0] >= detector.threshold) == (scores[1] >= detector.threshold)).all()
        assert (verdicts(scores[0], loaded.unsure) == verdicts(scores[1], detector.unsure)).all()
    facts = ("recipe", "preprocess", "threshold", "unsure", "captioner", "trained_on", "needs_captions")
    assert all(getattr(loaded, fact) == getattr(detector, fact) for fact in facts)


@pytest.fixture(scope="module")
def shallow(detectors):
    "The small CLIP with one block in its image tower: exporting takes a second a block."
    clip = detectors["mini"].backbone
    model = copy.deepcopy(clip.model)
    model.visual.transformer.resblocks = model.visual.transformer.resblocks[:1]
    return replace(clip, model=model)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_becomes_a_file(name, shallow, tmp_path):
    detector = untrained(name, shallow)
    found = export_onnx(detector, tmp_path/"a.onnx")
    assert sorted(found) == [1, 2, 7] and max(found.values()) <= 1e-4
    assert load_onnx(tmp_path/"a.onnx", backbone=shallow).recipe == detector.recipe


def test_half_precision(detectors, files, world, tmp_path):
    "Two thirds of the size, as mapper and head stay in float32; the same decisions."
    detector, file = detectors["mini"], tmp_path/"a.onnx"
    assert 1e-5 < max(export_onnx(detector, file, half=True).values()) < .05 and file.stat().st_size < .7*files["mini"].stat().st_size
    x, arrays, v = seen(detector, world)
    a, b = (predict(net, part, v).logits.double().sigmoid().numpy() for net, part in ((detector.net, x), (load_onnx(file).net, arrays)))
    assert (verdicts(a, detector.unsure) == verdicts(b, detector.unsure)).all() and not (a == b).all()


def test_the_detector_stays_as_it_is_and_exports_are_equal(detectors, files, tmp_path):
    detector = detectors["mini"]
    before = fingerprint(trained_state(detector.net)), [m.__class__ for m in detector.net.modules()]
    export_onnx(detector, tmp_path/"a.onnx")
    assert before == (fingerprint(trained_state(detector.net)), [m.__class__ for m in detector.net.modules()])
    assert (tmp_path/"a.onnx").read_bytes() == files["mini"].read_bytes()
    assert not [f for f in tmp_path.iterdir() if f.name != "a.onnx"]


def test_nothing_of_the_machine_is_in_the_file(files):
    for file in files.values():
        data = file.read_bytes()
        assert b".py" not in data and str(nsnet.export.__file__).rpartition("/")[0].encode() not in data


def test_a_worse_graph_gets_no_file(detectors, tmp_path):
    (tmp_path/"a.onnx").write_text("what was there")
    def other(detector, half):
        changed = copy.copy(detector)
        changed.net = copy.deepcopy(detector.net)
        changed.net.bias += .01
        return exported(changed, half)
    exported = nsnet.export._exported
    with patch.object(nsnet.export, "_exported", other):
        assert "differ by 0.01" in refusal(export_onnx, detectors["spectrum_probe"], tmp_path/"a.onnx")
    assert [f.read_text() for f in tmp_path.iterdir()] == ["what was there"]


def test_what_cannot_be_exported_is_said(detectors, files, tmp_path):
    assert "ends in .onnx" in refusal(export_onnx, detectors["mini"], tmp_path/"a.pt")
    assert "copy the file" in refusal(export_onnx, load_onnx(files["linear_probe"]), tmp_path/"a.onnx")
    several = untrained("advanced", detectors["mini"].backbone, directions=2)
    assert "directions=2" in refusal(export_onnx, several, tmp_path/"a.onnx")
    with patch.object(nsnet.export, "_MOST_BYTES", 10**6):
        assert "pass half=True" in refusal(export_onnx, detectors["mini"], tmp_path/"a.onnx")
    for name in ("onnx", "onnxscript", "onnxruntime"):
        with patch.dict("sys.modules", {name: None}):
            assert refusal(export_onnx, detectors["mini"], tmp_path/"a.onnx").endswith("pip install 'nsnet[onnx]'")
    assert not list(tmp_path.iterdir())


def test_a_loaded_detector_does_what_a_detector_does(detectors, files, world, tmp_path):
    "Scores of pictures and of a file of scores, embeddings, an explanation; what it cannot do it says."
    index, root = world
    few = index[index.split == "test"].head(9)
    detector, loaded = detectors["mini"], load_onnx(files["mini"], backbone=detectors["mini"].backbone)
    known, found = (d.score(few, root=root) for d in (detector, loaded))
    assert np.allclose(known.score, found.score, atol=2e-5) and known.verdict.equals(found.verdict)
    assert loaded.score(few, root=root, out=tmp_path/"scores.csv").exists()
    assert loaded.embed(root/few.path.iloc[0], ["a ring"]).m.shape == (1, 128)
    assert loaded.explain(root/few.path.iloc[0], "a ring").axes
    assert loaded(root/few.path.iloc[0]).caption_from == "captioner"
    assert "no weights to save" in refusal(loaded.save_pretrained, tmp_path/"saved")
    assert "is a probe" in refusal(load_onnx(files["linear_probe"]).embed, root/few.path.iloc[0])
    with ThreadPoolExecutor(4) as threads: assert len(set(threads.map(lambda _: loaded(root/few.path.iloc[1], "a ring").score, range(8)))) == 1
    assert copy.deepcopy(loaded.net).session is loaded.net.session


def test_fingerprints_are_stable_and_depend_on_the_file(files, detectors):
    found = {name: load_onnx(file).fingerprint() for name, file in files.items()}
    assert found == {name: load_detector(str(file)).fingerprint() for name, file in files.items()}
    assert len(set(found.values()) | {d.fingerprint() for d in detectors.values()}) == 2*len(files)


def test_clip_is_loaded_only_for_captions(files):
    with patch.object(nsnet.runtime, "load_backbone", side_effect=ValueError("loaded")):
        for name in GATE[1:]: assert load_onnx(files[name]).backbone.name == "mini"
        assert "loaded" in refusal(load_onnx, files["mini"])
    other = replace(load_backbone("mini", "cpu"), weights="0"*16)
    assert "trained on mini" in refusal(load_onnx, files["mini"], backbone=other)
    clip = load_onnx(files["mini"], backbone=load_backbone("mini", "cpu")).backbone
    assert clip.model.visual is None and load_backbone("mini", "cpu").model.visual is not None


def test_a_large_graph_is_asked_little_at_a_time(files):
    "As a large network is: on a CPU one picture must not cost as much as sixty-four."
    net = load_onnx(files["linear_probe"]).net
    assert 10**5 < net.n_weights < 10**7 and inference_batch_size(net) == 64
    for net.n_weights, rows in ((15*10**7, 8), (4*10**8, 2)): assert inference_batch_size(net) == rows   # B/32, L/14


def test_gpu_without_the_runtime_for_it(files):
    import onnxruntime
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers(): pytest.skip("this runtime has a GPU")
    assert "onnxruntime-gpu" in refusal(load_onnx, files["linear_probe"], device="cuda")


# ---- damaged files, and files that were made to do harm ----

def changed(file, target, change=lambda model: None, about=lambda about: None, seal=True):
    "A copy of a file with its graph or its metadata changed, sealed again."
    model = onnx.load(file)
    said = json.loads(model.metadata_props[0].value)
    about(said)
    model.metadata_props[0].value = json.dumps(said)
    change(model)
    data = model.SerializeToString(deterministic=True)
    target.write_bytes(_sealed(data) if seal else data)
    return target


def test_changing_nothing_is_no_damage(files, tmp_path):
    assert load_onnx(changed(files["linear_probe"], tmp_path/"a.onnx")).fingerprint() == load_onnx(files["linear_probe"]).fingerprint()


@pytest.mark.parametrize("name", ("mini", "spectrum_probe"))
def test_damaged_bytes(name, files, tmp_path):
    "Cut at any place, any bit flipped, bytes added."
    data, bad, places = files[name].read_bytes(), tmp_path/"a.onnx", np.random.default_rng(0)
    for keep in (0, 1, 17, len(data)//3, len(data)//2, len(data) - 4000, len(data) - 1):
        bad.write_bytes(data[:max(keep, 0)])
        assert str(bad) in refusal(load_onnx, bad)
    for place in [0, *places.integers(0, len(data), 25), *range(len(data) - 2000, len(data), 97)]:
        broken = bytearray(data)
        broken[place] ^= 1 << int(places.integers(8))
        bad.write_bytes(broken)
        assert str(bad) in refusal(load_onnx, bad)
    bad.write_bytes(data + b"\0\0")
    refusal(load_onnx, bad)


class Evil:
    def __reduce__(self): return exec, ("import pathlib; pathlib.Path('RAN').touch()",)


def test_other_files_with_the_name(files, tmp_path, monkeypatch):
    "A pickle, an archive, a text, a folder, nothing, another model: one line each, and nothing runs."
    monkeypatch.chdir(tmp_path)
    bad = tmp_path/"a.onnx"
    bad.write_bytes(pickle.dumps(Evil()))
    assert "not an ONNX file" in refusal(load_detector, bad)
    torch.save(dict(a=torch.ones(3)), bad)
    assert "not an ONNX file" in refusal(load_detector, bad)
    with zipfile.ZipFile(bad, "w") as archive: archive.writestr("model.onnx", files["linear_probe"].read_bytes())
    assert "not an ONNX file" in refusal(load_detector, bad)
    bad.write_text("just text")
    assert "not an ONNX file" in refusal(load_detector, bad)
    assert "no such file" in refusal(load_detector, tmp_path/"none.onnx")
    (tmp_path/"folder.onnx").mkdir()
    assert "no such file" in refusal(load_detector, tmp_path/"folder.onnx")
    model = onnx.load(files["linear_probe"])
    del model.metadata_props[:]
    bad.write_bytes(model.SerializeToString())
    assert "not exported by nsnet" in refusal(load_detector, bad)
    assert not (tmp_path/"RAN").exists()


def put(*path, value):
    "A change of the metadata."
    def change(about):
        for name in path[:-1]: about = about[name]
        about[path[-1]] = value
    return change


METADATA = {
    "newer format": (put("format", value=99), "newer nsnet"),
    "newer detector": (put("detector", "format", value=99), "newer nsnet"),
    "format is text": (put("format", value="x"), "format"),
    "no threshold": (lambda about: about["detector"].pop("threshold"), "threshold"),
    "no detector": (lambda about: about.pop("detector"), "detector"),
    "detector is a list": (put("detector", value=[1]), "no table"),
    "unknown field": (put("more", value=1), "more"),
    "threshold too large": (put("detector", "threshold", value=7), "threshold=7"),
    "threshold is text": (put("detector", "threshold", value="high"), "threshold"),
    "threshold is NaN": (put("detector", "threshold", value=float("nan")), "threshold"),
    "band the wrong way": (put("detector", "unsure", value=[.9, .1]), "unsure"),
    "unknown recipe field": (put("detector", "recipe", "speed", value=1), "speed"),
    "other recipe": (put("detector", "recipe", "projection", value="none"), "inputs"),
    "other kind": (put("detector", "recipe", "kind", value="spectrum_probe"), "does not see"),
    "no mapper": (put("detector", "recipe", "mapper", value=False), "outputs"),
    "other canvas": (put("detector", "preprocess", "canvas", value=128), "inputs"),
    "patches that do not fill": (put("detector", "preprocess", "patch", value=24), "do not fill"),
    "spectrum": (put("detector", "preprocess", "kind", value="spectrum"), "does not see"),
    "other width": (put("detector", "embed_dim", value=256), "256"),
    "other opset": (put("opset", value=20), "opset"),
    "precision": (put("precision", value="int8"), "precision"),
    "hash is missing": (lambda about: about.pop("sha256"), "sha256"),
    "captioner": (put("detector", "captioner", value="evil/model"), "trust=True"),
    "backbone": (put("detector", "backbone", value="hf-hub:evil/model"), "trust=True"),
    "unknown backbone": (put("detector", "backbone", value="ViT-Z/none"), "unknown backbone"),
    "other weights": (put("detector", "backbone_weights", value="0"*16), "trained on"),
}


@pytest.mark.parametrize("what", METADATA)
def test_metadata_that_contradict(what, files, tmp_path):
    about, said = METADATA[what]
    bad = changed(files["mini"], tmp_path/"a.onnx", about=about, seal=what != "hash is missing")
    assert said in (line := refusal(load_onnx, bad)) and str(bad) in line


def test_metadata_that_are_no_table(files, tmp_path):
    for text in ("[1, 2]", "null", "{", "["*100_000, "[1" + "0"*5000 + "]"):
        model = onnx.load(files["spectrum_probe"])
        model.metadata_props[0].value = text
        (tmp_path/"a.onnx").write_bytes(model.SerializeToString())
        refusal(load_onnx, tmp_path/"a.onnx")


def test_what_is_not_loaded_needs_no_trust(files, tmp_path):
    "A backbone that nobody knows is harmless where none is loaded."
    bad = changed(files["linear_probe"], tmp_path/"a.onnx", about=put("detector", "backbone", value="hf-hub:evil/model"))
    with patch.object(nsnet.runtime, "load_backbone", side_effect=AssertionError): assert load_onnx(bad).recipe.name == "linear_probe"


def tensor(name, dims): return onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [len(dims)], dims)


def external(model): model.graph.initializer[0].external_data.add(key="location", value="/etc/passwd")
def external_only_by_place(model): model.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
def external_in_a_node(model):
    node = model.graph.node.add(op_type="Constant", output=["more"])
    node.attribute.append(onnx.helper.make_attribute("value", tensor("t", [1])))
    node.attribute[0].t.external_data.add(key="location", value="../secret")
def custom(model): model.graph.node[0].domain = "com.example"
def contributed(model): model.opset_import.add(domain="com.microsoft", version=1)
def function(model): model.functions.add(name="f", domain="")
def branch(model):
    body = onnx.helper.make_graph([], "body", [], [])
    model.graph.node.append(onnx.helper.make_node("If", ["c"], ["d"], then_branch=body, else_branch=body))
def sparse(model): model.graph.sparse_initializer.add()
def training(model): model.training_info.add()
def wider(model): model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 128
def fixed_batch(model): model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
def other_type(model): model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
def another_input(model): model.graph.input.append(onnx.helper.make_tensor_value_info("x", 1, ["batch"]))
def another_output(model): model.graph.output.append(onnx.helper.make_tensor_value_info("u_tilde", 1, ["batch", 128]))
def renamed(model): model.graph.output[0].name = "score"
def bomb(model):
    model.graph.initializer.append(tensor("sizes", [2**20, 2**20]))
    model.graph.node.add(op_type="ConstantOfShape", input=["sizes"], output=["huge"])
def hidden_bomb(model):
    model.graph.node.add(op_type="NonZero", input=[model.graph.initializer[0].name], output=["where"])
def huge_weight(model): model.graph.initializer[0].dims[:] = [2**40]
def no_first_dimension(model): del model.graph.input[0].type.tensor_type.shape.dim[:]
def unknown_operator(model): model.graph.node[-1].op_type = "DoWhatever"
def old_opset(model): model.opset_import[0].version = 1
def config_of_the_runtime(model): model.metadata_props.add(key="ort_config", value="{}")
def wrong_rank(model):
    for t in model.graph.initializer:
        if t.name.endswith("net.weight"): t.dims.append(1)
def circle(model): model.graph.node[0].input[0] = model.graph.node[-1].output[0]


GRAPHS = {external: "external data", external_only_by_place: "external data", external_in_a_node: "external data", custom: "com.example",
          contributed: "com.microsoft", function: "within the graph", branch: "within the graph", sparse: "sparse", training: "within the graph",
          wider: "inputs", fixed_batch: "inputs", other_type: "inputs", another_input: "inputs", another_output: "outputs", renamed: "outputs",
          bomb: "excessive", hidden_bomb: "unknown", huge_weight: "", no_first_dimension: "inputs", unknown_operator: "unknown",
          old_opset: "opset", config_of_the_runtime: "metadata", wrong_rank: "'logits' is [1, 1]", circle: ""}


@pytest.mark.parametrize("change", GRAPHS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ("linear_probe", "spectrum_probe"))
def test_graphs_that_are_not_run(name, change, files, tmp_path):
    "Sealed again, as somebody would who means it."
    bad = changed(files[name], tmp_path/"a.onnx", change)
    assert GRAPHS[change] in (line := refusal(load_onnx, bad)) and str(bad) in line


def test_weights_that_are_nan_give_no_score(files, world, tmp_path):
    def nan(model):
        for t in model.graph.initializer:
            if t.name.endswith("weight"): t.raw_data = np.full(len(t.raw_data)//4, np.nan, np.float32).tobytes()
    index, root = world
    loaded = load_onnx(changed(files["spectrum_probe"], tmp_path/"a.onnx", nan))
    assert "NaN" in refusal(loaded, root/index.path.iloc[0])
