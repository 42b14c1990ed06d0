"""Grey TIFFs of more than 8 bits, written as TIFF 6.0 says (sections 2 and 8), not by Pillow."""

import struct
import zlib

import numpy as np
import pytest

from dmat_ray.data.decoding import decode

N = 16
SHORT, LONG = 3, 4
NOT_COMPRESSED, DEFLATE = 1, 8


def tiff(samples: np.ndarray, bits: int, *, compression: int = NOT_COMPRESSED, photometric: int = 1) -> bytes:
    """Little-endian, in one strip; samples of 12 bits are packed, high bits first, and rows begin at a byte."""
    height, width = samples.shape
    if bits == 12:
        planes = (samples[..., None] >> np.arange(11, -1, -1)) & 1
        data = np.packbits(planes.reshape(height, -1), axis=1).tobytes()
    else:
        data = samples.astype("<u2").tobytes()
    if compression == DEFLATE:
        data = zlib.compress(data)
    tags = {256: width, 257: height, 258: bits, 259: compression, 262: photometric, 273: 0, 277: 1, 278: height, 279: len(data)}
    tags[273] = 8 + 2 + 12 * len(tags) + 4  # where the strip begins
    entries = b"".join(
        struct.pack("<HHII", tag, LONG if tag in (273, 279) else SHORT, 1, value) for tag, value in sorted(tags.items())
    )
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + data


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("compression", [NOT_COMPRESSED, DEFLATE])
@pytest.mark.parametrize("bits", [12, 16])
def test_a_ramp_from_black_to_white(bits: int, compression: int, channels: int) -> None:
    levels = np.arange(N * N).reshape(N, N)  # every grey of 8 bits
    most = (1 << bits) - 1
    content = tiff(np.rint(levels / 255 * most).astype(int), bits, compression=compression)
    for plane in decode(content, N, channels):
        np.testing.assert_allclose(plane.astype(int), levels, atol=1)
        assert (plane[0, 0], plane[-1, -1]) == (0, 255)


def test_every_level_gives_its_upper_bits() -> None:
    samples = np.random.default_rng(0).integers(0, 4096, (N, N))
    np.testing.assert_array_equal(decode(tiff(samples, 12), N, 1)[0], samples >> 4)


def test_white_is_zero() -> None:
    """Of 16 bits. Of 12 Pillow reads none such, which is told."""
    levels = np.arange(N * N).reshape(N, N)
    np.testing.assert_array_equal(decode(tiff(65535 - levels * 257, 16, photometric=0), N, 1)[0], levels)
    with pytest.raises(ValueError, match="cannot be read as an image: damaged TIFF"):
        decode(tiff(4095 - levels * 16, 12, photometric=0), N, 1)
