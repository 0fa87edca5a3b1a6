"The download of the DALLE Recognition dataset: the real client of Kaggle against a server on this machine."
import base64
import io
import os
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from nsnet import kaggle as nsnet_kaggle
from nsnet.benchmarks import index_any
from nsnet.formats import format_report

NAME, KEY = "somebody", "a-key-that-must-not-be-shown"


def archive(extra=()):
    "A zip laid out as the archive on Kaggle."
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as z:
        for i in range(6):
            for name in (f"real/{i}.jpg", f"fakeV2/fake-v2/{13094 + i}.png"):
                picture = io.BytesIO()
                pixels = np.random.default_rng(len(name) * 100 + i).integers(0, 255, (400, 500, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(picture, "JPEG" if name.endswith("jpg") else "PNG")
                z.writestr(name, picture.getvalue())
        for name in extra: z.writestr(name, b"harm")
    return content.getvalue()


class Kaggle(BaseHTTPRequestHandler):
    "Answers as Kaggle does: those it knows are sent on to a storage address, which serves any part of the archive."
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if "IntrospectToken" in self.path: return self.send_error(404)
        self.server.asked += 1
        if self.headers.get("Authorization") != "Basic " + base64.b64encode(f"{NAME}:{KEY}".encode()).decode():
            return self.send_error(401)
        self.answer(302, {"Location": "/storage/archive.zip", "Content-Length": "0"})

    def do_GET(self):
        server, content = self.server, self.server.content
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        server.starts.append(start)
        self.answer(206 if start else 200, {"Content-Type": "application/zip", "Accept-Ranges": "bytes",
                                            "ETag": '"v7"', "Content-Length": str(len(content) - start)})
        server.cuts, end = max(0, server.cuts - 1), start + (len(content) - start) // 2 if server.cuts else len(content)
        self.wfile.write(content[start:end])

    def answer(self, code, headers):
        self.send_response(code)
        for header in headers.items(): self.send_header(*header)
        self.end_headers()

    def log_message(self, *args): pass


@pytest.fixture
def kaggle(monkeypatch, tmp_path):
    "A server in place of Kaggle, credentials in the environment, a home without any."
    for name in [n for n in os.environ if n.startswith("KAGGLE_")]: monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path/"home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Kaggle)
    server.content, server.cuts, server.asked, server.starts = archive(), 0, 0, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    from kaggle.api import kaggle_api_extended
    from kagglesdk import kaggle_env
    monkeypatch.setattr(kaggle_api_extended.KaggleApi, "config", str(tmp_path/"home"/"kaggle.json"))
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(kaggle_api_extended.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("KAGGLE_USERNAME", NAME)
    monkeypatch.setenv("KAGGLE_KEY", KEY)
    yield server
    server.shutdown()
    server.server_close()


def get(tmp_path): return nsnet_kaggle.download_dalle(tmp_path/"data"/"dalle", progress=False, mounts=())


def test_colab_secrets(kaggle, monkeypatch, tmp_path, capfd):
    "Copied into the environment when somebody sits in front of the notebook; otherwise Colab is not asked, as it would not answer."
    import types
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY"): monkeypatch.delenv(name)
    secrets, asked = dict(KAGGLE_USERNAME=NAME, KAGGLE_KEY=KEY), []
    userdata = types.SimpleNamespace(get=lambda name: (asked.append(name), secrets[name])[1])
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(userdata=userdata))
    with pytest.raises(ValueError, match="no valid Kaggle credentials"): get(tmp_path)
    assert asked == []
    monkeypatch.setattr(nsnet_kaggle, "_is_interactive", lambda: True)
    monkeypatch.setenv("KAGGLE_USERNAME", "x"); monkeypatch.delenv("KAGGLE_USERNAME")     # both are taken away again afterwards
    monkeypatch.setenv("KAGGLE_KEY", "x"); monkeypatch.delenv("KAGGLE_KEY")
    assert len(index_any(get(tmp_path), progress=False)) == 12
    assert "KAGGLE_USERNAME" in asked and KEY not in "".join(capfd.readouterr())


def test_download_and_index(kaggle, tmp_path):
    root = get(tmp_path)
    index = index_any(root, progress=False)
    assert index.groupby(["label", "generator"]).size().to_dict() == {(0, "real"): 6, (1, "dalle"): 6}
    with pytest.warns(UserWarning, match="format"): format_report(index, root)
    assert get(tmp_path) == root and kaggle.asked == 1                  # a second call asks nobody
    assert [p.name for p in root.parent.iterdir()] == ["dalle"]         # and nothing is left over


def test_short_cut_is_mended_at_once(kaggle, tmp_path):
    kaggle.cuts = 1
    assert len(list(get(tmp_path).rglob("*.*"))) == 12
    assert len(kaggle.starts) == 2 and kaggle.starts[1] > 0             # the rest, not the whole again


def test_long_cut_is_mended_by_the_next_run(kaggle, tmp_path):
    kaggle.cuts = 7
    with pytest.raises(ValueError, match="run again"): get(tmp_path)
    assert not (tmp_path/"data"/"dalle").exists()
    kaggle.starts.clear()
    kaggle.cuts = 0
    assert len(list(get(tmp_path).rglob("*.*"))) == 12
    assert kaggle.starts[-1] >= 2**20


@pytest.mark.parametrize("missing", [("KAGGLE_USERNAME", "KAGGLE_KEY"), ("KAGGLE_KEY",)])
def test_without_credentials(kaggle, tmp_path, monkeypatch, capsys, missing):
    for name in missing: monkeypatch.delenv(name)
    with pytest.raises(ValueError, match="no valid Kaggle credentials.*kaggle.json"): get(tmp_path)
    assert KEY not in "".join(capsys.readouterr()) and not kaggle.asked


def test_without_credentials_in_a_notebook(kaggle, tmp_path):
    "IPython hides exit(), with which the client gives up."
    env = {k: v for k, v in os.environ.items() if not k.startswith("KAGGLE_")}
    code = f"from nsnet.kaggle import download_dalle; download_dalle({str(tmp_path/'dalle')!r}, mounts=())"
    said = subprocess.run([sys.executable, "-m", "IPython", "--colors=NoColor", "-c", code], env=env, capture_output=True, text=True).stdout
    assert "ValueError: no valid Kaggle credentials: make a token at kaggle.com" in said


def test_token_that_has_ended(kaggle, tmp_path, monkeypatch, capsys):
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY"): monkeypatch.delenv(name)
    monkeypatch.setenv("KAGGLE_API_TOKEN", KEY)
    with pytest.raises(ValueError, match="no valid Kaggle credentials") as error: get(tmp_path)
    assert KEY not in "".join([*capsys.readouterr(), str(error.value)])


def test_wrong_credentials(kaggle, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KAGGLE_KEY", "wrong-" + KEY)
    with pytest.raises(ValueError, match="refused the credentials") as error: get(tmp_path)
    assert KEY not in "".join([*capsys.readouterr(), str(error.value)])


def test_full_disk(kaggle, tmp_path, monkeypatch):
    monkeypatch.setattr(nsnet_kaggle.shutil, "disk_usage", lambda path: type("Usage", (), dict(free=10**6)))
    with pytest.raises(ValueError, match="0.0 GB are free"): get(tmp_path)
    assert not list((tmp_path/"data").glob("*"))


def test_archive_that_writes_elsewhere(kaggle, tmp_path):
    kaggle.content = archive(extra=["../../escaped.txt"])
    with pytest.raises(ValueError, match="refused"): get(tmp_path)
    assert not list(tmp_path.rglob("escaped.txt")) and not (tmp_path/"data"/"dalle").exists()


def test_damaged_archive(kaggle, tmp_path):
    kaggle.content = kaggle.content[:5000] + bytes(3000) + kaggle.content[8000:]
    with pytest.raises(ValueError, match="damaged"): get(tmp_path)
    assert not (tmp_path/"data"/"dalle").exists()
