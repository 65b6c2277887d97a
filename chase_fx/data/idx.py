"""The IDX file format of the MNIST family: a magic number, big-endian sizes, then one byte a value.

Two zero bytes, one byte for the type of a value (0x08: unsigned byte), one byte for the number of dims, a big-endian
uint32 for each dim, then the values in row-major order.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from chase_fx.data.errors import DataError

__all__ = ["read_idx"]

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path, dims: int) -> npt.NDArray[np.uint8]:
    """Read a gzipped IDX file of unsigned bytes.

    Args:
        path: the ``.gz`` file.
        dims: how many dims the array must have (3 for images, 1 for labels).

    Returns:
        A read-only array of the sizes that the header states.

    Raises:
        DataError: the file is missing, no gzip file, cut short, longer than its header says, or of another type.
    """
    raw = _unzip(path)
    header = 4 + 4 * dims
    if len(raw) < header:
        raise DataError(
            f"{path} is truncated: an IDX header of {dims} dims has {header} bytes, found {len(raw)}. "
            "Delete it and fetch it again."
        )
    zeros, kind, found_dims = struct.unpack(">HBB", raw[:4])
    if zeros != 0 or kind != _UNSIGNED_BYTE or found_dims != dims:
        raise DataError(
            f"{path} is not an IDX file of bytes with {dims} dims: its magic number is 0x{raw[:4].hex()}, "
            f"expected 0x0000{_UNSIGNED_BYTE:02x}{dims:02x}. Check that images and labels are not swapped."
        )
    shape = struct.unpack(f">{dims}I", raw[4:header])
    expected = math.prod(shape)
    if len(raw) - header != expected:
        raise DataError(
            f"{path} does not hold what its header says: sizes {shape} take {expected} bytes, "
            f"found {len(raw) - header}. Delete it and fetch it again."
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape)


def _unzip(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist.") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}). Delete it and fetch it again.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
