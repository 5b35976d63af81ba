"""Checks of NRRD and MetaImage headers, made before SimpleITK reads the file.

ITK replaces a missing field by a default, allocates whatever size a header declares, and its MetaImage reader ends the
process on some damaged headers. After these checks, all voxels and every field that the geometry needs are present.

NRRD: teem.sourceforge.net/nrrd/format.html. MetaImage: itk.org/Wiki/MetaIO/Documentation.
"""

import math
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxla.cli.files import report_os_errors
from jaxla.cli.terminal import shorten
from jaxla.config import InputError

MAX_HEADER_BYTES = 1 << 20
CHUNK_BYTES = 1 << 20
NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?"  # numbers that C and Python read in the same way
EXPORT_AGAIN = "Copy or export the file again."
MAX_LENGTH_ERROR = 1e-3  # error in the length of direction vectors, which are rounded in some files
MILLIMETRES = {"", "mm", "millimeter", "millimetre", "?"}  # MetaIO writes ? for unknown

NRRD_TYPES = {
    1: "char, signed char, int8, int8_t, uchar, unsigned char, uint8, uint8_t",
    2: "short, short int, signed short, signed short int, int16, int16_t, "
    "ushort, unsigned short, unsigned short int, uint16, uint16_t",
    4: "int, signed int, int32, int32_t, uint, unsigned int, uint32, uint32_t, float",
    8: "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t, "
    "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t, double",
}
META_TYPES = {
    1: "MET_CHAR, MET_UCHAR",
    2: "MET_SHORT, MET_USHORT",
    4: "MET_INT, MET_UINT, MET_FLOAT",
    8: "MET_LONG_LONG, MET_ULONG_LONG, MET_DOUBLE",  # MET_LONG may have 4 or 8 bytes, so it is refused
}
# Spaces that ITK converts to its own axes; it takes any other for left-posterior-superior.
NRRD_SPACES = {
    *("right-anterior-superior", "ras", "left-anterior-superior", "las", "left-posterior-superior", "lps"),
}


class Voxels(NamedTuple):
    """The position of a file's voxels, according to its header."""

    path: Path
    offset: int  # position of the first byte; negative if the voxels are the last bytes of the file
    is_compressed: bool
    byte_count: int  # number of bytes without compression
    is_oriented: bool  # the header has a position and orientation


class Fields:
    """The fields of a header by name, read with checks."""

    def __init__(self, path: Path, pairs: list[tuple[str, str]]) -> None:
        """Collect (name, value) pairs; a name that occurs twice is an error."""
        self.path, self.values = path, {}
        for name, value in pairs:
            if name in self.values:
                self.fail(f"the header has two fields '{name}'")
            self.values[name] = value

    def fail(self, problem: str, fix: str = EXPORT_AGAIN) -> None:
        """Raise an InputError on the file."""
        raise InputError(self.path, problem, fix)

    def first_present(self, *names: str) -> str:
        """Return the first of several names that the header has; the first name if it has none."""
        return next((name for name in names if name in self.values), names[0])

    def text(self, name: str, *choices: str, default: str | None = None) -> str:
        """Return a field in lower case. Without a default, it is required; with `choices`, it must be one of them."""
        value = self.values.get(name, default)
        if value is None:
            self.fail(f"the header has no field '{name}'")
        if choices and value.lower() not in choices:
            self.fail(f"'{name}' is '{shorten(value)}' in the header; it must be {' or '.join(choices)}")
        return value.lower()

    def numbers(self, name: str, count: int) -> list[float]:
        """Return a field of `count` finite numbers."""
        words = self.text(name).split()
        numbers = [float(word) for word in words if re.fullmatch(NUMBER, word)]
        if [len(words), len(numbers)] != [count, count] or not all(map(math.isfinite, numbers)):
            wanted = "a number" if count == 1 else f"{count} numbers"
            self.fail(f"'{name}' is '{shorten(self.values[name])}' in the header instead of {wanted}")
        return numbers

    def sizes(self, name: str, dimension_name: str) -> list[int]:
        """Return the number of voxels along each of three axes."""
        (dimension,) = self.numbers(dimension_name, 1)
        if dimension != 3:
            self.fail(f"is {dimension:g}D with shape {shorten(self.text(name))}", "Export one 3D volume per file.")
        if not re.fullmatch(r"[1-9]\d*( +[1-9]\d*){2}", self.text(name)):
            self.fail(f"'{name}' is '{shorten(self.values[name])}' in the header instead of three positive integers")
        return [int(word) for word in self.text(name).split()]

    def type_bytes(self, name: str, types: dict[int, str]) -> int:
        """Return the bytes of one voxel of the field's type."""
        value = self.text(name)
        for byte_count, names in types.items():
            if value in names.lower().split(", "):
                return byte_count
        self.fail(f"unsupported voxel type '{shorten(value)}'", "Export a scalar image of integers or floats.")

    def require_millimetres(self, name: str) -> None:
        """Raise an InputError if lengths have a unit other than mm; ITK ignores units."""
        units = set(re.split(r"[\s\"]+", self.text(name, default="")))
        if unsupported := sorted(units - MILLIMETRES):
            self.fail(f"lengths are in {shorten(', '.join(unsupported))}", "Export the file in mm.")


def check_header(path: Path) -> tuple[str, ...]:
    """Check the header of a .nrrd, .nhdr, .mha or .mhd file, and that the file holds the declared voxels.

    Returns:
        Warnings about the header.

    Raises:
        InputError: the file cannot be read, is damaged or truncated, or holds anything but one 3D scalar image.
    """
    with report_os_errors("read", path, "Make the file readable."):
        voxels = locate_voxels(path)
        _require_voxels(path, voxels)
    if voxels.is_oriented:
        return ()
    return ("no orientation is recorded; assuming the axes left, posterior, superior",)


def locate_voxels(path: Path) -> Voxels:
    """Read and check the header of a .nrrd, .nhdr, .mha or .mhd file, and return where its voxels are."""
    with path.open("rb") as file:
        start = file.read(MAX_HEADER_BYTES)
    if not start:
        raise InputError(path, "the file is empty", EXPORT_AGAIN)
    return (_check_nrrd if path.suffix.lower() in (".nrrd", ".nhdr") else _check_meta)(path, start)


def _check_nrrd(path: Path, start: bytes) -> Voxels:
    if not re.match(rb"NRRD000[1-5]\r?\n", start):
        raise InputError(path, "not an NRRD file", EXPORT_AGAIN)
    header_end = re.search(rb"\n\r?\n", start)
    lines = start[: header_end.start() if header_end else len(start)].decode("latin-1").splitlines()[1:]
    pairs = [line.split(":", 1) for line in lines if re.match(r"[^#:]+:(?!=)", line)]  # without `key:=value`, free text
    fields = Fields(path, [(name.lower().replace(" ", ""), value.strip()) for name, value in pairs])

    sizes = fields.sizes("sizes", "dimension")
    item_bytes = fields.type_bytes("type", NRRD_TYPES)
    if item_bytes > 1:
        fields.text("endian", "little", "big")
    is_compressed = fields.text("encoding", "raw", "gzip", "gz") != "raw"
    for name in ("spaceunits", "units"):
        fields.require_millimetres(name)
    is_oriented = _check_nrrd_grid(fields)

    is_local = "datafile" not in fields.values
    if is_local and not header_end:
        fields.fail("truncated: the header has no end")
    fields.text("lineskip", "0", default="0")
    skip = fields.text("byteskip", default="0")
    if not re.fullmatch(r"-1|\d{1,12}", skip) or (is_compressed and skip != "0"):
        fields.fail(f"'byte skip' is '{shorten(skip)}' in the header", "Export it as .nrrd.")
    data_path, offset = (path, header_end.end()) if is_local else (_data_file(fields, "datafile"), 0)
    offset = -1 if skip == "-1" else offset + int(skip)
    return Voxels(data_path, offset, is_compressed, math.prod(sizes) * item_bytes, is_oriented)


def _check_nrrd_grid(fields: Fields) -> bool:
    """Check spacing, orientation and origin, and return whether all are present."""
    if "spacedirections" in fields.values:
        text = fields.values["spacedirections"]
        vectors = [vector.split(",") for vector in re.findall(r"\(([^()]*)\)", text)]
        fields.values["spacedirections"] = " ".join(word for vector in vectors for word in vector)
        if re.sub(r"\([^()]*\)", "", text).strip() or [len(vector) for vector in vectors] != [3, 3, 3]:
            fields.fail(f"'space directions' is '{shorten(text)}' in the header instead of three vectors")
        fields.numbers("spacedirections", 9)
    elif "spacings" in fields.values:
        _require_positive(fields, "spacings")
    else:
        fields.fail("no voxel spacing in the header", "Set the true spacing in mm.")
    if "spaceorigin" in fields.values:
        fields.values["spaceorigin"] = re.sub(r"[(),]", " ", fields.values["spaceorigin"])
        fields.numbers("spaceorigin", 3)
    has_all = {"spacedirections", "spaceorigin"} <= fields.values.keys()
    return has_all and fields.text("space", default="") in NRRD_SPACES


def _check_meta(path: Path, start: bytes) -> Voxels:
    header_end = re.search(rb"^ElementDataFile *[=:].*(\n|\Z)", start, re.MULTILINE)
    if not header_end:
        raise InputError(path, "not a MetaImage file, or its header is truncated", EXPORT_AGAIN)
    lines = start[: header_end.end()].decode("latin-1").splitlines()
    pairs = [re.split(" *[=:] *", line.strip(), maxsplit=1) for line in lines if line.strip()]
    if broken := [pair[0] for pair in pairs if len(pair) < 2]:
        raise InputError(path, f"the header has a line without a value: '{shorten(broken[0])}'", EXPORT_AGAIN)
    fields = Fields(path, [(name, value) for name, value in pairs])

    fields.text("ObjectType", "image")
    sizes = fields.sizes("DimSize", "NDims")
    item_bytes = fields.type_bytes("ElementType", META_TYPES)
    fields.text("ElementNumberOfChannels", "1", default="1")
    fields.text("BinaryData", "true")
    if item_bytes > 1:
        fields.text(fields.first_present("BinaryDataByteOrderMSB", "ElementByteOrderMSB"), "true", "false")
    fields.require_millimetres("DistanceUnits")
    for name, neutral in (("ElementToIntensityFunctionSlope", 1), ("ElementToIntensityFunctionOffset", 0)):
        if name in fields.values and fields.numbers(name, 1) != [neutral]:
            fields.fail(f"grey values are scaled by '{name}', which most programs ignore", "Export true grey values.")
    is_oriented = _check_meta_grid(fields)

    is_compressed = fields.text("CompressedData", "true", "false", default="false") == "true"
    byte_count = math.prod(sizes) * item_bytes
    skip = fields.text("HeaderSize", default="0")
    is_local = fields.text("ElementDataFile") == "local"
    if not re.fullmatch(r"-1|\d{1,12}", skip) or (skip != "0" and (is_compressed or is_local)):
        fields.fail(f"'HeaderSize' is '{shorten(skip)}' in the header", "Export it as .mha.")
    data_path = path if is_local else _data_file(fields, "ElementDataFile")
    voxels = Voxels(data_path, header_end.end() if is_local else int(skip), is_compressed, byte_count, is_oriented)
    if is_compressed and (is_local or "CompressedDataSize" in fields.values):
        _require_compressed_size(fields, voxels)
    return voxels


def _check_meta_grid(fields: Fields) -> bool:
    """Check spacing, orientation and origin, and return whether all are present."""
    _require_positive(fields, fields.first_present("ElementSpacing", "ElementSize"))
    matrix = fields.first_present("TransformMatrix", "Rotation", "Orientation")
    offset = fields.first_present("Offset", "Position", "Origin")
    if matrix in fields.values:
        axes = np.reshape(fields.numbers(matrix, 9), (3, 3))
        if np.abs(np.linalg.norm(axes, axis=1) - 1).max() > MAX_LENGTH_ERROR:
            fields.fail(f"the axes of '{matrix}' in the header are not of length 1")
    if offset in fields.values:
        fields.numbers(offset, 3)
    return {matrix, offset} <= fields.values.keys()


def _require_compressed_size(fields: Fields, voxels: Voxels) -> None:
    """Raise an InputError unless the header has the compressed size: without it, ITK returns wrong voxels."""
    present = voxels.path.stat().st_size - voxels.offset
    if fields.numbers("CompressedDataSize", 1) != [present]:
        declared = shorten(fields.text("CompressedDataSize"))
        fields.fail(f"truncated or damaged: {present} compressed bytes, but the header declares {declared}")


def _require_positive(fields: Fields, name: str) -> None:
    if min(fields.numbers(name, 3)) <= 0:
        fields.fail(f"invalid voxel spacing {shorten(fields.text(name))} in the header", "Set the true spacing in mm.")


def _data_file(fields: Fields, name: str) -> Path:
    """Return the file with the voxels, which a header names relative to its own folder."""
    value = fields.values[name]
    if value.upper().startswith("LIST") or "%" in value or not value:
        fields.fail(f"its voxels are in several files ('{shorten(value)}')", "Export it as one file.")
    path = fields.path.parent / value
    if not path.is_file():
        fields.fail(f"its voxels are in '{shorten(value)}', which does not exist", "Copy both files.")
    return path


def _require_voxels(path: Path, voxels: Voxels) -> None:
    """Compare the declared size with the bytes in the file, without holding them in memory."""
    size = voxels.path.stat().st_size
    present = size if voxels.offset < 0 else size - voxels.offset
    if voxels.is_compressed:
        present = _uncompressed_bytes(path, voxels)
    is_right = present >= voxels.byte_count if voxels.offset < 0 else present == voxels.byte_count
    if not is_right:
        more = "at least " if voxels.is_compressed and present > voxels.byte_count else ""
        problem = (
            f"truncated or damaged: {more}{max(present, 0)} bytes of voxels, but the header declares "
            f"{voxels.byte_count}"
        )
        raise InputError(path, problem, EXPORT_AGAIN)


def _uncompressed_bytes(path: Path, voxels: Voxels) -> int:
    """Return the length of a zlib or gzip stream, checksum included; stop once it exceeds the declared length."""
    stream = zlib.decompressobj(wbits=47)  # 47: a zlib or gzip header
    count = 0
    try:
        with voxels.path.open("rb") as file:
            file.seek(voxels.offset)
            while not stream.eof and count <= voxels.byte_count:
                compressed = stream.unconsumed_tail or file.read(CHUNK_BYTES)
                if not compressed:
                    raise zlib.error("the stream has no end")
                count += len(stream.decompress(compressed, CHUNK_BYTES))
            if stream.eof and (stream.unused_data or file.read(1)):
                raise zlib.error("bytes after the end of the stream")
    except zlib.error as error:
        raise InputError(path, f"truncated or damaged ({error})", EXPORT_AGAIN) from error
    return count
