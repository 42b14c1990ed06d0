"""Encoded images to pixels and back. All of it may run in many threads at once, and needs no torch."""

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from dmat_ray.config import DataConfig

# once for the whole process: `max_pixels` takes the place of Pillow's limit, which its readers of TIFF and WebP ask again
Image.MAX_IMAGE_PIXELS = None

# First bytes, name and reader. The content decides, never the name of the file; Image.open would try many more kinds, some of
# which run other programs.
READERS: tuple[tuple[tuple[bytes, ...], str, Callable[..., Image.Image]], ...] = (
    ((b"\xff\xd8\xff",), "JPEG", JpegImagePlugin.JpegImageFile),
    ((b"\x89PNG\r\n\x1a\n",), "PNG", PngImagePlugin.PngImageFile),
    ((b"RIFF",), "WebP", WebPImagePlugin.WebPImageFile),
    ((b"GIF87a", b"GIF89a"), "GIF", GifImagePlugin.GifImageFile),
    ((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "TIFF", TiffImagePlugin.TiffImageFile),
    ((b"BM",), "BMP", BmpImagePlugin.BmpImageFile),
    ((b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"), "netpbm", PpmImagePlugin.PpmImageFile),
)
EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
NO_LEVELS = {
    "F": "floating-point values, of which no range is known",
    "I": "signed or 32-bit integers, of which no range is known",
    "LAB": "colours in L*a*b*",
}
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # two tags of TIFF, and a value of the second
PNG_DEPTH = 24  # the byte of a PNG that says how many bits a sample has
MAX_PIXELS, GREY_LEVELS = DataConfig().max_pixels, DataConfig().grey_levels


def decode(
    content: bytes,
    resolution: int,
    channels: int,
    max_pixels: int = MAX_PIXELS,
    resize: str = "crop",
    grey_levels: int = GREY_LEVELS,
) -> np.ndarray:
    """Encoded image (PNG, JPEG, WebP, GIF, TIFF, BMP, netpbm) -> uint8 (channels, resolution, resolution).

    The first picture of several is taken and turned as its EXIF orientation says; what is transparent lies on white; colour
    profiles are not applied. A smaller or larger image is brought to size as `data.resize` says: "crop" (scaled so that its
    shorter side fits, then cropped at the centre), "stretch" (bilinear, as in the code of arXiv 2009.02470) or "pad".
    Of grey PNG and TIFF of 16 bits, level `grey_levels` - 1 is white.
    Raises ValueError with the reason, on one line, if it cannot be read, has a higher level than that, or more than `max_pixels`,
    which is known before it is decoded.
    """
    picture = _picture(content, "L" if channels == 1 else "RGB", max_pixels, grey_levels)
    if picture.size != (resolution, resolution):
        picture = SIZED[resize](picture, resolution)
    pixels = np.asarray(picture, dtype=np.uint8)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _cropped(picture: Image.Image, resolution: int) -> Image.Image:
    _require_large_enough(picture, resolution)
    width, height = picture.size
    scale = resolution / min(width, height)
    size = max(resolution, round(width * scale)), max(resolution, round(height * scale))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    return picture.crop((left, top, left + resolution, top + resolution))


def _stretched(picture: Image.Image, resolution: int) -> Image.Image:
    _require_large_enough(picture, resolution)
    return picture.resize((resolution, resolution), Image.Resampling.BILINEAR)


def _padded(picture: Image.Image, resolution: int) -> Image.Image:
    width, height = picture.size
    scale = min(1.0, resolution / max(width, height))
    if scale < 1:
        picture = picture.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.LANCZOS)
    whole = Image.new(picture.mode, (resolution, resolution))
    whole.paste(picture, ((resolution - picture.width) // 2, (resolution - picture.height) // 2))
    return whole


SIZED = {"crop": _cropped, "stretch": _stretched, "pad": _padded}


def _require_large_enough(picture: Image.Image, resolution: int) -> None:
    width, height = picture.size
    if 4 * min(width, height) < resolution:
        raise ValueError(f"is {width}x{height} pixels, too small to be enlarged to {resolution}")
    if max(width, height) > 50 * min(width, height):
        raise ValueError(f"is {width}x{height} pixels, too narrow to crop a square from")


def _picture(content: bytes, mode: str, max_pixels: int, grey_levels: int) -> Image.Image:
    """The upright, opaque picture in this mode."""
    kind, read = _reader(content)
    try:
        with read(io.BytesIO(content)) as image:
            width, height = image.size
            if width * height <= max_pixels:
                image.load()
                if kind == "TIFF" and image.mode in NO_LEVELS:
                    raise _UnsupportedError(NO_LEVELS[image.mode])
                if kind == "PNG" and image.mode == "L":
                    _stretch_transparent_level(image, content[PNG_DEPTH])
                picture, turn = _opaque(image, grey_levels).convert(mode), UPRIGHT.get(_orientation(image))
                return picture if turn is None else picture.transpose(turn)
    except MemoryError:  # says nothing of the image
        raise
    except _UnsupportedError as error:
        raise ValueError(f"cannot be read as an image: {kind} with {error}") from None
    except Exception as error:  # Pillow's readers raise whatever they stumble over in damaged bytes
        raise ValueError(f"cannot be read as an image: damaged {kind} ({_one_line(error)})") from None
    raise ValueError(f"is {width}x{height} pixels, more than data.max_pixels = {max_pixels}")


class _UnsupportedError(Exception):
    """What a file holds that has no meaning as levels of grey or colour."""


def _reader(content: bytes) -> tuple[str, Callable[..., Image.Image]]:
    for beginnings, kind, read in READERS:
        if content.startswith(beginnings) and (kind != "WebP" or content[8:12] == b"WEBP"):
            return kind, read
    if not content:
        raise ValueError("cannot be read as an image: it has 0 bytes")
    known = ", ".join(kind for _, kind, _ in READERS)
    raise ValueError(f"cannot be read as an image: it begins with {content[:12]!r}, which is none of {known}")


def _one_line(error: Exception) -> str:
    """What an exception says, without addresses of objects, which change from run to run."""
    text = " ".join(str(error).split())
    return type(error).__name__ if not text or " at 0x" in text else text[:200]


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # damaged EXIF says nothing, and the picture may be whole
        return 1


def _stretch_transparent_level(image: Image.Image, bits: int) -> None:
    """The transparent level of grey of 2 or 4 bits, of which Pillow has stretched all pixels to 8 but not this."""
    transparent = image.info.get("transparency")
    if bits < 8 and isinstance(transparent, int):
        image.info["transparency"] = transparent * 255 // ((1 << bits) - 1)


def _opaque(image: Image.Image, grey_levels: int) -> Image.Image:
    """The same over white, in a mode of 8 bits without transparency."""
    if _is_wide_grey(image):
        return _eight_bits(image, _told_levels(image) or grey_levels)
    if not image.has_transparency_data:
        return image
    transparent = image.info.get("transparency")
    if isinstance(transparent, tuple) and max(transparent) > 255:
        # a transparent colour of 16 bits, of which Pillow has kept the upper 8 of all pixels
        image.info["transparency"] = tuple(level >> 8 for level in transparent)
    with_alpha = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), with_alpha)


def _is_wide_grey(image: Image.Image) -> bool:
    return image.mode == "I" or image.mode.startswith("I;16")


def _tags(image: Image.Image) -> Any:
    return image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}


def _told_levels(image: Image.Image) -> int | None:
    """How many levels a file says that its grey of more than 8 bits has; None for 16 bits, of which it may use fewer."""
    if isinstance(image, PpmImagePlugin.PpmImageFile):  # its highest level, which Pillow has made that of 16 bits
        return GREY_LEVELS
    (bits,) = _tags(image).get(BITS_PER_SAMPLE, (16,))  # Pillow's mode is I;16 for 12 too, and its levels are as they are stored
    return None if bits == 16 else 1 << bits


def _eight_bits(image: Image.Image, count: int) -> Image.Image:
    """Grey of `count` levels, such as 65536, in 256; Pillow itself would clip at 255."""
    levels: Any = np.array(image).astype(np.uint32)
    transparent, white = image.info.get("transparency"), count - 1
    if isinstance(transparent, int):
        levels[levels == transparent] = white
    if levels.size and (most := levels.max()) > white:
        raise _UnsupportedError(f"a level of {most}, where data.grey_levels = {count} ends at {white}")
    if _tags(image).get(PHOTOMETRIC) == WHITE_IS_ZERO:
        levels = white - levels
    return Image.fromarray((levels * 256 // count).astype(np.uint8))


def highest_level(content: bytes, max_pixels: int = MAX_PIXELS) -> int | None:
    """Of a grey PNG or TIFF of 16 bits a pixel; None of any other image, and of one that cannot be read."""
    try:
        with _reader(content)[1](io.BytesIO(content)) as image:
            if not _is_wide_grey(image) or _told_levels(image) is not None or math.prod(image.size) > max_pixels:
                return None
            return int(np.array(image).max())
    except MemoryError:
        raise
    except Exception:  # which is told where it is decoded
        return None


def encode(pixels: np.ndarray) -> bytes:
    """uint8 (C, H, W) -> PNG bytes."""
    buffer = io.BytesIO()
    array = pixels[0] if pixels.shape[0] == 1 else pixels.transpose(1, 2, 0)
    Image.fromarray(array).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
