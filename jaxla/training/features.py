"""The frozen-feature cache: what a frozen backbone makes of a slice is computed once, for all epochs and all runs.

Under `<cache>/features/` stands a folder for each backbone, input size and precision, and in it a file for each
volume, named by the content of its slices: `<name>.npy` [S, h, w, C], or [S, blocks, h, w, C] where a network reads
several blocks, and `<name>.json`, which is written last and holds the file's sha256. Features are stored in the
precision in which they are computed (float32 on CPU, bfloat16 on most GPUs), so nothing is lost by storing them.

Of a backbone's blocks just those are kept that the network reads. A slice is read when its batch is due: memory holds a
few batches, however many slices there are.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxla.cli.files import file_lock, file_sha256, free_bytes, write_atomically
from jaxla.cli.terminal import format_bytes
from jaxla.config import option
from jaxla.data.arrays import open_array
from jaxla.data.inputs import Canvas
from jaxla.data.prepared import VERSION as PREPARED_VERSION
from jaxla.data.prepared import PreparedVolume
from jaxla.distributed import device_count, gather, local_items, place_on_devices, shard_batch
from jaxla.models.weights import parameters_sha256

log = logging.getLogger(__name__)

VERSION = 1  # of how features are computed and stored; another number makes another folder
BATCH = 8  # slices the backbone takes at once on a device
SHARE_OF_FREE_DISK = 0.9


@dataclass(frozen=True)
class CachedFeatures:
    """The features of a volume's slices, [S, …], read from disk one slice at a time."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> np.ndarray:
        stored = open_array(self.path)
        return np.array(stored[index]).view(self.dtype)  # NumPy's files know no bfloat16: its bits are stored


class FeatureCache:
    """The features of one frozen backbone at one input size.

    Args:
        network: one with `features` and what goes with it (`jaxla/models/networks`).
        arch: of the backbone.
        canvas: the square that slices are laid on.
    """

    def __init__(self, cache_dir: Path, network: nnx.Module, arch: str, canvas: Canvas) -> None:
        graph, state = nnx.split(network)
        extract = jax.jit(lambda state, images: nnx.merge(graph, state).features(images))
        self.extract = partial(extract, place_on_devices(state))  # [batch, size, size, 1] -> [batch, …]
        self.batch = BATCH * device_count()
        self.how_to_fit = " or ".join([f"another {option('cache-dir')}", *network.SMALLER_FEATURES])
        self._canvas, size = canvas, canvas.size
        one_batch = jax.eval_shape(self.extract, jax.ShapeDtypeStruct((self.batch, size, size, 1), np.float32))
        self.shape, self.dtype = one_batch.shape[1:], np.dtype(one_batch.dtype)
        self.describes = {
            "version": [VERSION, PREPARED_VERSION],
            "jaxla": importlib.metadata.version("jaxla"),
            "arch": arch,
            "features": network.FEATURES,
            "parameters_sha256": parameters_sha256(network.backbone),
            "image_size": size,
            "dtype": self.dtype.name,
        }
        if canvas.extent:
            self.describes["extent_mm"] = canvas.extent
        key = hashlib.sha256(json.dumps(self.describes).encode()).hexdigest()[:16]
        self.folder = cache_dir / "features" / f"{arch}_{size}px_{self.dtype.name}_{key}"

    def missing(self, volumes: Iterable[PreparedVolume]) -> list[PreparedVolume]:
        """The volumes whose features are not there yet."""
        return [v for v in volumes if not (self.folder / f"{_name(v)}.json").exists()]

    def bytes_of(self, volumes: Iterable[PreparedVolume]) -> int:
        """The disk space that the features of these volumes take."""
        return sum(v.shape[0] for v in volumes) * int(np.prod(self.shape)) * self.dtype.itemsize

    def free_bytes(self) -> int:
        """What is free on the disk of the cache folder."""
        return free_bytes(self.folder)

    def fits(self, size: int) -> bool:
        """Whether the disk has room for that many bytes more, and some to spare."""
        return size <= SHARE_OF_FREE_DISK * self.free_bytes()

    def features(
        self, volumes: Sequence[PreparedVolume], track: Callable[[Iterable, str], Iterable] = lambda items, label: items
    ) -> list[CachedFeatures] | None:
        """The features of each volume; those not there yet are computed and kept.

        Several processes may do so at once: each volume is computed by one of them.

        Args:
            track: wraps iterations over volumes, for a progress bar; takes a label.

        Returns:
            None where they do not fit on the disk, which the log says.
        """
        absent = self.missing(volumes)
        needed = self.bytes_of(absent)
        fit = not absent or self.fits(needed)
        if not fit:
            log.warning(
                "features of %d volumes would take %s in %s, where %s are free: the backbone runs in every epoch "
                "instead; to keep them, use %s",
                len(absent), format_bytes(needed), self.folder, format_bytes(self.free_bytes()), self.how_to_fit,
            )  # fmt: skip
        elif absent:
            log.info(
                "features of %d volumes are computed once and kept: %s in %s",
                len(absent), format_bytes(needed), self.folder,
            )  # fmt: skip
        if not all(gather(fit)):
            return None
        written: list[PreparedVolume] = []
        # their own shares, then what of the others' does not lie in the same folder
        for part in (local_items(volumes), volumes):
            if not all(gather(self._keep(self.missing(part), track, written))):
                return self._give_back(written)
        log.info("checking the features of %d volumes (%s)", len(volumes), format_bytes(self.bytes_of(volumes)))
        with ThreadPoolExecutor() as pool:  # hashing lets other threads run
            sound = list(pool.map(self._is_sound, volumes))
        damaged = [v for v, is_sound in zip(volumes, sound, strict=True) if not is_sound]
        for volume in damaged:
            log.warning("features of %s were damaged (%s): computed again", volume.id, self.folder / _name(volume))
        if not all(gather(self._keep(damaged, track, written))):
            return self._give_back(written)
        return [CachedFeatures(self.folder / f"{_name(v)}.npy", (v.shape[0], *self.shape), self.dtype) for v in volumes]

    def _keep(
        self,
        volumes: Sequence[PreparedVolume],
        track: Callable[[Iterable, str], Iterable],
        written: list[PreparedVolume],
    ) -> bool:
        """Compute and write what these lack, and add them to `written`; False where the disk refuses."""
        if not volumes:
            return True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with file_lock(self.folder / "lock", f"{self.folder}: another process computes features"):
                write_atomically(self.folder / "backbone.json", json.dumps(self.describes))
            for volume in track(volumes, "features"):
                if self._require(volume):
                    written.append(volume)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
                raise
            log.warning(
                "features cannot be kept in %s (%s): the backbone runs in every epoch instead",
                self.folder, error.strerror,
            )  # fmt: skip
            return False
        return True

    def _give_back(self, written: Iterable[PreparedVolume]) -> None:
        """Remove features that are of no use without the others: the run needs the room."""
        for volume in written:
            for suffix in (".json", ".npy"):
                (self.folder / f"{_name(volume)}{suffix}").unlink(missing_ok=True)

    def _require(self, volume: PreparedVolume) -> bool:
        """Compute and write a volume's features, unless another process has done so by now; whether it was done."""
        lock = self.folder / f"{_name(volume)}.lock"
        with file_lock(lock, f"{self.folder}: another process computes features"):
            if lacks := not self._is_sound(volume):
                (self.folder / f"{_name(volume)}.json").unlink(missing_ok=True)
                self._write(volume)
            lock.unlink(missing_ok=True)  # whoever waits for it finds the features there
        return lacks

    def _write(self, volume: PreparedVolume) -> None:
        path = self.folder / f"{_name(volume)}.npy"
        beside = path.with_suffix(".part")  # the lock is held: no other process writes it
        shape = (volume.shape[0], *self.shape)
        bits = np.dtype(f"u{self.dtype.itemsize}")
        frame, size = self._canvas.frame(volume.shape[1:], volume.spacing[1:]), self._canvas.size
        try:
            with beside.open("wb") as file:
                header = {"descr": bits.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for start in range(0, shape[0], self.batch):
                    chosen = range(start, min(start + self.batch, shape[0]))
                    images = np.zeros((self.batch, size, size, 1), np.float32)
                    for i, index in enumerate(chosen):
                        images[i] = volume.input(index, frame)
                    computed = np.asarray(self.extract(shard_batch(images)))[: len(chosen)]
                    file.write(computed.view(bits).tobytes())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        said = {"case": volume.id, "shape": shape, "sha256": file_sha256(path)}
        write_atomically(path.with_suffix(".json"), json.dumps(said))

    def _is_sound(self, volume: PreparedVolume) -> bool:
        path = self.folder / f"{_name(volume)}.npy"
        try:
            said: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
            return said["shape"] == [volume.shape[0], *self.shape] and said["sha256"] == file_sha256(path)
        except (OSError, ValueError, KeyError, TypeError):
            return False


def _name(volume: PreparedVolume) -> str:
    return volume.slices_sha256[:32]
