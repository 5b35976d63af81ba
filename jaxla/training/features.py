"""The cache of a frozen backbone's features: each slice is encoded once, for all epochs and all runs.

`<cache>/features/` has a folder for each backbone, input size and precision, with two files per volume, named by a
hash of its slices: `<name>.npy` [S, h, w, C], or [S, blocks, h, w, C] for a network that reads several blocks, and
`<name>.json`, which is written last and holds the sha256 of the first. Features are stored in the precision in which
they are computed (float32 on CPU, bfloat16 on most GPUs), so storing them loses nothing.

Only the blocks that the network reads are kept. A slice is read from disk when its batch is needed, so memory holds
a few batches, regardless of the number of slices.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxla.cli.files import WRITE_FAULTS, file_lock, file_sha256, free_bytes, write_atomically
from jaxla.cli.terminal import format_bytes, track
from jaxla.config import option
from jaxla.data.arrays import open_array
from jaxla.data.inputs import Canvas
from jaxla.data.prepared import VERSION as PREPARED_VERSION
from jaxla.data.prepared import PreparedVolume
from jaxla.distributed import gather, local_items
from jaxla.mesh import device_count, place_on_devices, shard_batch
from jaxla.models.weights import parameters_sha256

log = logging.getLogger(__name__)

VERSION = 1  # to be increased when features are computed or stored differently; part of the folder's name
BATCH = 8  # slices that the backbone encodes at once, per device
MAX_DISK_FRACTION = 0.9  # fraction of the free disk space that new features may take


@dataclass(frozen=True)
class CachedFeatures:
    """The features [S, …] of a volume's slices, read from disk one slice at a time."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> np.ndarray:
        bits = open_array(self.path)[index]  # stored as integers, because NumPy's format has no bfloat16
        return np.array(bits).view(self.dtype)


class FeatureCache:
    """The features of one frozen backbone at one input size.

    Args:
        network: a network with `features` and its related attributes (see `jaxla.models.networks`).
        arch: name of the backbone's architecture.
        canvas: the square that slices are placed on.

    Attributes:
        extract: function from images [batch, size, size, 1] to features [batch, …].
        input_shape: [batch, size, size, 1].
        batch: number of images that `extract` takes, over all devices.
        how_to_fit: advice on making features fit on the disk, phrased to follow "use".
        folder: the folder of the features.
    """

    def __init__(self, cache_dir: Path, network: nnx.Module, arch: str, canvas: Canvas) -> None:
        graph, state = nnx.split(network)
        extract = jax.jit(lambda state, images: nnx.merge(graph, state).features(images))
        self.extract = partial(extract, place_on_devices(state))
        self.batch = BATCH * device_count()
        self.how_to_fit = " or ".join([f"another {option('cache-dir')}", *network.smaller_features])
        self._canvas = canvas
        size = canvas.size
        self.input_shape = (self.batch, size, size, 1)
        one_batch = jax.eval_shape(self.extract, jax.ShapeDtypeStruct(self.input_shape, np.float32))
        self.shape, self.dtype = one_batch.shape[1:], np.dtype(one_batch.dtype)
        self._description = {
            "version": [VERSION, PREPARED_VERSION],
            "jaxla": importlib.metadata.version("jaxla"),
            "arch": arch,
            "features": network.feature_description,
            "parameters_sha256": parameters_sha256(network.backbone),
            "image_size": size,
            "dtype": self.dtype.name,
        }
        if canvas.extent:
            self._description["extent_mm"] = canvas.extent
        key = hashlib.sha256(json.dumps(self._description).encode()).hexdigest()[:16]
        self.folder = cache_dir / "features" / f"{arch}_{size}px_{self.dtype.name}_{key}"

    def find_missing(self, volumes: Iterable[PreparedVolume]) -> list[PreparedVolume]:
        """Return the volumes whose features are not in the cache yet."""
        return [v for v in volumes if not self._path(v, ".json").exists()]

    def count_bytes(self, volumes: Iterable[PreparedVolume]) -> int:
        """Return the disk space in bytes that the features of volumes take."""
        return sum(v.shape[0] for v in volumes) * int(np.prod(self.shape)) * self.dtype.itemsize

    def fits_on_disk(self, size: int) -> bool:
        """Return whether `size` bytes fit in MAX_DISK_FRACTION of the free disk space."""
        return size <= MAX_DISK_FRACTION * free_bytes(self.folder)

    def features(self, volumes: Sequence[PreparedVolume]) -> list[CachedFeatures] | None:
        """Return the features of each volume, after computing those that are missing; None if the disk has no room.

        Several processes may call it at once: each volume is computed by one of them.
        """
        missing = self.find_missing(volumes)
        needed = self.count_bytes(missing)
        has_room = not missing or self.fits_on_disk(needed)
        if not has_room:
            log.warning(
                "features of %d volumes would take %s in %s, where %s are free: the backbone runs in every epoch "
                "instead. To cache them, use %s",
                len(missing), format_bytes(needed), self.folder, format_bytes(free_bytes(self.folder)), self.how_to_fit,
            )  # fmt: skip
        elif missing:
            log.info(
                "computing the features of %d volumes once, %s, cached in %s",
                len(missing), format_bytes(needed), self.folder,
            )  # fmt: skip
        if not all(gather(has_room)):
            return None
        written: list[PreparedVolume] = []
        # Each process computes its own part, then the other parts if the other processes use another cache folder.
        for part in (local_items(volumes), volumes):
            if not all(gather(self._compute(self.find_missing(part), written))):
                return self._remove(written)
        log.info("checking the features of %d volumes (%s)", len(volumes), format_bytes(self.count_bytes(volumes)))
        with ThreadPoolExecutor() as pool:  # hashing releases the GIL
            intact = list(pool.map(self._is_intact, volumes))
        damaged = [v for v, is_intact in zip(volumes, intact, strict=True) if not is_intact]
        for volume in damaged:
            log.warning("features of %s were damaged (%s): computing them again", volume.id, self._path(volume, ""))
        if not all(gather(self._compute(damaged, written))):
            return self._remove(written)
        return [CachedFeatures(self._path(v, ".npy"), (v.shape[0], *self.shape), self.dtype) for v in volumes]

    def _compute(self, volumes: Sequence[PreparedVolume], written: list[PreparedVolume]) -> bool:
        """Compute and write features, and add the volumes to `written`; return False if the disk cannot be written."""
        if not volumes:
            return True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with file_lock(self.folder / "lock", f"{self.folder}: another process computes features"):
                write_atomically(self.folder / "backbone.json", json.dumps(self._description))
            for volume in track(volumes, "features"):
                if self._compute_once(volume):
                    written.append(volume)
        except OSError as error:
            if error.errno not in WRITE_FAULTS:
                raise
            log.warning(
                "features cannot be cached in %s (%s): the backbone runs in every epoch instead",
                self.folder, error.strerror,
            )  # fmt: skip
            return False
        return True

    def _remove(self, written: Iterable[PreparedVolume]) -> None:
        """Remove features that are useless without the others, because the run needs the disk space."""
        for volume in written:
            for suffix in (".json", ".npy"):
                self._path(volume, suffix).unlink(missing_ok=True)

    def _compute_once(self, volume: PreparedVolume) -> bool:
        """Compute and write a volume's features unless another process has done so; return whether that was needed."""
        lock = self._path(volume, ".lock")
        with file_lock(lock, f"{self.folder}: another process computes features"):
            if is_needed := not self._is_intact(volume):
                self._path(volume, ".json").unlink(missing_ok=True)
                self._write(volume)
            lock.unlink(missing_ok=True)  # a process that waits for the lock finds the features
        return is_needed

    def _write(self, volume: PreparedVolume) -> None:
        path = self._path(volume, ".npy")
        temporary = path.with_suffix(".part")  # the lock is held: no other process writes it
        shape = (volume.shape[0], *self.shape)
        bits = np.dtype(f"u{self.dtype.itemsize}")
        frame = self._canvas.frame(volume.shape[1:], volume.spacing[1:])
        size = self._canvas.size
        try:
            with temporary.open("wb") as file:
                header = {"descr": bits.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for start in range(0, shape[0], self.batch):
                    indices = range(start, min(start + self.batch, shape[0]))
                    images = np.zeros((self.batch, size, size, 1), np.float32)
                    for i, index in enumerate(indices):
                        images[i] = volume.input(index, frame)
                    computed = np.asarray(self.extract(shard_batch(images)))[: len(indices)]
                    file.write(computed.view(bits).tobytes())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        record = {"case": volume.id, "shape": shape, "sha256": file_sha256(path)}
        write_atomically(path.with_suffix(".json"), json.dumps(record))

    def _is_intact(self, volume: PreparedVolume) -> bool:
        path = self._path(volume, ".npy")
        try:
            record: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
            return record["shape"] == [volume.shape[0], *self.shape] and record["sha256"] == file_sha256(path)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _path(self, volume: PreparedVolume, suffix: str) -> Path:
        return self.folder / f"{volume.slices_sha256[:32]}{suffix}"
