"""--download: transfers that break off, servers of every kind, files that are not the released ones. No network."""

import hashlib
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from convert_weights.download import RELEASES, Release, StaySecure, download
from jaxla.config import InputError
from tests.convert_weights.command import refuse

CONTENT = bytes(range(256)) * 1200


class Server:
    """Serves CONTENT under any name, and notes which part of it each request asked for."""

    def __init__(self):
        self.knows_ranges = True
        self.breaks_after = None  # bytes of the whole file
        self.status = 200
        self.asked = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.answer(self)

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/models/weights.pth"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, request):
        asked = request.headers.get("Range")
        self.asked.append(asked)
        begin = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.knows_ranges else 0
        if self.status != 200 or begin >= len(CONTENT):
            request.send_error(416 if begin else self.status)
            return
        request.send_response(206 if begin else 200)
        if begin:
            request.send_header("Content-Range", f"bytes {begin}-{len(CONTENT) - 1}/{len(CONTENT)}")
        request.send_header("Content-Length", str(len(CONTENT) - begin))
        request.end_headers()
        request.wfile.write(CONTENT[begin : self.breaks_after])


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def release(server):
    return Release(server.url, hashlib.sha256(CONTENT).hexdigest())


def refusal(release, folder):
    with pytest.raises(InputError) as error:
        download(release, folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_file_is_fetched_once(server, release, tmp_path):
    folder = tmp_path / "cache" / "downloads"
    assert download(release, folder) == folder / "weights.pth"
    assert download(release, folder) == folder / "weights.pth"
    assert contents(folder) == {"weights.pth": CONTENT}
    assert server.asked == [None]


def test_a_transfer_that_broke_off_goes_on_where_it_was(server, release, tmp_path):
    server.breaks_after = 100_000
    line = refusal(release, tmp_path)
    assert line.startswith(f"{server.url}: cannot be fetched (the connection broke off 0.2 MB before the end); run the")
    assert contents(tmp_path) == {"weights.pth.part": CONTENT[:100_000]}
    server.breaks_after = None
    assert download(release, tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-"]
    assert contents(tmp_path) == {"weights.pth": CONTENT}


def test_a_server_that_knows_no_ranges_sends_all_of_it_again(server, release, tmp_path):
    (tmp_path / "weights.pth.part").write_bytes(CONTENT[:100_000])
    server.knows_ranges = False
    assert download(release, tmp_path).read_bytes() == CONTENT
    assert server.asked == ["bytes=100000-"]


def test_a_transfer_that_was_complete_is_only_checked(server, release, tmp_path):
    (tmp_path / "weights.pth.part").write_bytes(CONTENT)
    assert download(release, tmp_path).read_bytes() == CONTENT
    assert server.asked == [f"bytes={len(CONTENT)}-"]


@pytest.mark.parametrize("part", [b"", b"something else" * 1000], ids=["whole", "resumed"])
def test_another_file_than_the_released_one_is_removed(server, release, tmp_path, part):
    if part:
        (tmp_path / "weights.pth.part").write_bytes(part)
    else:
        release = release._replace(sha256="0" * 64)
    assert "what came is not the released file, whose sha256 begins with" in refusal(release, tmp_path)
    assert contents(tmp_path) == {}


def test_another_file_that_lies_there_is_named_and_kept(server, release, tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"mine")
    line = refusal(release, tmp_path)
    assert line.startswith(f"{tmp_path / 'weights.pth'}: not the released file, whose sha256 begins with ")
    assert contents(tmp_path) == {"weights.pth": b"mine"}
    assert server.asked == []


@pytest.mark.parametrize(("status", "reason"), [(404, "Not Found"), (503, "Service Unavailable")])
def test_a_server_that_refuses_is_quoted(server, release, tmp_path, status, reason):
    server.status = status
    line = refusal(release, tmp_path)
    assert line == (
        f"{server.url}: cannot be fetched ({reason}); run the command again to go on, or fetch the file elsewhere and "
        f"put it at {tmp_path / 'weights.pth'} for the same command to find"
    )
    assert contents(tmp_path) == {}


def test_https_is_never_left():
    request = urllib.request.Request("https://example.org/weights.pth")
    follow = (None, 302, "Found", {})
    with pytest.raises(OSError, match=r"redirects to http://example\.org/w, which is not HTTPS"):
        StaySecure().redirect_request(request, *follow, "http://example.org/w")
    assert StaySecure().redirect_request(request, *follow, "https://example.org/w").full_url == "https://example.org/w"


def test_every_release_is_known_by_its_sha256():
    for arch, (url, sha256) in RELEASES.items():
        name = Path(url).name
        assert url.startswith("https://")
        if arch.startswith("resnet"):
            assert name == f"{arch}-{sha256}.pth"
        else:
            assert name == f"{arch.replace('_reg', '_reg4')}_pretrain.pth"
            assert len(bytes.fromhex(sha256)) == 32
    assert len({release.sha256 for release in RELEASES.values()}) == len(RELEASES) == 10


# --- through the command ---


def test_without_network_the_command_says_where_to_put_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    url = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth"
    place = tmp_path / "jaxla" / "downloads" / "dinov2_vits14_reg4_pretrain.pth"
    place.parent.mkdir(parents=True)
    assert refuse(tmp_path, "--arch=dinov2_vits14_reg", "--download") == (
        f"{url}: cannot be fetched ([Errno 111] Connection refused); run the command again to go on, or fetch the file "
        f"elsewhere and put it at {place} for the same command to find"
    )
    place.write_bytes(b"mine")
    assert refuse(tmp_path, "--arch=dinov2_vits14_reg", "--download").startswith(f"{place}: not the released file")


@pytest.mark.parametrize("arch", ["dinov3_vits16", "dinov3_vith16plus", "dinov3_vit7b16"])
def test_dinov3_is_never_downloaded(tmp_path, monkeypatch, arch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    line = refuse(tmp_path, f"--arch={arch}", "--download")
    assert line == (
        "--download: DINOv3 comes under Meta's own licence and is never downloaded from here: accept it at "
        "https://ai.meta.com/dinov3/ or on the model's Hugging Face page, download the file there and pass it as "
        "--source"
    )
