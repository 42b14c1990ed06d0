"""Grey images of more than 8 bits; TIFFs are written as TIFF 6.0 says (sections 2 and 8), most not by Pillow."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dmat_ray.data.decoding import decode, highest_level

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


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("count", [256, 1000, 4096, 65536])
def test_levels_that_16_bits_are_said_to_hold(kind: str, count: int) -> None:
    """Equal steps from black to white; what has a higher level is not what was said."""
    levels = np.linspace(0, count - 1, N * N).astype(np.uint16).reshape(N, N)
    Image.fromarray(levels).save(buffer := io.BytesIO(), kind)
    pixels = decode(buffer.getvalue(), N, 1, grey_levels=count)[0]
    np.testing.assert_array_equal(pixels, np.floor(levels / count * 256))
    assert (pixels[0, 0], pixels[-1, -1]) == (0, 255)
    assert highest_level(buffer.getvalue()) == count - 1
    if count > 256:
        with pytest.raises(ValueError, match=rf"{kind} with a level of {count - 1}, where data\.grey_levels = 256 ends at 255"):
            decode(buffer.getvalue(), N, 1, grey_levels=256)


def test_what_says_its_levels_itself_is_taken_at_its_word() -> None:
    """PGM has its highest level in the header, and TIFF of 12 bits as many as they hold."""
    ramp = np.arange(N * N).reshape(N, N) * 16
    for content in (b"P5\n16 16\n4095\n" + ramp.astype(">u2").tobytes(), tiff(ramp, 12)):
        for count in (256, 65536):
            np.testing.assert_allclose(decode(content, N, 1, grey_levels=count)[0], ramp // 16, atol=1)
        assert highest_level(content) is None
    inverted = tiff(4095 - ramp, 16, photometric=0)
    np.testing.assert_array_equal(decode(inverted, N, 1, grey_levels=4096)[0], ramp // 16)


def test_a_transparent_level_above_the_others_is_white() -> None:
    levels = np.arange(N * N, dtype=np.uint16).reshape(N, N)
    levels[3, 4] = 65535
    Image.fromarray(levels).save(buffer := io.BytesIO(), "PNG", transparency=65535)
    expected = np.where(levels == 65535, 255, levels)
    np.testing.assert_array_equal(decode(buffer.getvalue(), N, 1, grey_levels=256)[0], expected)
