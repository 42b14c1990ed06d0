"""Images of all kinds to pixels: modes, depths, transparency, orientation, damage, and sizes that are not to be decoded."""

import io
import itertools
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torchvision
from PIL import Image, ImageOps

from dmat_ray.data.decoding import READERS, decode, encode
from dmat_ray.data.pixels import to_unit

N = 16
LEVELS = np.linspace(0, 255, 16).astype(np.uint8).reshape(4, 4).repeat(4, 0).repeat(4, 1)
GREY = Image.fromarray(LEVELS)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def noise(*shape: int, most: int = 255, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, most + 1, shape)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(samples: np.ndarray, depth: int, color: int, *chunks: bytes) -> bytes:
    """A PNG as its specification says: `samples` (H, W) or (H, W, C), of 1, 8 or 16 bits."""
    height, width = samples.shape[:2]
    rows = samples.astype(">u2" if depth == 16 else np.uint8)
    if depth < 8:
        bits = np.unpackbits(rows[..., None], axis=2)[..., 8 - depth :]
        rows = np.packbits(bits.reshape(height, -1), axis=1)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + data + chunk(b"IEND", b"")


def on_white(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """What is seen of a picture that lies over white; alpha from 0 to 255."""
    share = alpha[..., None] / 255 if color.ndim == 3 else alpha / 255
    return color * share + 255 * (1 - share)


def as_modes() -> dict[str, bytes]:
    """One 16x16 grey picture in the ways that files hold it."""
    wide = LEVELS.astype(np.uint16) * 257
    return {
        "grey": encoded(GREY),
        "rgb": encoded(GREY.convert("RGB")),
        "rgba": encoded(GREY.convert("RGBA")),
        "grey + alpha": encoded(GREY.convert("LA")),
        "palette": encoded(GREY.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE, colors=256)),
        "gif": encoded(GREY, "GIF"),
        "16 bit": encoded(Image.fromarray(wide)),
        "16 bit tiff": encoded(Image.fromarray(wide), "TIFF"),
        "16 bit tiff, white is zero": encoded(Image.fromarray(65535 - wide), "TIFF", tiffinfo={262: 0}),
        "16 bit pgm": encoded(Image.fromarray(wide.astype(np.int32)), "PPM"),
        "16 bit rgb": png(wide[..., None].repeat(3, 2), 16, 2),
        "16 bit rgba": png(np.dstack([wide, wide, wide, np.full_like(wide, 65535)]), 16, 6),
        "bmp": encoded(GREY, "BMP"),
        "cmyk tiff": encoded(GREY.convert("RGB").convert("CMYK"), "TIFF"),
        "webp": encoded(GREY.convert("RGB"), "WEBP", lossless=True),
        "big-endian tiff": encoded(Image.open(io.BytesIO(encoded(GREY, "TIFF"))), "TIFF", big_tiff=True),
        "animated gif": encoded(GREY, "GIF", save_all=True, append_images=[Image.new("L", GREY.size)]),
        "animated png": encoded(GREY, "PNG", save_all=True, append_images=[Image.new("L", GREY.size)]),
        "animated webp": encoded(
            GREY.convert("RGB"), "WEBP", save_all=True, append_images=[Image.new("RGB", GREY.size)], lossless=True
        ),
        "pages of tiff": encoded(GREY, "TIFF", save_all=True, append_images=[Image.new("L", GREY.size)]),
    }


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", as_modes())
def test_every_mode_decodes_to_the_same_picture(mode: str, channels: int) -> None:
    pixels = decode(as_modes()[mode], N, channels)
    assert (pixels.shape, pixels.dtype) == ((channels, N, N), np.uint8)
    for plane in pixels:
        np.testing.assert_allclose(plane.astype(int), LEVELS, atol=1)


def test_16_bits_keep_their_upper_byte_in_every_channel() -> None:
    samples = noise(N, N, 3, most=65535)
    np.testing.assert_array_equal(decode(png(samples, 16, 2), N, 3), (samples >> 8).transpose(2, 0, 1))
    np.testing.assert_array_equal(decode(png(samples[..., 0], 16, 0), N, 1)[0], samples[..., 0] >> 8)


def test_one_bit() -> None:
    bits = noise(N, N, most=1)
    np.testing.assert_array_equal(decode(png(bits, 1, 0), N, 1)[0], bits * 255)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(bits.astype(bool)), "TIFF"), N, 1)[0], bits * 255)


def test_alpha_lies_on_white() -> None:
    color, alpha = noise(N, N, 3), noise(N, N, seed=1)
    grey = color[..., 0]
    contents = {
        "RGBA": png(np.dstack([color, alpha]), 8, 6),
        "16 bits": png(np.dstack([color, alpha]) * 257, 16, 6),
        "TIFF": encoded(Image.fromarray(np.dstack([color, alpha]).astype(np.uint8)), "TIFF"),
        "WebP": encoded(Image.fromarray(np.dstack([color, alpha]).astype(np.uint8)), "WEBP", lossless=True, exact=True),
    }
    for name, content in contents.items():
        np.testing.assert_allclose(decode(content, N, 3), on_white(color, alpha).transpose(2, 0, 1), atol=1, err_msg=name)
    np.testing.assert_allclose(decode(png(np.dstack([grey, alpha]), 8, 4), N, 1)[0], on_white(grey, alpha), atol=1)


def test_a_transparent_colour_becomes_white() -> None:
    grey, color = noise(N, N, most=65535), noise(N, N, 3, most=65535)
    white = np.full(3, 255)
    for depth, shift in ((8, 8), (16, 0)):
        g, c = grey >> shift, color >> shift
        key, keys = g[3, 4], c[3, 4]
        seen = np.where(g == key, 255, g >> (8 - shift))
        np.testing.assert_array_equal(decode(png(g, depth, 0, chunk(b"tRNS", struct.pack(">H", key))), N, 1)[0], seen)
        seen = np.where((c == keys).all(2, keepdims=True), white, c >> (8 - shift))
        found = decode(png(c, depth, 2, chunk(b"tRNS", struct.pack(">HHH", *keys))), N, 3)
        np.testing.assert_array_equal(found, seen.transpose(2, 0, 1))
    for depth in (1, 2, 4):  # stretched to 8 bits, as is said of samples in the specification of PNG
        most = 2**depth - 1
        g = noise(N, N, most=most)
        for key in range(most + 1):
            found = decode(png(g, depth, 0, chunk(b"tRNS", struct.pack(">H", key))), N, 1)[0]
            np.testing.assert_array_equal(found, np.where(g == key, 255, g * (255 // most)), err_msg=f"{key} of {depth} bits")


def test_transparency_of_palettes() -> None:
    index, palette, alpha = noise(N, N, most=3), noise(4, 3), np.array([0, 128, 255, 30])
    content = png(
        index, 8, 3, chunk(b"PLTE", palette.astype(np.uint8).tobytes()), chunk(b"tRNS", alpha.astype(np.uint8).tobytes())
    )
    np.testing.assert_allclose(decode(content, N, 3), on_white(palette[index], alpha[index]).transpose(2, 0, 1), atol=1)
    image = Image.fromarray(index.astype(np.uint8), "P")
    image.putpalette(palette.astype(np.uint8).tobytes())
    seen = np.where((index == 2)[..., None], 255, palette[index])
    np.testing.assert_array_equal(decode(encoded(image, "GIF", transparency=2), N, 3), seen.transpose(2, 0, 1))


def flat_cmyk_jpeg(stored: tuple[int, int, int, int], transform: int) -> bytes:
    """A JPEG of four components with these values everywhere; `transform` of its Adobe marker: 0 is CMYK, 2 is YCCK."""
    image = Image.merge("CMYK", [Image.new("L", (N, N), 255 - value) for value in stored])  # Pillow writes the inverse
    content = encoded(image, "JPEG", quality=100)
    place = content.index(b"Adobe") + 11
    return content[:place] + bytes([transform]) + content[place + 1 :]


@pytest.mark.parametrize("transform", [0, 2])
def test_jpegs_of_four_inks(transform: int) -> None:
    """Adobe stores 255 - ink; of YCCK the first three are the YCbCr of that (JFIF's formula)."""
    first, second, third, k = stored = (200, 110, 150, 220)
    rgb = np.array([first, second, third], float)
    if transform == 2:
        red, blue = third - 128, second - 128
        # as libjpeg has it, YCCK holds the RGB that is 255 - CMY, and CMYK is stored as it comes out
        rgb = 255 - np.array([first + 1.402 * red, first - 0.344136 * blue - 0.714136 * red, first + 1.772 * blue])
    wanted = rgb * k / 255
    found = decode(flat_cmyk_jpeg(stored, transform), N, 3)
    np.testing.assert_allclose(found.mean(axis=(1, 2)), wanted, atol=2.5)


@pytest.mark.parametrize(("kind", "orientation"), itertools.product(("JPEG", "PNG", "WEBP", "TIFF"), range(1, 9)))
def test_orientation_is_applied(kind: str, orientation: int) -> None:
    """Against the corners as the EXIF standard names them: what was the 0th row and column of the scene."""
    upright = np.kron([[250, 170], [90, 10]], np.ones((8, 8))).astype(np.uint8)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.T, 6: np.rot90(upright), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(kind, {})
    image = Image.fromarray(np.ascontiguousarray(stored)).convert("RGB")
    content = encoded(image, kind, exif=exif, **options)
    np.testing.assert_allclose(decode(content, N, 1)[0].astype(int), upright, atol=3)
    theirs = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("L"))
    np.testing.assert_array_equal(decode(content, N, 1)[0], theirs)


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
def test_damaged_exif_does_not_cost_a_picture(exif: bytes) -> None:
    content = encoded(GREY.convert("RGB"), "JPEG", quality=100, exif=exif)
    np.testing.assert_allclose(decode(content, N, 1)[0].astype(int), LEVELS, atol=6)


@pytest.mark.parametrize("size", [(4, 4), (5, 9), (16, 17), (7, 200), (200, 7), (33, 31), (500, 500)])
@pytest.mark.parametrize("channels", [1, 3])
def test_odd_sizes_are_scaled_and_cropped(size: tuple[int, int], channels: int) -> None:
    pixels = decode(encoded(Image.new("RGB", size, (90, 90, 90))), N, channels)
    assert pixels.shape == (channels, N, N)
    assert set(np.unique(pixels)) <= {89, 90, 91}


def test_the_crop_is_central() -> None:
    wide = np.zeros((16, 48), np.uint8)
    wide[:, 16:32] = LEVELS
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(wide)), N, 1)[0], LEVELS)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(wide.T.copy())), N, 1)[0], LEVELS.T)


DAMAGED = {
    "empty": (b"", "it has 0 bytes"),
    "text": (b"<!DOCTYPE html>", r"it begins with b'<!DOCTYPE ht', which is none of JPEG, PNG"),
    # Pillow would hand it to another program
    "postscript": (encoded(GREY, "EPS"), "it begins with b'%!PS-Adobe-3', which is none of"),
    "png": (encoded(GREY)[:60], r"damaged PNG \("),
    "jpeg": (encoded(GREY, "JPEG")[:300], r"damaged JPEG \("),
    "end of a jpeg": (
        encoded(Image.fromarray(noise(64, 64).astype(np.uint8)), "JPEG")[:-500],
        r"damaged JPEG \(image file is trunc",
    ),
    "gif": (encoded(GREY, "GIF")[:80], r"damaged GIF \("),
    "webp": (encoded(GREY.convert("RGB"), "WEBP")[:40], r"damaged WebP \("),
    "bmp": (encoded(GREY, "BMP")[:300], r"damaged BMP \("),
    "ppm": (encoded(GREY, "PPM")[:100], r"damaged netpbm \("),
    "tiff": (encoded(GREY, "TIFF")[:200], r"damaged TIFF \("),
    # where the strips of pixels begin is said to be a text: Pillow stumbles with a TypeError
    "tags of a tiff": (encoded(GREY, "TIFF").replace(b"\x11\x01\x04\x00", b"\x11\x01\x02\x00"), r"damaged TIFF \("),
    "floating point": (encoded(GREY.convert("F"), "TIFF"), "TIFF with floating-point values, of which no range is known"),
    "32 bits": (encoded(GREY.convert("I"), "TIFF"), "TIFF with signed or 32-bit integers, of which no range is known"),
    **{f"nothing but the beginning of {k}": (b[0], rf"damaged {k} \(") for b, k, _ in READERS if k != "WebP"},
    "sound": (b"RIFF\x24\0\0\0WAVEfmt ", r"it begins with b'RIFF\$.*', which is none of"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_cannot_be_read_gives_the_reason_on_one_line(name: str) -> None:
    content, reason = DAMAGED[name]
    with pytest.raises(ValueError, match=f"^cannot be read as an image: {reason}") as caught:
        decode(content, N, 1)
    assert "\n" not in str(caught.value)
    assert " at 0x" not in str(caught.value)


def test_damage_anywhere_is_a_value_error_or_a_picture() -> None:
    """Bits turned over and ends cut off: never another error."""
    rng = np.random.default_rng(0)
    contents = [
        content for name, content in as_modes().items() if name in ("palette", "16 bit tiff", "webp", "gif", "16 bit rgba")
    ]
    contents.append(encoded(GREY.convert("RGB"), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0"))
    found: list[str | None] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for content, k in itertools.product(contents, range(60)):
            damaged = bytearray(content)
            for place in rng.integers(0, len(content), 1 + k % 3):
                damaged[place] = rng.integers(256)
            end = len(content) if k % 2 else rng.integers(len(content) // 2, len(content))
            found.append(_reason(bytes(damaged[:end])))
    reasons = [reason for reason in found if reason is not None]
    assert 20 < len(reasons) < len(found) - 20
    assert not any("\n" in reason or " at 0x" in reason for reason in reasons)


def _reason(content: bytes) -> str | None:
    """Why it cannot be decoded; None if it can."""
    try:
        assert decode(content, N, 3, 10**6).shape == (3, N, N)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("size", "reason"), [((600, 8), "is 600x8 pixels, too narrow"), ((3, 5), "is 3x5 pixels, too small"), ((1, 1), "too small")]
)
def test_what_makes_no_picture_of_this_size(size: tuple[int, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode(encoded(Image.new("L", size)), N, 1)


def test_too_many_pixels_are_known_before_they_are_decoded() -> None:
    """The headers say 900 million, the files hold nothing else."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 0, 0, 0, 0))
    bmp = bytearray(encoded(Image.new("L", (8, 8)), "BMP"))
    bmp[18:26] = struct.pack("<ii", 30000, 30000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for content in (b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b""), bytes(bmp), b"P5 30000 30000 255\n"):
            with pytest.raises(ValueError, match=r"^is 30000x30000 pixels, more than data\.max_pixels = 50000000$"):
                decode(content, N, 1, 50_000_000)
    with pytest.raises(ValueError, match=r"is 16x17 pixels, more than data\.max_pixels = 271"):
        decode(encoded(Image.new("L", (16, 17))), N, 1, 271)
    assert decode(encoded(Image.new("L", (16, 17))), N, 1, 272).shape == (1, N, N)


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("TIFF", {"compression": "group4"})])
def test_a_limit_above_that_of_pillow(kind: str, options: dict[str, str]) -> None:
    """Pillow warns from 89 million pixels on, and refuses 179 million."""
    content = encoded(Image.new("1", (200_000, 1000), 1), kind, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="200000x1000 pixels, too narrow"):
            decode(content, N, 1, 200_000_000)


def test_threads_do_not_disturb_each_other() -> None:
    contents = [*as_modes().values(), *(content for content, _ in DAMAGED.values())]

    def outcome(content: bytes) -> bytes | str:
        try:
            return decode(content, N, 3).tobytes()
        except ValueError as error:
            return str(error)

    alone = [outcome(content) for content in contents]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(outcome, contents * 10)) == alone * 10


def test_encode_and_to_unit() -> None:
    rng = np.random.default_rng(0)
    for channels in (1, 3):
        pixels = rng.integers(0, 256, (channels, N, N), dtype=np.uint8)
        np.testing.assert_array_equal(decode(encode(pixels), N, channels), pixels)
        np.testing.assert_allclose(to_unit(pixels).numpy() * 255, pixels, atol=1e-4)


@pytest.mark.parametrize("size", [(40, 24), (20, 50), (12, 12)])
def test_other_ways_to_bring_an_image_to_size(size: tuple[int, int]) -> None:
    picture = Image.fromarray(noise(size[1], size[0], 3).astype(np.uint8))
    content = encoded(picture)
    stretched = decode(content, N, 3, resize="stretch")
    theirs = np.asarray(torchvision.transforms.Resize((N, N))(picture)).transpose(2, 0, 1)
    np.testing.assert_array_equal(stretched, theirs, "torchvision's, as published")
    padded = decode(content, N, 3, resize="pad")
    scale = min(1, N / max(size))
    inner = picture.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.LANCZOS)
    whole = ImageOps.pad(inner, (N, N)) if scale < 1 else ImageOps.expand(inner, 2)
    np.testing.assert_array_equal(padded, np.asarray(whole).transpose(2, 0, 1))
    np.testing.assert_array_equal(decode(content, N, 3), decode(content, N, 3, resize="crop"))


def test_digits_on_black_are_those_of_the_package() -> None:
    digit = noise(28, 28).astype(np.uint8)
    np.testing.assert_array_equal(decode(encode(digit[None]), 32, 1, resize="pad")[0], np.pad(digit, 2))
