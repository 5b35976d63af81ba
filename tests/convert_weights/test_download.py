"""--download against a local server: interrupted downloads, unusual servers, files that are not the released ones."""

import hashlib
import io
import logging
import shutil
import ssl
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from convert_weights.__main__ import main
from convert_weights.download import RELEASES, Release, download
from jaxla.config import InputError
from jaxla.data.cache import clear_cache
from tests.convert_weights.command import empty_state, read_weights, refuse, succeed

CONTENT = bytes(range(256)) * 1200


class Server:
    """A server that sends `content` for every path, and records the range of each request."""

    def __init__(self, certificate=None):
        self.content = CONTENT
        self.supports_ranges = True
        self.breaks_after = None  # byte position at which the connection breaks, once
        self.status = 200
        self.headers = {}  # override the correct headers; None removes a header
        self.redirects = {}  # path -> URL
        self.requested_ranges = []
        self.may_answer = threading.Event()
        self.may_answer.set()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.answer(self)

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.http.socket = context.wrap_socket(self.http.socket, server_side=True)
        self.root = f"http{'s' if certificate else ''}://127.0.0.1:{self.http.server_address[1]}"
        self.url = f"{self.root}/models/weights.pth"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, request):
        if request.path in self.redirects:
            request.send_response(302)
            request.send_header("Location", self.redirects[request.path])
            request.end_headers()
            return
        requested = request.headers.get("Range")
        self.requested_ranges.append(requested)
        assert self.may_answer.wait(60)
        begin = int(requested.removeprefix("bytes=").removesuffix("-")) if requested and self.supports_ranges else 0
        size = len(self.content)
        if self.status != 200 or begin >= size:
            request.send_error(416 if begin else self.status)
            return
        request.send_response(206 if begin else 200)
        headers = {"Content-Range": f"bytes {begin}-{size - 1}/{size}" if begin else None}
        for name, value in {**headers, "Content-Length": str(size - begin), **self.headers}.items():
            if value is not None:
                request.send_header(name, value)
        request.end_headers()
        end, self.breaks_after = self.breaks_after, None
        request.wfile.write(self.content[begin:end])

    def wait_for_request(self):
        wait_until(lambda: self.requested_ranges)

    def close(self):
        self.may_answer.set()
        self.http.shutdown()
        self.http.server_close()


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def secure_server(tmp_path_factory, monkeypatch):
    """A server over HTTPS, whose certificate this process trusts."""
    if not shutil.which("openssl"):
        pytest.skip("needs the program openssl, to make a certificate")
    file = tmp_path_factory.mktemp("tls") / "certificate.pem"
    name = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *name, "-keyout", file, "-out", "-"]
    certificate = subprocess.run(command, check=True, capture_output=True).stdout
    with file.open("ab") as pem:
        pem.write(certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    server = Server(file)
    yield server
    server.close()


@pytest.fixture
def release(server):
    return Release(server.url, hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, "jaxla")
    return caplog


def refusal(release, folder):
    with pytest.raises(InputError) as error:
        download(release, folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def contents(folder):
    """Return the content of all files except locks, which are empty and remain after an error."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


def test_file_is_downloaded_once(server, release, tmp_path):
    folder = tmp_path / "cache" / "downloads"
    assert download(release, folder) == folder / "weights.pth"
    assert download(release, folder) == folder / "weights.pth"
    assert [path.name for path in folder.iterdir()] == ["weights.pth"]
    assert server.requested_ranges == [None]


def test_interrupted_download_is_resumed(server, release, tmp_path):
    server.breaks_after = 100_000
    line = refusal(release, tmp_path)
    assert line.startswith(
        f"{server.url}: cannot be downloaded (the connection closed 0.2 MB before the end of the file). Run the"
    )
    assert contents(tmp_path) == {"weights.pth.part": CONTENT[:100_000]}
    assert download(release, tmp_path).read_bytes() == CONTENT
    assert server.requested_ranges == [None, "bytes=100000-"]
    assert contents(tmp_path) == {"weights.pth": CONTENT}


def test_server_without_ranges_sends_the_file_from_the_beginning(server, release, tmp_path, log):
    part = tmp_path / "weights.pth.part"
    part.write_bytes(CONTENT[:100_000])
    server.supports_ranges = False
    assert download(release, tmp_path).read_bytes() == CONTENT
    assert server.requested_ranges == ["bytes=100000-"]
    assert f"{part}: the server cannot resume a download; it sends the file from the beginning" in log.messages


@pytest.mark.parametrize("received", [0, 100_000], ids=["new", "resumed"])
@pytest.mark.parametrize(
    "headers",
    [{"Content-Length": None}, {"Content-Length": "0.3 MB"}, {"Transfer-Encoding": "chunked"}],
    ids=["none", "malformed", "chunked"],
)
def test_server_that_does_not_announce_the_length_is_refused(server, release, tmp_path, headers, received):
    (tmp_path / "weights.pth.part").write_bytes(CONTENT[:received])
    server.headers = headers
    line = refusal(release, tmp_path)
    assert line.startswith(
        f"{server.url}: cannot be downloaded (the server does not announce the length of the file). "
    )
    assert contents(tmp_path) == {"weights.pth.part": CONTENT[:received]}


@pytest.mark.parametrize("sent", ["bytes 0-307199/307200", "bytes 100000-307199/400000", None])
def test_part_other_than_the_requested_one_is_never_appended(server, release, tmp_path, sent):
    (tmp_path / "weights.pth.part").write_bytes(CONTENT[:100_000])
    server.headers = {"Content-Range": sent}
    assert "(the server sent a different part of the file than the requested one)" in refusal(release, tmp_path)
    assert contents(tmp_path) == {"weights.pth.part": CONTENT[:100_000]}


def test_complete_partial_file_is_only_checked(server, release, tmp_path):
    (tmp_path / "weights.pth.part").write_bytes(CONTENT)
    assert download(release, tmp_path).read_bytes() == CONTENT
    assert server.requested_ranges == [f"bytes={len(CONTENT)}-"]


@pytest.mark.parametrize("part", [b"", b"something else" * 1000], ids=["new", "resumed"])
def test_downloaded_file_that_is_not_the_released_file_is_removed(server, release, tmp_path, part):
    if part:
        (tmp_path / "weights.pth.part").write_bytes(part)
    else:
        release = release._replace(sha256="0" * 64)
    assert "the sha256 of the downloaded file is not that of the released file (" in refusal(release, tmp_path)
    assert contents(tmp_path) == {}


def test_existing_file_that_is_not_the_released_file_is_kept(server, release, tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"mine")
    line = refusal(release, tmp_path)
    assert line.startswith(f"{tmp_path / 'weights.pth'}: not the released file, whose sha256 begins with ")
    assert contents(tmp_path) == {"weights.pth": b"mine"}
    assert server.requested_ranges == []


@pytest.mark.parametrize("name", ["weights.pth", "weights.pth.part", "weights.pth.lock"])
def test_path_that_cannot_be_read_or_written_is_reported_in_one_line(release, tmp_path, name):
    (tmp_path / name).mkdir()
    line = refusal(release, tmp_path)
    assert line.startswith(
        f"{release.url}: cannot be downloaded ([Errno 21] Is a directory: '{tmp_path / name}'). Run "
    )


def test_folder_that_is_a_file_is_reported_in_one_line(release, tmp_path):
    (tmp_path / "downloads").touch()
    assert f"File exists: '{tmp_path / 'downloads'}'" in refusal(release, tmp_path / "downloads")


@pytest.mark.parametrize(
    ("breaks_after", "ranges"), [(None, [None]), (100_000, [None, "bytes=100000-"])], ids=["complete", "interrupted"]
)
def test_one_of_two_processes_downloads_and_the_other_waits(server, release, tmp_path, log, breaks_after, ranges):
    path = tmp_path / "weights.pth"
    server.breaks_after = breaks_after
    server.may_answer.clear()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(download, release, tmp_path)
        server.wait_for_request()
        second = threads.submit(download, release, tmp_path)
        wait_until(lambda: f"{path}: another process is downloading it; waiting for it" in log.messages)
        server.may_answer.set()
    if breaks_after:
        assert "the connection closed" in str(first.exception())
    else:
        assert first.result() == path
    assert second.result() == path
    assert server.requested_ranges == ranges
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(("status", "reason"), [(404, "Not Found"), (503, "Service Unavailable")])
def test_error_quotes_the_server(server, release, tmp_path, status, reason):
    server.status = status
    line = refusal(release, tmp_path)
    assert line == (
        f"{server.url}: cannot be downloaded ({reason}). Run the command again to resume, or download the file "
        f"elsewhere, put it at {tmp_path / 'weights.pth'}, and run the same command."
    )
    assert contents(tmp_path) == {}


def test_redirect_from_https_to_http_is_refused(server, secure_server, release, tmp_path):
    release = release._replace(url=f"{secure_server.root}/weights.pth")
    secure_server.redirects["/weights.pth"] = f"{server.root}/w"
    line = refusal(release, tmp_path)
    assert f"cannot be downloaded (it redirects to {server.root}/w, which is not HTTPS)" in line
    assert server.requested_ranges == []
    secure_server.redirects["/weights.pth"] = f"{secure_server.root}/w"
    assert download(release, tmp_path).read_bytes() == CONTENT


def test_every_release_has_a_sha256():
    for arch, (url, sha256) in RELEASES.items():
        name = Path(url).name
        assert url.startswith("https://")
        if arch.startswith(("resnet", "vgg")):
            assert name == f"{arch}-{sha256}.pth"
        else:
            assert name == f"{arch.replace('_reg', '_reg4')}_pretrain.pth"
            assert len(bytes.fromhex(sha256)) == 32
    assert len({release.sha256 for release in RELEASES.values()}) == len(RELEASES) == 11


# --- through the command ---


def replace_release(server, arch, monkeypatch, cache):
    """Make the server's content the release of `arch`, and `cache` the cache folder."""
    monkeypatch.setitem(RELEASES, arch, Release(server.url, hashlib.sha256(server.content).hexdigest()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


def test_download_is_converted_and_not_repeated(server, tmp_path, monkeypatch):
    file = io.BytesIO()
    torch.save(empty_state("dinov2_vits14"), file)
    server.content = file.getvalue()
    replace_release(server, "dinov2_vits14", monkeypatch, tmp_path)
    output = tmp_path / "jaxla" / "weights" / "dinov2_vits14.safetensors"
    printed = succeed("--arch=dinov2_vits14", "--download")
    assert f"downloading {server.url} into {tmp_path / 'jaxla' / 'downloads'}\n" in printed
    source = tmp_path / "jaxla" / "downloads" / "weights.pth"
    assert f"{output}: dinov2_vits14 from {source}, sha256 of its data " in printed
    assert read_weights(output)[1]["source_sha256"] == RELEASES["dinov2_vits14"].sha256
    assert contents(tmp_path / "jaxla" / "downloads") == {"weights.pth": server.content}
    assert list((tmp_path / "jaxla" / "in-use").iterdir()) == []
    again = succeed("--arch=dinov2_vits14", "--download", "--force")
    assert f"{source}: already downloaded\n" in again
    assert server.requested_ranges == [None]


def test_cache_is_not_cleared_during_a_download(server, tmp_path, monkeypatch):
    replace_release(server, "dinov2_vits14", monkeypatch, tmp_path)
    server.may_answer.clear()
    server.status = 503
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(main, ["--arch=dinov2_vits14", "--download"])
        server.wait_for_request()
        with pytest.raises(InputError, match=r"uses it\. Clear it when that process has finished"):
            clear_cache(tmp_path / "jaxla", "downloads")
        server.may_answer.set()
    assert "Service Unavailable" in str(running.exception())
    assert clear_cache(tmp_path / "jaxla", "downloads") == []


def test_error_without_network_states_where_to_put_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    url = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth"
    path = tmp_path / "jaxla" / "downloads" / "dinov2_vits14_reg4_pretrain.pth"
    path.parent.mkdir(parents=True)
    path.with_name(f"{path.name}.lock").touch()
    (tmp_path / "jaxla" / "in-use").mkdir()
    assert refuse(tmp_path, "--arch=dinov2_vits14_reg", "--download") == (
        f"{url}: cannot be downloaded ([Errno 111] Connection refused). Run the command again to resume, or download "
        f"the file elsewhere, put it at {path}, and run the same command."
    )
    path.write_bytes(b"mine")
    assert refuse(tmp_path, "--arch=dinov2_vits14_reg", "--download").startswith(f"{path}: not the released file")


@pytest.mark.parametrize("arch", ["dinov3_vits16", "dinov3_vith16plus", "dinov3_vit7b16"])
def test_dinov3_is_never_downloaded(tmp_path, monkeypatch, arch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    line = refuse(tmp_path, f"--arch={arch}", "--download")
    assert line == (
        "--download: DINOv3 has to be downloaded by hand, because you must accept Meta's licence first. Accept it at "
        "https://ai.meta.com/dinov3/ or on the model's Hugging Face page, download the file, and pass it as "
        "--source."
    )
