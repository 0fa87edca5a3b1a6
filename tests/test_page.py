"The page in the browser: driven by headless Chromium, by many visitors at once, and by one with bad intentions."
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote, urlsplit

import numpy as np
import psutil
import pytest
from PIL import Image

from nsnet.generators import index_mini

gradio_client = pytest.importorskip("gradio_client", reason="pip install 'nsnet[page]' to test the page")
pytest.importorskip("gradio", reason="pip install 'nsnet[page]' to test the page")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SERVE = """
import socket, sys
known = dict(connect=socket.socket.connect, getaddrinfo=socket.getaddrinfo)
def told(host):
    if str(host) not in ("127.0.0.1", "localhost", "::1", "None", "b'127.0.0.1'"): print("LEAVES THE MACHINE:", host, flush=True)
def connect(self, address):
    if self.family != socket.AF_UNIX: told(address[0])
    return known["connect"](self, address)
def getaddrinfo(host, *rest, **options):
    told(host)
    return known["getaddrinfo"](host, *rest, **options)
socket.socket.connect, socket.getaddrinfo = connect, getaddrinfo
from nsnet.page import launch
launch("mini", port=int(sys.argv[1]))
"""


class Server:
    "`nsnet page` in a process of its own."
    def __init__(self, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log, self.url = log, f"http://127.0.0.1:{self.port}"
        with open(log, "w") as out:
            self.process = subprocess.Popen([sys.executable, "-u", "-c", SERVE, str(self.port)], stdout=out, stderr=subprocess.STDOUT)
        for _ in range(600):
            if self.url in log.read_text(): return
            assert self.process.poll() is None, log.read_text()
            time.sleep(.1)
        pytest.fail("the page did not start: " + log.read_text())

    def client(self): return gradio_client.Client(self.url, verbose=False)

    def rss(self): return psutil.Process(self.process.pid).memory_info().rss/1e6

    def peak(self):
        "Megabytes that the process has had at once since the last call."
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1])/1e3

    def ask(self, path, method="GET", body=None, **headers):
        "Status and body of a request whose path is sent as it stands."
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("page")/"log.txt")
    yield server
    server.process.terminate()                                 # it deletes its uploads
    server.process.wait(60)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "Paths of pictures of the mini world, and of files that are less pleasant."
    folder = tmp_path_factory.mktemp("pictures")
    index = index_mini(folder, n_train=1, n_test=10, progress=False)
    test = index[index.split.eq("test")]
    paths = {g: [folder/p for p in own.path] for g, own in test.groupby("generator")}
    (folder/"note.png").write_text("this is no picture")
    Image.new("RGB", (10, 10)).save(folder/"tiny.png")
    Image.new("1", (30_000, 30_000)).save(folder/"bomb.png")                   # 0.1 MB that would become 2.7 GB
    noise = np.random.default_rng(0).integers(0, 256, (600, 1000, 3), np.uint8)
    Image.fromarray(noise).resize((10_000, 6000)).save(folder/"large.jpg", quality=80)
    return paths | {name: folder/file for name, file in dict(note="note.png", tiny="tiny.png", bomb="bomb.png", large="large.jpg").items()}


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM: pytest.skip("no browser: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright to drive the browser")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, server):
    "A visitor's page, which must load nothing from elsewhere and complain of nothing."
    context = browser.new_context(viewport=dict(width=1280, height=800))
    page, elsewhere, errors = context.new_page(), [], []
    page.set_default_timeout(60_000)
    page.on("request", lambda r: elsewhere.append(r.url) if urlsplit(r.url).scheme not in ("data", "blob") and not r.url.startswith(server.url) else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server.url)
    yield page
    context.close()
    assert not elsewhere and not errors


def upload(page, path):
    "Choose a file as a person would, and wait for what is said of it."
    page.locator("input[type=file]").first.set_input_files(path)
    page.wait_for_selector(".nsnet .card:has(.word), .nsnet .card:has-text('No score')")
    return page


def score(page): return float(page.locator(".card strong").nth(1).inner_text())


def test_generated_and_real_pictures_get_their_verdict(visit, pictures):
    upload(visit, pictures["shuffle"][0])
    assert visit.locator(".word").inner_text() == "Looks generated"
    for said in ("Below the threshold is not proof that it is real", "threshold", "mini world only", "not a map of forged regions",
                 "Among the pictures it was tested with", "saved as JPEG 75", "half size and back", "cropped"):
        visit.get_by_text(said).first.wait_for()
    assert visit.locator("input, textarea").first.input_value() or visit.get_by_label("What the picture shows").input_value()
    why = visit.locator(".large img")
    assert why.evaluate("image => image.naturalWidth") > 900 and "patches" in why.get_attribute("alt")
    visit.get_by_label("Remove").or_(visit.get_by_label("Clear")).first.click()
    visit.get_by_text("Drop a picture on the left").wait_for()
    upload(visit, pictures["real"][0])
    assert visit.locator(".word").inner_text() == "Looks real"


def test_new_words_move_the_score(visit, pictures):
    upload(visit, pictures["deconv"][0])
    before, words = score(visit), visit.get_by_label("What the picture shows")
    visit.get_by_text("The caption is the captioner's").wait_for()
    words.fill("a photograph of $5 <b>{{horses}}</b> ${1 + 1} and $6")
    visit.get_by_text("The caption is yours").wait_for()
    assert score(visit) != before
    visit.wait_for_timeout(500)
    visit.locator(".large img").wait_for()
    assert visit.get_by_text("No explanation").count() == 0
    words.fill("")
    visit.get_by_text("The caption is the captioner's").wait_for()
    assert score(visit) == before


@pytest.mark.parametrize("name, reason", [("note", "not an image that Pillow knows"), ("tiny", "too small, 10x10 pixels"),
                                          ("bomb", "900 megapixels, the limit is 100")])
def test_what_cannot_be_scored_gets_one_line(name, reason, visit, server, pictures):
    server.peak()
    upload(visit, pictures[name])
    line = visit.locator(".card", has_text="No score").inner_text()
    assert line.startswith(f"No score for {pictures[name].name}: ") and reason in line and "\n" not in line
    assert visit.locator(".large").count() == 0
    assert server.peak() < server.rss() + 200                                  # nothing was decoded


def test_sixty_megapixels_are_scored(server, pictures):
    client, start = server.client(), time.monotonic()
    card, among, caption = client.predict(gradio_client.handle_file(pictures["large"]), api_name="/score")
    assert "word" in card and caption and time.monotonic() - start < 60


def test_large_requests_are_refused(server):
    assert server.ask("/gradio_api/upload", "POST", b"", **{"Content-Length": "102000000"})[0] == 413
    assert server.ask("/gradio_api/queue/join", "POST", b"{" + b" "*2_000_000 + b"}", **{"Content-Type": "application/json"})[0] == 413


def test_ten_visitors_at_once_get_each_their_own_answer(server, pictures):
    paths = [*pictures["real"][:5], *pictures["nearest"][:5]]
    def ask(path): return server.client().predict(gradio_client.handle_file(path), api_name="/score")
    with ThreadPoolExecutor(10) as pool: together = list(pool.map(ask, paths))
    assert together[::3] == [ask(path) for path in paths[::3]] and len(set(together)) > 5


def test_full_queue_refuses_politely(server, pictures):
    "Whoever comes when 30 are waiting is told so at once, and the page lives on."
    client = server.client()
    job = client.predict(gradio_client.handle_file(pictures["real"][0]), api_name="/score")
    with open(pictures["real"][0], "rb") as file:
        body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n' + file.read() + b"\r\n--x--\r\n"
    status, answer = server.ask("/gradio_api/upload", "POST", body, **{"Content-Type": "multipart/form-data; boundary=x"})
    data = dict(path=json.loads(answer)[0], meta={"_type": "gradio.FileData"}, orig_name="a.jpg")
    number = next(d["id"] for d in client.config["dependencies"] if d["api_name"] == "score")
    def join(i): return server.ask("/gradio_api/queue/join", "POST", json.dumps(dict(data=[data], fn_index=number, session_hash=f"crowd{i}")),
                                   **{"Content-Type": "application/json"})
    with ThreadPoolExecutor(16) as pool: answers = list(pool.map(join, range(60)))
    assert {status for status, _ in answers} == {200, 503}
    assert all(b"Queue is full" in said for status, said in answers if status == 503)
    for _ in range(100):
        try: again = client.predict(gradio_client.handle_file(pictures["real"][0]), api_name="/score")
        except Exception: time.sleep(.3)
        else: break
    assert again == job


def test_reload_in_the_middle(visit, pictures):
    visit.locator("input[type=file]").first.set_input_files(pictures["deconv"][0])
    visit.reload()
    visit.get_by_text("Drop a picture on the left").wait_for()
    upload(visit, pictures["deconv"][0])
    visit.reload()
    visit.get_by_role("button", name="photo").click()
    visit.locator(".word").wait_for()


def test_phone_shows_everything_in_its_width(browser, server):
    context = browser.new_context(viewport=dict(width=390, height=844))
    page = context.new_page()
    page.goto(server.url)
    page.get_by_role("button", name="bilinear").click()
    page.locator(".large img").wait_for(timeout=60_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()


def test_only_uploads_can_be_read(server, pictures, tmp_path):
    secret = tmp_path/"secret.txt"
    secret.write_text("root:")
    repo = Path(__file__).resolve().parents[1]
    own = [p for p in Path(tmp_path.anchor, "tmp").glob("nsnet-page-*")] + [tmp_path]
    for target in ("/etc/passwd", secret, repo/"setup.py", "/proc/self/environ", *own):
        up = "../"*12 + str(target).lstrip("/")
        for path in (target, quote(str(target), safe=""), up, quote(up, safe=""), f"file://{target}", f"//{target}"):
            for route in ("/gradio_api/file=", "/file=", "/gradio_api/stream/", "/static/", "/assets/", "/svelte/", "/gradio_api/proxy="):
                status, body = server.ask(route + str(path))
                assert status >= 400 or b"<html" in body[:1000].lower(), (status, route, path)
                assert not re.search(rb"root:|setuptools import|GRADIO_TEMP_DIR=", body), (route, path)
    for address in ("http://127.0.0.1:1/x.png", "https://example.com/x.png", "HTTP://example.com"):
        assert server.ask("/gradio_api/file=" + address)[0] == 403


@pytest.mark.parametrize("path", ["/etc/hostname", "http://127.0.0.1:{port}/theme.css", "https://example.com/x.png", "data:image/png;base64,AAAA"])
def test_only_uploads_can_be_scored(path, server):
    client = server.client()
    picture = dict(path=path.format(port=server.port), url=path, meta={"_type": "gradio.FileData"})
    number = next(d["id"] for d in client.config["dependencies"] if d["api_name"] == "score")
    request = dict(data=[picture], fn_index=number, session_hash="bad")
    assert server.ask("/gradio_api/queue/join", "POST", json.dumps(request), **{"Content-Type": "application/json"})[0] == 200
    status, answer = server.ask("/gradio_api/queue/data?session_hash=bad")
    assert status == 200 and b'"success":false' in answer and b"Traceback" not in answer and b"word" not in answer


def test_name_of_an_upload_leads_nowhere(server, pictures):
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="../../../../tmp/evil.png"\r\n\r\nabc\r\n--x--\r\n'
    status, answer = server.ask("/gradio_api/upload", "POST", body, **{"Content-Type": "multipart/form-data; boundary=x"})
    assert status == 200 and re.search(r"/nsnet-page-\w+/uploads/[0-9a-f]{64}/evil.png$", json.loads(answer)[0])


def soak(server, pictures, n):
    "Megabytes after 50 (or half) and all of n pictures, every tenth with its explanation and by a new visitor."
    paths, seen = [p for g in ("real", "shuffle", "diffusion") for p in pictures[g]], {}
    client = server.client()
    for i in range(1, n + 1):
        card, among, caption = client.predict(gradio_client.handle_file(paths[i % len(paths)]), api_name="/score")
        if i % 10 == 0:
            assert "data:image/png" in client.predict(gradio_client.handle_file(paths[i % len(paths)]), caption, api_name="/closer")[1]
            client = server.client()
        assert "word" in card
        if i in (min(50, n//2), n): seen[i] = server.rss()
    print(f"MB of memory after so many requests: {seen}")
    return list(seen.values())


def test_memory_stays_flat(server, pictures):
    half, end = soak(server, pictures, 40)
    assert end < half + 60


@pytest.mark.slow
def test_memory_stays_flat_over_500_requests(server, pictures):
    fifty, end = soak(server, pictures, 500)
    assert end < fifty + 100


def test_nothing_is_left_behind(server, pictures):
    "Uploads are deleted with the server, and in all these tests it has asked no other machine for anything."
    status, answer = server.ask("/gradio_api/upload", "POST", b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nabc\r\n--x--\r\n',
                                **{"Content-Type": "multipart/form-data; boundary=x"})
    kept = Path(json.loads(answer)[0])
    assert kept.exists()
    os.kill(server.process.pid, signal.SIGTERM)
    assert server.process.wait(30) == 0 and not kept.exists() and not kept.parents[2].exists()
    assert "LEAVES THE MACHINE" not in server.log.read_text()
