"""Files become upright images on white, of 8 bits; the canvas of a batch; shared memory."""

import os
import struct
import subprocess
import sys
import warnings
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageOps
from runs import small

from lowdino import augment, data, image_io
from lowdino.image_io import PixelFormat, read_image


def colours(height=20, width=30, bands=3, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return values.squeeze()


def read(path, *how):
    """(H, W, C) of a file."""
    return read_image(str(path), *how).permute(1, 2, 0).numpy()


# --------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_pictures_are_upright(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{ending}"
    Image.fromarray(colours()).save(path, exif=exif)
    with Image.open(path) as image:
        image.load()
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(read(path), expected)
    assert image_io.shorter_side(str(path)) == 20


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "RGBA", "I;16"])
def test_plain_tiffs_are_upright(tmp_path, orientation, mode):
    """Which Pillow maps into memory where it opens them by their names."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    grey = Image.fromarray(colours()).convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    picture = {"L": grey, "RGBA": grey.convert("RGBA"), "I;16": deep}[mode]
    picture.save(tmp_path / "plain.tif", exif=exif)
    grey.save(tmp_path / "turned.png", exif=exif)
    plain, turned = (
        read(tmp_path / name, None, PixelFormat(1)) for name in ("plain.tif", "turned.png")
    )
    np.testing.assert_array_equal(plain, turned)


def test_a_turned_photograph_is_upright_when_it_is_reduced_on_decoding(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = np.zeros((400, 800, 3), np.uint8)
    image[:, :400] = 255  # the left half, which belongs to the top
    Image.fromarray(image).save(tmp_path / "phone.jpg", exif=exif)
    image = read(tmp_path / "phone.jpg", 64)
    assert image.shape == (128, 64, 3)
    assert image[:60].min() > 240 and image[68:].max() < 15


def test_damaged_exif_makes_no_bad_picture(tmp_path):
    path = tmp_path / "odd.png"
    Image.fromarray(colours()).save(path, exif=b"Exif\0\0no directory")
    np.testing.assert_array_equal(read(path), colours())


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "RGB"])
def test_transparency_is_laid_on_white(tmp_path, mode):
    """The hidden colour is never seen, with an alpha channel or with one transparent colour."""
    path = tmp_path / ("shape.tif" if mode == "PA" else "shape.png")
    seen = np.zeros((20, 30), bool)
    seen[5:15, 8:20] = True
    grey = Image.fromarray(np.where(seen, 90, 7).astype(np.uint8))
    if mode.endswith("A"):
        image = grey.convert("RGB" if mode == "RGBA" else "P" if mode == "PA" else "L")
        image = image.convert(mode)
        image.putalpha(Image.fromarray((seen * 255).astype(np.uint8)))
        assert image.mode == mode
        options = {}
    else:
        image = grey.convert(mode)
        hidden = image.getpixel((0, 0))
        options = {"transparency": hidden}
    try:
        image.save(path, **options)
    except OSError:
        pytest.skip(f"Pillow writes no {mode}")
    expected = np.where(seen, 90, 255)[..., None].repeat(3, 2)
    np.testing.assert_array_equal(read(path), expected)
    np.testing.assert_array_equal(read(path, None, PixelFormat(1)), expected[..., :1])


def test_half_transparent_is_half_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 100, 200, 128)).save(tmp_path / "half.png")
    expected = [round(255 + (c - 255) * 128 / 255) for c in (0, 100, 200)]
    assert abs(read(tmp_path / "half.png")[0, 0].astype(int) - expected).max() <= 1


@pytest.mark.parametrize("ending", ["gif", "tif", "webp"])
def test_the_first_frame_is_taken(tmp_path, ending):
    first, second = (Image.new("RGB", (16, 12), colour) for colour in ("red", "blue"))
    options = {"lossless": True} if ending == "webp" else {}
    path = tmp_path / f"several.{ending}"
    first.save(path, save_all=True, append_images=[second], **options)
    assert (read(path) == (255, 0, 0)).all()


def png_of_16_bits(path, values):
    """Write (H, W, C) uint16, which Pillow cannot, as a PNG: grey or RGB, perhaps with alpha."""
    height, width, bands = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind, content):
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[bands], 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))


def tiff_of_16_bits(path, values, order, compress):
    """Write (H, W, 3) uint16 as a TIFF of that byte order, deflated or as it is."""
    height, width, _ = values.shape
    pixels = values.astype(f"{order}u2").tobytes()
    pixels = zlib.compress(pixels) if compress else pixels
    end = 8 + len(pixels)
    tags = (256, width), (257, height), (258, end), (259, 8 if compress else 1), (262, 2), (273, 8)
    tags += (277, 3), (278, height), (279, len(pixels))
    entries = [
        struct.pack(f"{order}HHII", t, *((3, 3) if t == 258 else (4, 1)), v) for t, v in tags
    ]
    directory = struct.pack(f"{order}H", len(tags)) + b"".join(entries) + bytes(4)
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", end + 6)
    path.write_bytes(head + pixels + struct.pack(f"{order}HHH", 16, 16, 16) + directory)


@pytest.mark.parametrize("top", [4095, 65535])
@pytest.mark.parametrize("kind", ["png", "<", ">", "<deflate", ">deflate"])
def test_colours_of_16_bits_keep_their_range(tmp_path, kind, top):
    values, path = np.random.default_rng(0).integers(0, top + 1, (20, 30, 3)), tmp_path / "deep"
    if kind == "png":
        png_of_16_bits(path, values)
    else:
        tiff_of_16_bits(path, values, kind[0], kind.endswith("deflate"))
    np.testing.assert_array_equal(image_io.deep_values(str(path)), values)
    image = read(path, None, PixelFormat(3, (0, top)))
    np.testing.assert_array_equal(image, (values * 255 / top).round())


@pytest.mark.parametrize("bands", [2, 4])
def test_transparency_of_16_bits_is_laid_on_white(tmp_path, bands):
    draws, path = np.random.default_rng(0), str(tmp_path / "deep.png")
    values = draws.integers(0, 4096, (20, 30, bands))
    values[..., -1] = draws.choice([0, 65535], (20, 30))
    png_of_16_bits(tmp_path / "deep.png", values)
    np.testing.assert_array_equal(image_io.deep_values(path).squeeze(), values[..., :-1].squeeze())
    expected = (values[..., :-1] * 255 / 4095).round()
    expected[values[..., -1] == 0] = 255
    image = read(path, None, PixelFormat(3, (0, 4095)))
    np.testing.assert_array_equal(image, np.broadcast_to(expected, image.shape))


def test_a_deep_value_may_be_transparent_or_zero_be_white(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (20, 30)).astype(np.uint16)
    values[:5] = 7
    scaled = (values / 4095 * 255).round()
    Image.fromarray(values).save(tmp_path / "hole.png", transparency=7)
    image = read(tmp_path / "hole.png", None, PixelFormat(1, (0, 4095)))[..., 0]
    np.testing.assert_array_equal(image, np.where(values == 7, 255, scaled))
    white = tmp_path / "white.tif"
    Image.fromarray(values).save(white)
    photometric = [struct.pack("<HHIHH", 262, 3, 1, value, 0) for value in (1, 0)]
    assert photometric[0] in white.read_bytes()
    white.write_bytes(white.read_bytes().replace(*photometric))
    image = read(white, None, PixelFormat(1, (0, 4095)))[..., 0]
    np.testing.assert_array_equal(image, 255 - scaled)


def test_deep_grey_is_scaled_by_its_range(tmp_path):
    twelve = np.random.default_rng(0).integers(0, 4096, (20, 30)).astype(np.uint16)
    files = {"png": twelve, "tif": twelve, "float.tif": twelve.astype(np.float32) / 4095}
    for name, values in files.items():
        path = tmp_path / f"deep.{name}"
        Image.fromarray(values).save(path)
        top = 1 if "float" in name else 4095
        image = read(path, None, PixelFormat(1, (0, top)))
        np.testing.assert_array_equal(image[..., 0], (twelve / 4095 * 255).round())
        np.testing.assert_array_equal(image_io.deep_values(str(path))[..., 0], values)
    image = read(tmp_path / "deep.png", None, PixelFormat(3, (1000, 2000)))
    expected = ((twelve - 1000.0) * 255 / 1000).clip(0, 255).round()
    np.testing.assert_array_equal(image, expected[..., None].repeat(3, 2))
    (tmp_path / "big_endian.tif").write_bytes(big_endian_tiff(twelve))
    image = read(tmp_path / "big_endian.tif", None, PixelFormat(1, (0, 4095)))
    np.testing.assert_array_equal(image[..., 0], (twelve / 4095 * 255).round())


def big_endian_tiff(values):
    """The bytes of (H, W) uint16 as an uncompressed TIFF of a Motorola."""
    height, width = values.shape
    pixels = values.astype(">u2").tobytes()
    tags = [(256, width), (257, height), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1)]
    tags += [(278, height), (279, len(pixels))]
    entries = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags)
    directory = struct.pack(">H", len(tags)) + entries + struct.pack(">I", 0)
    return b"MM\0*" + struct.pack(">I", 8 + len(pixels)) + pixels + directory


def test_pillows_limit_is_replaced_by_ours_and_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    path = tmp_path / "scene.jpg"
    Image.new("RGB", (1600, 1200), (90, 120, 60)).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(path, 100).shape == (100, 133, 3)
        assert image_io.shorter_side(str(path)) == 1200
    assert Image.MAX_IMAGE_PIXELS == 1000
    small = PixelFormat(max_megapixels=0.1)
    assert read(path, 100, small).shape == (100, 133, 3)  # decoded at an eighth: 0.03 megapixels
    with pytest.raises(
        ValueError, match="scene.jpg: 1600 x 1200 pixels are .* --max_megapixels 0.1"
    ):
        read(path, None, small)
    np.save(tmp_path / "scene.npy", np.zeros((600, 400), np.uint8))
    with pytest.raises(ValueError, match="scene.npy: 400 x 600 pixels are more than"):
        read(tmp_path / "scene.npy", 32, small)


# --------------------------------------------------------------------------------------------------
# Canvas and workers
# --------------------------------------------------------------------------------------------------


def batch_of(*sizes):
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (3, *s), dtype=torch.uint8, generator=generator) for s in sizes]
    return images, [(image, 0, i, []) for i, image in enumerate(images)]


def test_a_canvas_is_bounded(monkeypatch):
    sizes = (30, 600), (600, 30), (40, 40)
    images, items = batch_of(*sizes)
    assert data.collate(items).images.shape == (3, 3, 600, 600)
    monkeypatch.setattr(data, "CANVAS_BYTES", 3 * 3 * 200 * 200)
    batch = data.collate(items)
    assert 180**2 < batch.images.shape[2] * batch.images.shape[3] <= 200**2
    assert torch.equal(batch.images[2, :, :40, :40], images[2])  # no longer than the canvas
    (h, w), other, _ = batch.sizes.tolist()
    assert abs(w / h - 20) < 3 and other == [w, h]
    assert abs(batch.images[0, :, :h, :w].float().mean() - images[0].float().mean()) < 2
    monkeypatch.setattr(data, "CANVAS_BYTES", 1)
    assert data.collate(items).images.shape[2:].numel() <= 80**2  # twice the shorter side, 40


@pytest.mark.parametrize("size", [(20, 91), (90, 21), (21, 90), (33, 33), (140, 333)])
@pytest.mark.parametrize("side", [32, 128])
def test_an_evaluation_sees_the_same_centre_of_an_elongated_image(size, side):
    images, items = batch_of(size)
    batch = data.collate(items, data.central_part)
    assert max(batch.images.shape[2:]) <= min(size) + 1
    expected = augment.central_view(images[0][None], torch.tensor([size]), side)
    view = augment.central_view(batch.images, batch.sizes, side)
    torch.testing.assert_close(view, expected, rtol=0, atol=0.04)  # 2 of 255 steps


def test_a_text_line_keeps_its_height(tmp_path):
    path = tmp_path / "line.png"
    Image.fromarray(colours(32, 600, 1)).save(path)
    np.testing.assert_array_equal(read(path, 64), colours(32, 600, 1)[..., None].repeat(3, 2))


def free(size):
    return lambda path: SimpleNamespace(f_bavail=size, f_frsize=1)


def test_there_are_no_loader_processes_where_shared_memory_is_short(
    picture_folder, tmp_path, monkeypatch, call_script
):
    files = data.ImageFiles(sorted(map(str, picture_folder.rglob("*.png"))))
    for size, ranks, workers in ((2**34, 1, 2), (2**34, 32, 0), (2**26, 1, 0)):
        monkeypatch.setattr(os, "statvfs", free(size))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))  # which share the memory
        assert data.open_loader(files, 2, batch_size=5).num_workers == workers
    named = dict(data_path=picture_folder, output_dir=tmp_path)
    flags = small("--epochs 1 --knn_freq 0 --num_workers 2", **named)
    assert data.NO_WORKERS in call_script("train.py", *flags).stdout


SMALL_SHM = """
mount -t tmpfs -o size={size} tmpfs /dev/shm && exec {python} train.py --arch mobilevit_xxs \
  --data_path {folder} --output_dir {out} --epochs 1 --knn_freq 0 --batch_size_per_gpu 32 \
  --global_crops_size 96 --global_crops_number 2 --num_workers 2 --cache none --device cpu
"""


def can_unshare():
    try:
        return subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not can_unshare(), reason="unshare -m is not permitted")
def test_training_runs_where_shared_memory_is_short(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(64):
        path = tmp_path / "pictures" / f"{i}.jpg"
        Image.fromarray(colours(480, 640, seed=i)).save(path)
    names = dict(python=sys.executable, folder=tmp_path / "pictures", out=tmp_path / "out")
    script = SMALL_SHM.format(size="8m", **names)
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    # With loader processes, whose batches 8 MiB do not hold, the run would not end.
    assert data.NO_WORKERS in done.stdout
