"""A picture file, or what the caller has in memory, to RGB pixels.

Pillow decodes; nothing else of it changes a pixel but the conversion of color spaces. Phones turn pictures by a note in EXIF, which is
followed. Transparent pixels are put on white. Values of 16 bits are scaled, not clipped. Color profiles are ignored, as the models were
trained. Of an animation the first frame counts.
"""

from __future__ import annotations

import io
import struct
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_export.errors import ParameterError
from qwen_export.extras import needed_for
from qwen_export.runtimes.vision.resample import Pixels

if TYPE_CHECKING:
    from PIL import Image as PillowImage

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What is decoded, by Pillow's names; the extension of a file does not matter."""
_BEGINNINGS = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
MOST_DECODED = 128_000_000
"""Pixels of a picture before it is scaled: a file of some kilobytes may hold billions."""


def decode_picture(data: bytes, where: str, most: int = MOST_DECODED) -> Pixels:
    """u8[3,H,W] of an encoded file of at most `most` pixels. Raises ParameterError, and MissingExtra where Pillow is not installed."""
    with needed_for("decoding pictures"):
        from PIL import Image
    if not data:
        raise _bad("a picture is empty", where, "0 bytes", "Give the bytes of a picture file.")
    known = [name for name in FORMATS if name in _registered(Image)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures, whose size is checked here, and of small damages
            with Image.open(io.BytesIO(data), formats=known) as picture:
                return planes_of(picture, where, most)
    except Image.UnidentifiedImageError as error:
        if data.startswith(_BEGINNINGS):
            raise _bad("a picture is damaged", where, _signature(data), "Save or send it again.") from error
        raise _bad("a picture has a format that is not read", where, _signature(data), f"Save it as {', '.join(known)}.") from error
    except Image.DecompressionBombError as error:
        raise _bad("a picture is too large", where, str(error), "Scale it down.") from error
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError, MemoryError, struct.error) as error:
        if isinstance(error, ParameterError):
            raise
        # Decoders of damaged files raise whatever they run into.
        raise _bad("a picture is damaged", where, f"{type(error).__name__}: {error}", "Save or send it again.") from error


def planes_of(picture: PillowImage.Image, where: str, most: int = MOST_DECODED) -> Pixels:
    """u8[3,H,W] of a picture that Pillow has opened. Raises ParameterError, and what Pillow raises for damaged files."""
    from PIL import Image

    width, height = picture.size
    if width < 1 or height < 1:
        raise _bad("a picture has no pixels", where, f"{width}x{height}", "Give a picture with pixels.")
    if width * height > most:
        raise _bad("a picture is too large", where, f"{width}x{height} pixels", f"Scale it down to {most} pixels at most.")
    picture.load()
    picture = _turned(picture)
    if picture.mode == "F" or (picture.mode == "I" and not _sixteen_bits(picture)):
        raise _bad("a picture has values that are no levels of a display", where, f"mode {picture.mode}", "Save it with 8 or 16 bits.")
    if picture.mode.startswith("I"):
        levels = np.asarray(picture).astype(np.uint32)
        gray = ((levels * 255 + 32767) // 65535).astype(np.uint8)
        return np.ascontiguousarray(np.broadcast_to(gray, (3, *gray.shape)))
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        color = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", color.size, (255, 255, 255, 255)), color)
    return planes_of_array(np.asarray(picture.convert("RGB")), where)


def planes_of_array(pixels: Any, where: str) -> Pixels:
    """u8[3,H,W] of u8[H,W,3], u8[H,W,4] (put on white) or u8[H,W] (gray). Raises ParameterError."""
    array = np.asarray(pixels)
    if array.dtype != np.uint8:
        raise _bad("an array of pixels has another type", where, str(array.dtype), "Give levels of 0 to 255 as uint8.", "uint8")
    if array.ndim == 2:
        array = np.broadcast_to(array[..., None], (*array.shape, 3))
    if array.ndim != 3 or array.shape[2] not in (3, 4):
        raise _bad("an array of pixels has another shape", where, str(array.shape), "Put the channels last.", "[height, width, 3]")
    if 0 in array.shape:
        raise _bad("a picture has no pixels", where, str(array.shape), "Give a picture with pixels.")
    if array.shape[0] * array.shape[1] > MOST_DECODED:
        raise _bad("a picture is too large", where, f"{array.shape[1]}x{array.shape[0]} pixels", "Scale it down.")
    if array.shape[2] == 4:
        alpha = array[..., 3:].astype(np.uint32)
        array = ((array[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    planes = np.empty((3, *array.shape[:2]), np.uint8)
    for channel in range(3):
        planes[channel] = array[..., channel]
    return planes


def _turned(picture: PillowImage.Image) -> PillowImage.Image:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(picture) or picture
    except Exception:  # a damaged note is no reason to refuse the picture; viewers show it as it is stored
        return picture


def _sixteen_bits(picture: PillowImage.Image) -> bool:
    """Whether all values of a picture of 32 bits are those of 16: Pillow reads some 16-bit files into 32."""
    levels = np.asarray(picture)
    return bool(levels.min() >= 0 and levels.max() <= 65535)


def _registered(image: Any) -> set[str]:
    image.init()
    return set(image.OPEN)


def _signature(data: bytes) -> str:
    return f"a file that begins with {data[:12]!r}"


def _bad(what: str, where: str, got: str, fix: str, expected: str = "") -> ParameterError:
    return ParameterError(what, parameter="messages", where=where, got=got, expected=expected, fix=fix)
