"""Released checkpoints from their authors' servers: over HTTPS, resumed where they broke off, checked by sha256."""

from __future__ import annotations

import http.client
import logging
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, NamedTuple
from urllib.parse import urlsplit

from convert_weights.checkpoint import progress
from jaxla.cli.files import file_lock, file_sha256, free_bytes
from jaxla.config import InputError

log = logging.getLogger("jaxla.convert_weights")

TIMEOUT = 60  # seconds without a byte

DINOV3_GATE = (
    "DINOv3 comes under Meta's own licence and is never downloaded from here: accept it at https://ai.meta.com/dinov3/ "
    "or on the model's Hugging Face page, download the file there and pass it as --source"
)


class Release(NamedTuple):
    """A file, and what its sha256 begins with."""

    url: str
    sha256: str


_DINOV2 = "https://dl.fbaipublicfiles.com/dinov2"
_TORCHVISION = "https://download.pytorch.org/models"

# Meta publishes no sha256 of its files; these are the ones that independent projects pin and that copies on the Hugging
# Face hub have (each was found in three places or more, finegrain-ai/refiners' conversion script among them).
# torchvision puts the first digits of a file's sha256 into its name; these are the weights IMAGENET1K_V1.
RELEASES = {
    "dinov2_vits14": Release(
        f"{_DINOV2}/dinov2_vits14/dinov2_vits14_pretrain.pth",
        "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
    ),
    "dinov2_vitb14": Release(
        f"{_DINOV2}/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
        "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
    ),
    "dinov2_vitl14": Release(
        f"{_DINOV2}/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
    ),
    "dinov2_vitg14": Release(
        f"{_DINOV2}/dinov2_vitg14/dinov2_vitg14_pretrain.pth",
        "baf8467e50af277596bbbafa06887c177ee899ab46033649c383577d7e9309d3",
    ),
    "dinov2_vits14_reg": Release(
        f"{_DINOV2}/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth",
        "f433177089a681826f849f194ece3bb48f4d63fb38d32fc837e3dc7a4e5641fb",
    ),
    "dinov2_vitb14_reg": Release(
        f"{_DINOV2}/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth",
        "73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71",
    ),
    "dinov2_vitl14_reg": Release(
        f"{_DINOV2}/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth",
        "36e4deffbaef061a2576705b0c36f93621e2ae20bf6274694821b0b492551b51",
    ),
    "dinov2_vitg14_reg": Release(
        f"{_DINOV2}/dinov2_vitg14/dinov2_vitg14_reg4_pretrain.pth",
        "746ecb8c6301c645c5c855be91687d274587d6e48fdaec4a729753160b34a283",
    ),
    "resnet50": Release(f"{_TORCHVISION}/resnet50-0676ba61.pth", "0676ba61"),
    "resnet152": Release(f"{_TORCHVISION}/resnet152-394f9c45.pth", "394f9c45"),
    "vgg16_bn": Release(f"{_TORCHVISION}/vgg16_bn-6c64b313.pth", "6c64b313"),
}


def download(release: Release, folder: Path) -> Path:
    """The released file, under its own name in `folder`: fetched, or as it lies there already.

    When a transfer breaks off, what has come is kept, and the next call goes on from there. Of several processes that
    want the same file one fetches it, and the others wait.

    Raises:
        InputError: the server cannot be reached, refuses or does not say how long the file is, the transfer broke off,
            the folder cannot be read or written, there is no room, or the file is not the one that was released.
    """
    path = folder / release.url.rpartition("/")[2]
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            lock = path.with_name(f"{path.name}.lock")
            with file_lock(lock, f"{path}: another process is fetching it"):
                if fetched := not path.exists():  # nor has another process fetched it by now
                    log.info("fetching %s into %s", release.url, folder)
                    _fetch(release, path)
                # never before the file is there, or one that waits for it and one that makes a new one both fetch
                lock.unlink(missing_ok=True)
            if fetched:
                return path
        log.info("%s: is there already", path)
        if not _is_released(path, release):
            raise InputError(f"{path}: not the released file, whose sha256 begins with {release.sha256[:8]}; remove it")
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(
            f"{release.url}: cannot be fetched ({reason}); run the command again to go on, or fetch the file elsewhere "
            f"and put it at {path} for the same command to find"
        ) from error
    return path


def _fetch(release: Release, path: Path) -> None:
    part = path.with_name(f"{path.name}.part")
    _append_missing(release.url, part)
    if not _is_released(part, release):
        part.unlink()
        raise InputError(
            f"{release.url}: what came is not the released file, whose sha256 begins with {release.sha256[:8]}; it was "
            "removed; run the command again"
        )
    part.replace(path)


def _append_missing(url: str, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.build_opener(StaySecure).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:
            return  # nothing is missing
        raise
    with response:
        missing = response.length  # as announced; None where that is no number, or stands nowhere
        if missing is None:  # a transfer that breaks off would look complete, and the part be removed for its sha256
            raise OSError("the server does not say how long the file is")
        resumed = response.status == 206
        if resumed and response.headers["Content-Range"] != f"bytes {have}-{have + missing - 1}/{have + missing}":
            raise OSError("the server sends another part of the file than the one that is missing")
        if have and not resumed:
            log.info("%s: the server cannot go on where the transfer broke off, and sends all of it again", part)
            have = 0
        if missing > free_bytes(part):
            raise OSError(f"{missing / 1e9:.1f} GB are missing, more than is free in {part.parent}")
        with part.open("ab" if resumed else "wb") as file, progress(part.stem, have + missing) as bar:
            bar.update(have)
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
                missing -= len(block)
    if missing > 0:
        raise OSError(f"the connection broke off {missing / 1e6:.1f} MB before the end")


class StaySecure(urllib.request.HTTPRedirectHandler):
    """Follows a redirection, but never from HTTPS to anything else."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if req.type == "https" and urlsplit(newurl).scheme != "https":
            raise OSError(f"it redirects to {newurl}, which is not HTTPS")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _is_released(path: Path, release: Release) -> bool:
    return file_sha256(path).startswith(release.sha256)
