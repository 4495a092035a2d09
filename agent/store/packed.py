"""Arrays of rewards as the bytes of a database column, and back bit for bit."""

import io
import zlib

import numpy as np
from numpy.typing import NDArray

Rewards = NDArray[np.float64]


def pack(rewards: Rewards) -> bytes:
    """Float64 array -> zlib of its npy form, which carries shape and dtype and no code."""
    file = io.BytesIO()
    np.save(file, np.asarray(rewards, np.float64), allow_pickle=False)
    return zlib.compress(file.getvalue())


def unpack(blob: bytes) -> Rewards:
    """Inverse of ``pack``: the float64 array, bit for bit."""
    array: Rewards = np.load(io.BytesIO(zlib.decompress(blob)), allow_pickle=False)
    return array
