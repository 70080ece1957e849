import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from detdistill.data import images
from detdistill.data.images import check_image, read_header, read_image
from detdistill.errors import UserError

RAMP = np.arange(20 * 30, dtype=np.int64).reshape(20, 30) * 109 % 256


def rgb() -> np.ndarray:
    return np.stack([RAMP, 255 - RAMP, RAMP // 2], 2).astype(np.uint8)


def saved(path, image: Image.Image, **options):
    image.save(path, **options)
    return path


def as_tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.uint8)).permute(2, 0, 1)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm"])
def test_lossless_formats(tmp_path, suffix):
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(rgb()))
    image = read_image(path)
    assert image.dtype == torch.uint8 and image.is_contiguous()
    assert torch.equal(image, as_tensor(rgb()))


@pytest.mark.parametrize("suffix", ["jpg", "webp", "gif"])
def test_lossy_formats(tmp_path, suffix):
    smooth = np.broadcast_to(np.linspace(60, 200, 30)[None, :, None], (20, 30, 3))
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(smooth.astype(np.uint8)))
    assert (read_image(path).int() - as_tensor(smooth).int()).abs().max() <= 6


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_other_modes_become_rgb(tmp_path, mode):
    grey = np.repeat((RAMP // 128 * 255)[..., None], 3, 2).astype(np.uint8)
    image = Image.fromarray(grey).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray((255 - RAMP).astype(np.uint8)))
    assert torch.equal(read_image(saved(tmp_path / "a.png", image)), as_tensor(grey))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    deep = (RAMP * 257).astype(np.uint16)
    path = saved(tmp_path / "a.png", Image.fromarray(deep))
    assert torch.equal(read_image(path)[0], torch.from_numpy(RAMP.astype(np.uint8)))


def test_cmyk_jpeg(tmp_path):
    path = saved(tmp_path / "a.jpg", Image.new("CMYK", (30, 20), (0, 255, 255, 0)))
    red, green, blue = read_image(path).float().mean((1, 2)).tolist()
    assert red > 230 and green < 25 and blue < 25


@pytest.mark.parametrize("suffix", ["png", "tiff"])  # Pillow turns the latter itself
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(rgb()), exif=exif)
    stored = as_tensor(rgb())
    turned = stored.transpose(1, 2)
    upright = {
        1: stored,
        2: stored.flip(2),
        3: stored.flip(1, 2),
        4: stored.flip(1),
        5: turned,
        6: turned.flip(2),
        7: turned.flip(1, 2),
        8: turned.flip(1),
    }[orientation]
    assert torch.equal(read_image(path), upright)
    assert torch.equal(read_image(path, tuple(upright.shape[1:])), upright)
    assert read_header(path).upright == tuple(upright.shape[1:])


def test_boxes_drawn_on_the_stored_pixels_keep_them(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / "a.png", Image.fromarray(rgb()), exif=exif)
    assert read_header(path).frame((20, 30)) == (20, 30)
    assert torch.equal(read_image(path, (20, 30)), as_tensor(rgb()))


def test_damaged_exif_is_no_exif(tmp_path):
    path = saved(tmp_path / "a.jpg", Image.fromarray(rgb()), exif=b"Exif\0\0MM\0\x2a\xff\xff")
    assert read_image(path).shape == (3, 20, 30)


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "gif", "tiff", "ppm", "webp"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_cut_off_files_are_found_by_the_header_check(tmp_path, suffix, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(noise))
    read_header(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    for reader in (read_header, read_image):
        with pytest.raises(UserError, match=f"a.{suffix}: the image is damaged or cut off"):
            reader(path)


def test_bytes_after_the_end_are_no_fault(tmp_path):
    path = saved(tmp_path / "a.jpg", Image.fromarray(rgb()))
    path.write_bytes(path.read_bytes() + bytes(100))
    assert read_header(path).upright == (20, 30)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 bytes"),
        (b"no image at all", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "damaged|not an image"),
        (b"\xff\xd8\xff\xe0", "damaged|not an image"),
    ],
)
def test_what_is_no_image(tmp_path, content, words):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_header(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="not found"):
        read_image(tmp_path / "a.png")
    with pytest.raises(UserError, match="a folder; an image file was expected"):
        read_image(tmp_path)


def bomb(width: int, height: int) -> bytes:
    """A PNG that is tiny and claims to be large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100_000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_001, 60_000])
def test_bombs_are_refused_before_decoding(tmp_path, side, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(bomb(side, side))

    def decoded(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(images, "_to_rgb", decoded)
    for reader in (read_header, read_image):
        with pytest.raises(
            UserError, match=r"a.png: the image has .* megapixels, the limit is 100"
        ):
            reader(path)


def test_float_pixels_are_refused(tmp_path):
    path = saved(tmp_path / "a.tiff", Image.new("F", (30, 20)))
    with pytest.raises(UserError, match="float pixels"):
        read_image(path)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", denied)  # root may read everything
    with pytest.raises(UserError, match=r"a\.png: the image file may not be read"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_check_image_takes_what_read_image_takes(tmp_path, suffix):
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(rgb()))
    check_image(path)
    path.write_bytes(path.read_bytes()[:-40])
    for read in (check_image, read_image):
        with pytest.raises(UserError, match="the image is damaged or cut off"):
            read(path)


def test_check_image_refuses_float_pixels(tmp_path):
    path = saved(tmp_path / "a.tiff", Image.fromarray(RAMP.astype(np.float32)))
    with pytest.raises(UserError, match="float pixels"):
        check_image(path)
