"""Download released checkpoints over HTTPS; an interrupted download is resumed, and every file's sha256 is checked."""

from __future__ import annotations

import http.client
import logging
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from convert_weights.checkpoint import progress_bar
from jaxla.cli.files import file_lock, file_sha256, free_bytes
from jaxla.config import InputError

log = logging.getLogger("jaxla.convert_weights")

TIMEOUT_SECONDS = 60  # maximum time without receiving a byte


class Release(NamedTuple):
    """A released file."""

    url: str
    sha256: str  # the whole hash, or its first digits


# Meta does not publish hashes of its files. These are the hashes that independent projects pin and that copies on the
# Hugging Face hub have; each was found in at least three places, including the conversion script of
# finegrain-ai/refiners. torchvision's file names contain the first digits of the sha256; the weights are IMAGENET1K_V1.
_DINOV2_SHA256 = {
    "dinov2_vits14": "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
    "dinov2_vitb14": "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
    "dinov2_vitl14": "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
    "dinov2_vitg14": "baf8467e50af277596bbbafa06887c177ee899ab46033649c383577d7e9309d3",
    "dinov2_vits14_reg": "f433177089a681826f849f194ece3bb48f4d63fb38d32fc837e3dc7a4e5641fb",
    "dinov2_vitb14_reg": "73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71",
    "dinov2_vitl14_reg": "36e4deffbaef061a2576705b0c36f93621e2ae20bf6274694821b0b492551b51",
    "dinov2_vitg14_reg": "746ecb8c6301c645c5c855be91687d274587d6e48fdaec4a729753160b34a283",
}
_TORCHVISION_SHA256 = {"resnet50": "0676ba61", "resnet152": "394f9c45", "vgg16_bn": "6c64b313"}

RELEASES = {
    arch: Release(
        f"https://dl.fbaipublicfiles.com/dinov2/{arch.removesuffix('_reg')}/"
        f"{arch.replace('_reg', '_reg4')}_pretrain.pth",
        sha256,
    )
    for arch, sha256 in _DINOV2_SHA256.items()
} | {
    arch: Release(f"https://download.pytorch.org/models/{arch}-{sha256}.pth", sha256)
    for arch, sha256 in _TORCHVISION_SHA256.items()
}


def download(release: Release, folder: Path) -> Path:
    """Download a released file into `folder`, unless it already exists, and return its path.

    The received part of an interrupted download is kept; the next call resumes it. If several processes request the
    same file, one downloads it and the others wait.

    Raises:
        InputError: the server cannot be reached, rejects the request, or does not announce the file's length; the
            connection breaks; the folder cannot be read or written; the disk is full; or the file is not the released
            one.
    """
    path = folder / release.url.rpartition("/")[2]
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            lock = path.with_name(f"{path.name}.lock")
            with file_lock(lock, f"{path}: another process is downloading it"):
                if is_new := not path.exists():  # another process may have downloaded it in the meantime
                    log.info("downloading %s into %s", release.url, folder)
                    _download_new(release, path)
                # Remove the lock only after the file exists: otherwise, a process that waits for the old lock and one
                # that creates a new lock would both download the file.
                lock.unlink(missing_ok=True)
            if is_new:
                return path
        log.info("%s: already downloaded", path)
        if not _matches(path, release):
            problem = f"not the released file, whose sha256 begins with {release.sha256[:8]}"
            raise InputError(path, problem, "Move the file away and run the command again.")
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        alternative = f"download the file elsewhere, put it at {path}, and run the same command"
        fix = f"Run the command again to resume, or {alternative}."
        raise InputError(release.url, f"cannot be downloaded ({reason})", fix) from error
    return path


def _download_new(release: Release, path: Path) -> None:
    part = path.with_name(f"{path.name}.part")
    _append_missing(release.url, part)
    if not _matches(part, release):
        part.unlink()
        problem = f"the sha256 of the downloaded file is not that of the released file ({release.sha256[:8]}…)"
        raise InputError(release.url, f"{problem}; the download was deleted", "Run the command again.")
    part.replace(path)


def _append_missing(url: str, part: Path) -> None:
    received = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={received}-"} if received else {})
    try:
        response = urllib.request.build_opener(RefuseInsecureRedirects).open(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and received:
            return  # the part is already complete
        raise
    with response:
        missing = response.length  # from Content-Length; None if the header is absent or not a number
        if missing is None:  # otherwise an interrupted download would look complete, and fail its sha256
            raise OSError("the server does not announce the length of the file")
        is_resumed = response.status == 206
        expected_range = f"bytes {received}-{received + missing - 1}/{received + missing}"
        if is_resumed and response.headers["Content-Range"] != expected_range:
            raise OSError("the server sent a different part of the file than the requested one")
        if received and not is_resumed:
            log.info("%s: the server cannot resume a download; it sends the file from the beginning", part)
            received = 0
        if missing > free_bytes(part):
            raise OSError(f"{missing / 1e9:.1f} GB are missing, more than is free in {part.parent}")
        with part.open("ab" if is_resumed else "wb") as file, progress_bar(part.stem, received + missing) as bar:
            bar.update(received)
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
                missing -= len(block)
    if missing > 0:
        raise OSError(f"the connection closed {missing / 1e6:.1f} MB before the end of the file")


class RefuseInsecureRedirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects, except from HTTPS to another protocol."""

    def redirect_request(self, request: urllib.request.Request, *response: Any) -> urllib.request.Request | None:
        if request.type == "https" and urlsplit(new_url := response[-1]).scheme != "https":
            raise OSError(f"it redirects to {new_url}, which is not HTTPS")
        return super().redirect_request(request, *response)


def _matches(path: Path, release: Release) -> bool:
    return file_sha256(path).startswith(release.sha256)
