"""Pictures from files and messages: formats, orientation, transparency, depth, limits. Whatever a file holds, there is a picture or one
message."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen_export.errors import ParameterError
from qwen_export.runtimes.vision.decode_picture import decode_picture
from qwen_export.runtimes.vision.picture import open_picture
from qwen_export.runtimes.vision.picture_size import Bounds
from qwen_export.runtimes.vision.picture_source import MediaAccess
from tests.support.pictures import SPEC, encoded, noise, photo

FORMATS = ["PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG"]


@pytest.mark.parametrize("kind", FORMATS)
def test_formats(kind: str) -> None:
    picture = photo(20, 30)
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(picture, kind, **options)
    planes = decode_picture(data, "")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(planes, expected)
    if kind in ("PNG", "BMP", "TIFF", "WEBP"):
        np.testing.assert_array_equal(planes, noise(20, 30))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_followed(orientation: int) -> None:
    upright = photo(16, 24)
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(turns[orientation]) if orientation in turns else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode_picture(encoded(stored, "PNG", exif=exif), ""), noise(16, 24))


def test_a_damaged_exif_note_is_no_reason_to_refuse() -> None:
    data = encoded(photo(16, 24), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\x01\x02")
    assert decode_picture(data, "").shape == (3, 16, 24)


def test_transparent_pixels_are_put_on_white() -> None:
    red = np.zeros((2, 3, 4), np.uint8)
    red[..., 0] = 255
    red[0, :, 3], red[1, :, 3] = 0, 128
    expected = [[[255] * 3, [255] * 3], [[255] * 3, [127] * 3], [[255] * 3, [127] * 3]]
    np.testing.assert_array_equal(decode_picture(encoded(Image.fromarray(red)), ""), expected)
    np.testing.assert_array_equal(open_picture(red, SPEC).pixels, open_picture(Image.fromarray(red), SPEC).pixels)


def test_a_palette_with_a_transparent_color() -> None:
    picture = Image.new("P", (4, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    planes = decode_picture(encoded(picture, "PNG", transparency=0), "")
    assert planes[:, 0].T.tolist() == [[255] * 3, [0, 0, 255], [255] * 3, [255] * 3]


def test_gray_black_and_white_and_print_colors() -> None:
    gray = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    np.testing.assert_array_equal(decode_picture(encoded(gray), "")[1], np.asarray(gray))
    assert set(np.unique(decode_picture(encoded(gray.convert("1")), ""))) == {0, 255}
    print_colors = Image.merge("CMYK", [Image.new("L", (4, 4), level) for level in (0, 255, 255, 0)])
    for kind, near in (("TIFF", 0), ("JPEG", 3)):
        np.testing.assert_allclose(decode_picture(encoded(print_colors, kind), "")[:, 0, 0].astype(int), [255, 0, 0], atol=near)


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    levels = np.array([[0, 128, 30000, 65535]], np.uint16)
    planes = decode_picture(encoded(Image.fromarray(levels)), "")
    assert planes[0, 0].tolist() == [0, 0, 117, 255]
    pixels = np.full((4, 4, 3), 30000, ">u2")
    assert decode_picture(_png(4, 4, 16, b"".join(b"\0" + row.tobytes() for row in pixels)), "")[:, 0, 0].tolist() == [117] * 3


@pytest.mark.parametrize(("kind", "near"), [("GIF", 0), ("PNG", 0), ("WEBP", 2), ("MPO", 2), ("TIFF", 0)])
def test_the_first_frame_of_an_animation(kind: str, near: int) -> None:
    """Or of several pictures in one file, as phones store the brightest parts beside a photo (MPO)."""
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(decode_picture(data, "")[:, 0, 0].astype(int), [255, 0, 0], atol=near)


def test_every_way_to_give_a_picture(tmp_path: Path) -> None:
    picture = photo(40, 50)
    data = encoded(picture)
    path = tmp_path / "with space.jpg"  # the extension is wrong, and does not matter
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    given_forms: list[Any] = [data, bytearray(data), picture, np.asarray(picture), str(path), path, path.as_uri()]
    given_forms += [f"data:image/png;base64,{text}", f"data:;base64,{text.rstrip('=')}"]
    digests = {open_picture(form, SPEC).digest for form in given_forms}
    assert len(digests) == 1
    assert open_picture(photo(40, 50, seed=1), SPEC).digest not in digests


def test_a_digest_names_the_size_too() -> None:
    white = np.full((256, 512, 3), 255, np.uint8)
    assert open_picture(white, SPEC).digest != open_picture(white.reshape(512, 256, 3), SPEC).digest


def test_bounds_can_be_given() -> None:
    assert open_picture(photo(640, 640), SPEC, bounds=Bounds(1024, 128 * 128)).grid.rows == 8
    assert open_picture(photo(40, 40), SPEC, bounds=Bounds(1024, 128 * 128)).grid.rows == 2


def _png_header(width: int, height: int) -> bytes:
    return _png(width, height, 8, b"\0" * 100)


def _png(width: int, height: int, bits: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


REFUSED = {
    "empty": (b"", "is empty"),
    "no picture": (b"hello, this is a text", "a format that is not read"),
    "a page": (b"<html></html>" * 20, "a format that is not read"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a format that is not read"),
    "truncated PNG": (encoded(photo(64, 64))[:900], "is damaged"),
    "truncated JPEG": (encoded(photo(64, 64), "JPEG")[:900], "is damaged"),
    "0 pixels": (_png_header(0, 7), "damaged|no pixels"),
    "a bomb": (_png_header(40000, 40000), "too large"),
    "a bomb below Pillow's limit": (_png_header(12000, 11000), "too large"),
    "too narrow": (encoded(Image.new("RGB", (20000, 1))), "too narrow"),
    "too narrow, upright": (encoded(Image.new("RGB", (1, 20000))), "too narrow"),
    "AVIF": (b"\0\0\0\x20ftypavif" + bytes(100), "a format that is not read"),
    "HEIC": (b"\0\0\0\x18ftypheic" + bytes(100), "a format that is not read"),
    "half a GIF": (encoded(photo(64, 64), "GIF")[:500], "is damaged"),
    "half a WebP": (encoded(photo(64, 64), "WEBP")[:500], "is damaged"),
    "a video": (b"\0\0\0\x20ftypisom" + bytes(100), "a format that is not read"),
    "floating point": (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "no levels of a display"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_seen_is_one_message(name: str) -> None:
    data, message = REFUSED[name]
    with pytest.raises(ParameterError, match=message) as refused:
        open_picture(data, SPEC, "messages[0].content[1]")
    assert "messages[0].content[1]" in str(refused.value)
    assert refused.value.fix
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/file.png", "there is no such file"),
        ("\0", "there is no such file|cannot be read"),
        ("data:image/png;base64,@@@", "not valid base64"),
        ("data:image/png", "has no data"),
        ("http://example.com/cat.png", "not fetched from this host"),
        ("https://[broken/cat.png", "not fetched from this host"),
        (7, "a picture cannot be read"),
        (np.zeros((4, 4, 3)), "another type"),
        (np.zeros((3, 4, 4), np.uint8), "no pixels|another shape"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
    ],
)
def test_sources_that_are_refused(source: object, message: str) -> None:
    if isinstance(source, np.ndarray) and source.shape == (3, 4, 4):
        source = source[:, :, :2]
    with pytest.raises(ParameterError, match=message):
        open_picture(source, SPEC)


def test_a_server_lets_its_clients_read_no_files(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(photo(40, 40)))
    for source in (str(path), path.as_uri(), path):
        with pytest.raises(ParameterError, match="not read from files"):
            open_picture(source, SPEC, access=MediaAccess(files=False))


def test_large_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    data = encoded(photo(64, 64))
    path = tmp_path / "large.png"
    path.write_bytes(data)
    small = MediaAccess(most_bytes=len(data) - 1)
    for source in (str(path), "data:;base64," + base64.b64encode(data).decode()):
        with pytest.raises(ParameterError, match="too large"):
            open_picture(source, SPEC, access=small)


_FILES = [encoded(photo(24, 40, seed), kind) for seed, kind in enumerate(FORMATS)]


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_damage_is_a_picture_or_one_message(data: st.DataObject) -> None:
    file = bytearray(data.draw(st.sampled_from(_FILES)))
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(file) - 1), st.integers(0, 255)), max_size=12)):
        file[at] = value
    file = file[: data.draw(st.integers(0, len(file)))] if data.draw(st.booleans()) else file
    try:
        picture = open_picture(bytes(file), SPEC)
    except ParameterError as error:
        assert "\n" not in str(error)
    else:
        assert picture.pixels.shape[-1] % 32 == 0
