"""Pictures with masks, and what a linear layer or an FCN learns of them."""

import json
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image

import lowdino
from lowdino import checkpoint, distributed, image_io, linear, masks, probe, segmentation

RANK = distributed.Ranks(0, 1, torch.device("cpu"))


def draw(folder, name, size=(48, 40), top=2, mask_size=None, mode="P", suffix="png"):
    """A picture whose left half is dark and right half bright, and its mask: 0 and `top`."""
    width, height = size
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    pixels = np.full((height, width, 3), 30, dtype=np.uint8)
    pixels[:, width // 2 :] = 220
    Image.fromarray(pixels).save(folder / "images" / f"{name}.{suffix}")
    width, height = mask_size or size
    classes = np.zeros((height, width), dtype=np.uint8)
    classes[:, width // 2 :] = top
    mask = Image.fromarray(classes)
    if mode == "P":
        mask = mask.convert("P")
        mask.putdata(classes.flatten().tolist())
    Image.Image.convert(mask, mode).save(folder / "masks" / f"{name}.png")


def make(folder, count=6, **options):
    for i in range(count):
        draw(folder, f"{i}", **options)
    return folder


def subject_of(backbone, source, size, ranks=RANK):
    """A network and its pictures, of which a batch has two."""
    args = SimpleNamespace(maps="pyramid", batch_size_per_gpu=2, num_workers=0)
    return linear.Subject(args, ranks, 1, "", "", backbone, source, size)


def load(folder, **options):
    return masks.load(str(folder), image_io.PixelFormat(), **options)


def test_a_folder_with_a_split(tmp_path):
    make(tmp_path / "train", 3, top=3, suffix="jpg")
    make(tmp_path / "val", 2, top=3)
    source = load(tmp_path)
    assert (len(source.train), len(source.test), source.classes, source.notes) == (3, 2, 4, [])
    image, mask = source.train[1]
    assert image.shape == (3, 40, 48) and mask.shape == (40, 48) and mask.dtype == torch.uint8
    assert mask.unique().tolist() == [0, 3] and (mask[:, 24:] == 3).all()


def test_a_part_is_held_out_by_seed(tmp_path):
    make(tmp_path, 10)
    first, again, other = (load(tmp_path, test_fraction=0.3, seed=seed) for seed in (0, 0, 1))
    assert len(first.test) == 3 and not {*first.test.paths} & {*first.train.paths}
    assert first.test.paths == again.test.paths != other.test.paths
    assert first.notes == ["3 of 10 pictures are held out by seed 0"]


def test_lone_pictures_and_masks_are_left_out_with_a_note(tmp_path):
    make(tmp_path, 4)
    (tmp_path / "masks/2.png").unlink()
    (tmp_path / "images/3.png").unlink()
    notes = load(tmp_path, test_fraction=0.5).notes
    assert notes[0] == "1 pictures without a mask are left out, such as 2"
    assert notes[1] == "1 masks without a picture are left out, such as 3"


def test_demo_scenes_have_masks():
    source = masks.demo_split(range(3))
    image, mask = source[2]
    assert image.shape == (3, 96, 96) and mask.shape == (96, 96) and 1 <= mask.max() <= 10


def as_jpeg(top):
    Image.open(top / "masks/0.png").convert("L").save(top / "masks/0.jpg")
    (top / "masks/0.png").unlink()


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda top: draw(top, "0", mask_size=(24, 20)), "a mask of 24 x 20 pixels, its picture"),
        (lambda top: draw(top, "0", mode="RGB"), "cannot read mask .*0.png: its pixels are RGB"),
        (lambda top: (top / "masks/0.png").write_bytes(b"\x89PNG"), "cannot read mask .*0.png"),
        (lambda top: (top / "images/0.png").write_bytes(b""), "cannot read image .*0.png"),
        (as_jpeg, "cannot read mask .*0.jpg: a JPEG file changes values"),
        (lambda top: [draw(top, f"{i}", top=255) for i in range(6)], "a second class is 1"),
        (lambda top: (top / "masks").rename(top / "labels"), "no folder .*masks: pictures lie"),
    ],
)
def test_bad_folders_get_one_sentence(tmp_path, spoil, sentence):
    make(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        source = load(tmp_path, test_fraction=0.5)
        [split[i] for split in (source.train, source.test) for i in range(3)]


def test_a_class_of_the_test_masks_alone_is_refused(tmp_path):
    make(tmp_path / "train", 2)
    make(tmp_path / "val", 2, top=5)
    with pytest.raises(distributed.UserError, match="has class 5, which no training mask has"):
        load(tmp_path)
    make(tmp_path / "val", 2, top=1)  # between two that they have
    with pytest.raises(distributed.UserError, match="class 1, which no training .*: make it 255"):
        load(tmp_path)


def test_a_split_inside_of_images_and_masks_is_kept(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        make(tmp_path / split, count)
        for kind in ("images", "masks"):
            (tmp_path / "both" / kind).mkdir(parents=True, exist_ok=True)
            (tmp_path / split / kind).rename(tmp_path / "both" / kind / split)
    source = load(tmp_path / "both")
    assert (len(source.train), len(source.test), source.notes) == (3, 2, [])
    assert {path.split("/")[-2] for path in source.train.masks} == {"train"}
    assert source.test[1][1].unique().tolist() == [0, 2]
    with pytest.raises(
        distributed.UserError, match="--test_fraction is for pictures without a split"
    ):
        load(tmp_path / "both", test_fraction=0.5)
    for kind in ("images", "masks"):  # where nothing is to test on, train/ is a name as others are
        (tmp_path / "both" / kind / "val").rename(tmp_path / "both" / kind / "bus")
    assert len(load(tmp_path / "both", test_fraction=0.4).train) == 3


def test_files_of_one_stem_are_refused(tmp_path):
    make(tmp_path, 3)
    draw(tmp_path, "1", suffix="jpg")
    with pytest.raises(distributed.UserError, match="1.* and .*1.* differ in their suffixes alone"):
        load(tmp_path, test_fraction=0.5)


def test_no_folder_and_no_split_are_refused(tmp_path):
    with pytest.raises(distributed.UserError, match="no data at nowhere"):
        load("nowhere")
    make(tmp_path)
    with pytest.raises(distributed.UserError, match="no val/ to test on: give --test_fraction"):
        load(tmp_path)
    make(tmp_path / "train")
    with pytest.raises(distributed.UserError, match="has train/ but no val/ or test/"):
        load(tmp_path)
    make(tmp_path / "val")
    with pytest.raises(distributed.UserError, match="--test_fraction is for pictures without a "):
        load(tmp_path, test_fraction=0.5)


def test_a_mask_is_resized_as_pillow_does():
    mask = torch.randint(0, 9, (37, 53), dtype=torch.uint8)
    expected = Image.fromarray(mask.numpy()).resize((24, 24), Image.Resampling.NEAREST)
    resized = segmentation.square_mask(mask, 24, segmentation.full_box(mask[None]))
    assert torch.equal(resized, torch.from_numpy(np.array(expected)))
    flipped = segmentation.square_mask(mask, 24, segmentation.full_box(mask[None]), flip=True)
    assert torch.equal(flipped, resized.flip(1))
    box = torch.tensor([[5.0, 7.0, 20.0, 30.0]])
    crop = Image.fromarray(mask[5:25, 7:37].numpy()).resize((24, 24), Image.Resampling.NEAREST)
    assert torch.equal(segmentation.square_mask(mask, 24, box), torch.from_numpy(np.array(crop)))


def test_the_linear_layer_is_the_probe_of_every_cell():
    torch.manual_seed(0)
    maps = torch.randn(2, 6, 3, 4)
    whitening = probe.HalfWhitening(torch.randn(50, 6))
    layer = segmentation.LinearLayer(whitening, 6, 5)
    torch.nn.init.normal_(layer.weight)
    cells = (maps.movedim(1, 3).flatten(0, 2) - whitening.mean) @ whitening.symmetric
    expected = cells @ layer.weight[:-1] + layer.weight[-1]
    logits = layer(maps, (3, 4)).movedim(1, 3).flatten(0, 2)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_mean_iou_is_of_the_pictures_own_size(tmp_path):
    """A network that predicts the mask of each square, against sets of pixels by numpy."""
    for i, size in enumerate([(48, 40), (33, 70)]):
        draw(tmp_path / "train", f"{i}", size)
        draw(tmp_path / "val", f"{i}", size)
    source = load(tmp_path)
    squares = [segmentation.square_mask(m, 32, segmentation.full_box(i)) for i, m in source.test]
    logits = F.one_hot(torch.stack(squares).long(), 3).permute(0, 3, 1, 2).float()
    subject = subject_of(torch.nn.Identity(), source, 32)
    iou = segmentation.evaluate(subject, lambda x: logits)
    both, either = np.zeros(3), np.zeros(3)
    for one, (_, mask) in zip(logits, source.test):
        one = F.interpolate(one[None], mask.shape, mode="bilinear", align_corners=False)
        predicted, true = one[0].argmax(0).numpy(), mask.numpy()
        for name in range(3):
            both[name] += ((predicted == name) & (true == name)).sum()
            either[name] += ((predicted == name) | (true == name)).sum()
    assert either[1] == 0 and iou == pytest.approx((both[[0, 2]] / either[[0, 2]]).mean())
    assert iou > 0.95


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_classes_are_predicted_a_few_at_a_time(layout, monkeypatch):
    logits = torch.randn(2, 7, 9, 11).contiguous(memory_format=layout)[1]
    logits[5] = logits[2]  # of equal ones the first
    sizes = []
    interpolate = F.interpolate

    def watched(x, *args, **options):
        sizes.append(len(x[0]))
        return interpolate(x, *args, **options)

    expected = interpolate(logits[None], (31, 20), mode="bilinear", align_corners=False)[0]
    monkeypatch.setattr(F, "interpolate", watched)
    assert torch.equal(segmentation.predicted_classes(logits, (31, 20)), expected.argmax(dim=0))
    monkeypatch.setattr(segmentation, "MOST_LOGITS", 3 * 31 * 20 + 5)
    assert torch.equal(segmentation.predicted_classes(logits, (31, 20)), expected.argmax(dim=0))
    assert sizes == [7, 3, 3, 1]


def run(call_script, folder, *flags):
    flags = [*flags, "--task", "segmentation", "--data_path", folder / "data"]
    done = call_script("eval_linear.py", *flags, "--output_dir", folder / "out")
    return done, json.loads((folder / "out/table.json").read_text())["rows"]


def ious(row):
    return [cell["mean_iou"] for cell in row["trained"]]


def test_linear_segmentation_from_outside(tmp_path, call_script):
    make(tmp_path / "data", 8, size=(64, 64))
    common = ["--test_fraction", "0.25", "--label_fraction", "0.5", "1", "--epochs", "30"]
    done, (row,) = run(call_script, tmp_path, "resnet5m", *common, "--maps", "pyramid")
    assert "linear layer on all maps, resized to the finest" in done.stdout
    assert row["image_size"] == 64 and np.min(ious(row)) > 0.9  # of one answer 0.25, of coins 0.33
    assert "| mIoU, linear 50 % | mIoU, linear 100 % |" in done.stdout


def test_a_linear_layer_that_diverged_has_no_figure(tmp_path, call_script):
    make(tmp_path / "data", 4, size=(32, 32))
    flags = ["--task", "segmentation", "--data_path", tmp_path / "data", "--test_fraction", "0.5"]
    flags += ["--lr", 1, "--weight_decay", 10, "--epochs", 100, "--output_dir", tmp_path / "out"]
    done = call_script("eval_linear.py", "resnet5m", *flags, check=False)
    assert done.returncode == 2 and "logits are not finite; a lower --lr may help" in done.stderr
    assert "mean IoU 0" not in done.stdout


@pytest.mark.parametrize("way", ["--finetune", "--from_scratch"])
def test_whole_networks_learn_masks(tmp_path, call_script, way):
    make(tmp_path / "data", 8, size=(64, 64))
    flags = ["--test_fraction", "0.25", "--epochs", "10", "--batch_size_per_gpu", "6"]
    done, (row,) = run(call_script, tmp_path, "mobilenet_v3_small", *flags, way)
    assert "step 10/10 loss" in done.stdout and np.isfinite(ious(row)).all()
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if " loss " in line]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["resnet5m", "--solver", "lbfgs"], "--solver goes with --task classification"),
        (["resnet5m", "--nb_knn", "5"], "--nb_knn goes with --task classification"),
        (["pixels"], "--task segmentation needs one backbone or more"),
        (["resnet5m", "--maps", "pyramid", "--finetune"], "--maps is for the linear layer"),
        (["resnet5m", "--lr", "1", "2"], "--task segmentation takes one --lr"),
        (["resnet5m", "--test_fraction", "2"], "--test_fraction must lie between 0 and 1"),
        (["resnet5m", "--data_path", "voc2012"], "no data at voc2012: --task segmentation takes a"),
        (
            ["resnet5m", "--data_path", "demo_scenes", "--value_range", "0", "9"],
            "--value_range is of values of more than 8 bits, and demo_scenes has none",
        ),
        (["resnet5m", "--image_size", "8"], "--image_size must be at least 32"),
        (["a.pth", "--from_scratch"], "--from_scratch takes names of architectures"),
    ],
)
def test_wrong_flags_are_refused(call_script, flags, sentence):
    done = call_script("eval_linear.py", "--task", "segmentation", *flags, check=False)
    assert done.returncode == 2 and sentence in done.stderr


def test_a_batch_of_one_is_not_for_batch_norm(tmp_path, call_script):
    make(tmp_path / "data", 4, size=(32, 32))
    flags = ["--task", "segmentation", "--data_path", tmp_path / "data", "--test_fraction", "0.5"]
    flags += ["--finetune", "--batch_size_per_gpu", "1", "--output_dir", tmp_path / "out"]
    done = call_script("eval_linear.py", "mobilenet_v3_small", *flags, check=False)
    assert done.returncode == 2 and "give a --batch_size_per_gpu of at least 2" in done.stderr


def test_maps_are_refused_for_classification(call_script):
    done = call_script("eval_linear.py", "resnet5m", "--maps", "pyramid", check=False)
    assert "--maps goes with --task segmentation, not with classification" in done.stderr


RANKS = """
import sys

import torch

sys.path[:0] = {root!r}, {root!r} + "/tests"
from test_segmentation import load, subject_of
from lowdino import distributed, features, segmentation


def main(_, ranks):
    source = load({data!r}, test_fraction=0.34)
    _, backbone = features.open_network("resnet5m")
    subject = subject_of(backbone.eval(), source, 64, ranks)
    maps, square_masks = segmentation.frozen_maps(subject, source.train)
    backbone.mean, backbone.std = (0.0,) * 3, (1.0,) * 3
    iou = segmentation.evaluate(subject, lambda x: x)
    if ranks.first:
        torch.save((maps, square_masks, iou), {out!r})


distributed.launch("ranks", lambda: None, main)
"""


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path, run_script):
    make(tmp_path / "data", 9, size=(64, 64))
    noise = np.random.default_rng(0)  # so that no two pictures are alike
    for path in sorted((tmp_path / "data/images").iterdir()):
        pixels = np.asarray(Image.open(path)) + noise.integers(-30, 30, (64, 64, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    results = []
    for ranks in (1, 2):
        script, out = tmp_path / f"{ranks}.py", str(tmp_path / f"{ranks}.pt")
        script.write_text(RANKS.format(root=str(ROOT), data=str(tmp_path / "data"), out=out))
        run_script(script, ranks=ranks)
        results.append(torch.load(out))
    (maps, square_masks, iou), (maps2, square_masks2, iou2) = results
    torch.testing.assert_close(maps2, maps, rtol=1e-4, atol=1e-5)
    assert torch.equal(square_masks2, square_masks) and len(square_masks) == 6
    assert 0 < iou < 1 and iou2 == pytest.approx(iou)


def test_maps_that_would_not_fit_are_refused():
    memory = segmentation.memory_of(RANK.device)
    assert 10**8 < memory < 10**15
    sentence = "the maps of 7 pictures take 1000000000 GB, .* or --label_fraction"
    for maps, end in (("pyramid", ", or --maps last$"), ("last", "$")):
        with pytest.raises(distributed.UserError, match=sentence + end):
            segmentation.check_memory(SimpleNamespace(maps=maps), 10**18, 7, memory)


def test_maps_are_of_the_pictures_that_are_used(tmp_path, call_script, monkeypatch):
    make(tmp_path / "data", 10, size=(64, 64))
    seen, learned = [], []
    frozen_maps, fit_linear_layer = segmentation.frozen_maps, segmentation.fit_linear_layer

    def watched(subject, images):
        seen.append(images)
        return frozen_maps(subject, images)

    def fit(subject, maps, square_masks, rows, seed):
        learned.append([seen[0].indices[i] for i in rows])
        return fit_linear_layer(subject, maps, square_masks, rows, seed)

    monkeypatch.setattr(segmentation, "frozen_maps", watched)
    monkeypatch.setattr(segmentation, "fit_linear_layer", fit)
    flags = ["--test_fraction", "0.2", "--label_fraction", "0.25", "--seeds", "0", "1"]
    run(call_script, tmp_path, "resnet5m", *flags, "--epochs", "1")
    assert learned == [linear.random_subset(8, 0.25, seed, least=2) for seed in (0, 1)]
    assert seen[0].indices == sorted({*learned[0], *learned[1]}) and len(seen[0]) < 5


def test_scenes_have_no_labels_for_k_nn(call_script):
    flags = ["--arch", "resnet5m", "--data_path", "demo_scenes"]
    done = call_script("eval_knn.py", *flags, check=False)
    assert done.returncode == 2
    assert "the built-in demo scenes has no labels to test on: each has several" in done.stderr


@pytest.mark.slow
def test_scenes_can_be_trained_on(tmp_path, call_script):
    flags = ["--arch", "mobilenet_v3_small", "--data_path", "demo_scenes", "--epochs", "1"]
    flags += ["--global_crops_size", "32", "--batch_size_per_gpu", "200", "--output_dir", tmp_path]
    assert "no k-NN: each has several classes" in call_script("train.py", *flags).stdout
    assert (tmp_path / "backbone.pth").exists() and (tmp_path / "report.html").exists()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_masks_of_few_bits_keep_their_indices(tmp_path, bits):
    """A PNG of two pixels, written by hand: Pillow would stretch its values to 255."""

    def chunk(kind, content):
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 2, 1, bits, 0, 0, 0, 0)
    row = bytes([0, 1 << (8 - 2 * bits)])  # no filter; pixels 0 and 1
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(row)), chunk(b"IEND", b"")
    (tmp_path / "mask.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert masks.read_mask(str(tmp_path / "mask.png")).tolist() == [[0, 1]]


def write_tiff(path, width, row, bits=8, photometric=1):
    """A plain grey TIFF file of one row, written by hand."""
    entries = [(256, width), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8)]
    entries += [(277, 1), (278, 1), (279, len(row))]
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    head = b"II*\0" + struct.pack("<I", 8 + len(row)) + row
    path.write_bytes(head + struct.pack("<H", len(entries)) + fields + bytes(4))


def test_tiff_masks_keep_their_indices_and_are_turned_once(tmp_path):
    path = tmp_path / "mask.tif"
    for bits, row in ((8, bytes([0, 1, 3])), (4, bytes([0x01, 0x30]))):
        write_tiff(path, 3, row, bits)
        assert masks.read_mask(str(path)).tolist() == [[0, 1, 3]]
    turned = {1: [[0, 1, 3]], 3: [[3, 1, 0]], 6: [[0], [1], [3]], 8: [[3], [1], [0]]}
    for orientation, expected in turned.items():
        picture = Image.fromarray(np.uint8([[0, 1, 3]]))
        picture.save(path, compression="tiff_lzw", tiffinfo={274: orientation})
        assert masks.read_mask(str(path)).tolist() == expected
        assert torch.equal(image_io.read_image(str(path))[0], torch.tensor(expected))


def test_other_files_of_indices_are_read_as_they_are(tmp_path):
    values = np.uint8([[0, 1, 2]])
    for suffix in ("gif", "bmp", "tga", "pgm", "pcx"):
        path = tmp_path / f"mask.{suffix}"
        Image.fromarray(values).save(path)
        assert masks.read_mask(str(path)).tolist() == values.tolist(), suffix
    path.with_suffix(".pgm").write_bytes(b"P2 3 1 255\n0 1 2\n")
    assert masks.read_mask(str(path.with_suffix(".pgm"))).tolist() == values.tolist()


def test_masks_whose_values_would_change_are_refused(tmp_path):
    path = tmp_path / "mask.pgm"
    for content in (b"P5 3 1 20\n\x00\x01\x14", b"P2 3 1 20\n0 1 20\n"):
        path.write_bytes(content)
        with pytest.raises(
            distributed.UserError, match="its header gives 20 as its greatest value, not 255"
        ):
            masks.read_mask(str(path))
    write_tiff(tmp_path / "mask.tif", 2, bytes([0, 1]), photometric=0)
    with pytest.raises(
        distributed.UserError, match="a TIFF file whose 0 is white: .* save it as PNG"
    ):
        masks.read_mask(str(tmp_path / "mask.tif"))


def test_pixels_that_are_ignored_give_no_loss():
    logits, mask = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4), dtype=torch.uint8)
    mask[0, :2] = 255
    expected = F.cross_entropy(logits, mask.long(), ignore_index=255)
    torch.testing.assert_close(segmentation.pixel_loss(logits, mask), expected)
    assert segmentation.pixel_loss(logits, torch.full_like(mask, 255)) == 0


def test_images_are_whole_strides_of_the_network(tmp_path, call_script):
    make(tmp_path / "data", 4, size=(70, 66))
    flags = ["--test_fraction", "0.5", "--epochs", "1"]
    _, (row,) = run(call_script, tmp_path, "resnet5m", *flags)
    assert row["image_size"] == 64
    common = ["--task", "segmentation", "--data_path", tmp_path / "data", *flags]
    done = call_script("eval_linear.py", "resnet5m", *common, "--image_size", "72", check=False)
    assert "must be a multiple of the network's stride, 16, not 72" in done.stderr


def test_deep_pictures_have_one_range_for_all_networks(tmp_path, call_script):
    """Pictures of 12 bits: a network at random weights sees what a trained one would."""
    make(tmp_path / "data", 4)
    for path in (tmp_path / "data/images").iterdir():
        values = np.asarray(Image.open(path))[..., 0].astype(np.uint16) * 16
        Image.fromarray(values).save(path)
    seen = []
    read = image_io.read_image

    def watched(path, max_side=None, pixel_format=image_io.RGB):
        seen.append(pixel_format.value_range)
        return read(path, max_side, pixel_format)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_io, "read_image", watched)
        flags = ["--test_fraction", "0.5", "--epochs", "1"]
        done, _ = run(call_script, tmp_path, "resnet5m", *flags)
    assert "px; values 0 to 4095 (found in a sample) become 0 to 255\n" in done.stdout
    assert set(seen) == {(0.0, 4095.0)}


def test_a_range_is_refused_for_pictures_of_8_bits(tmp_path, call_script):
    make(tmp_path, 4)
    flags = ["--task", "segmentation", "--data_path", tmp_path, "--test_fraction", "0.5"]
    flags += ["--value_range", "0", "100", "--output_dir", tmp_path / "out"]
    done = call_script("eval_linear.py", "resnet5m", *flags, check=False)
    assert done.returncode == 2 and "has none in a sample: leave it out" in done.stderr


def test_scenes_are_refused_for_grey_networks(tmp_path, call_script):
    backbone = lowdino.build_backbone("resnet5m", in_chans=1)
    backbone.mean, backbone.std = (0.5,), (0.2,)
    checkpoint.save_backbone(tmp_path / "grey.pth", backbone, "resnet5m", 32, 1)
    flags = [tmp_path / "grey.pth", "--task", "segmentation", "--data_path", "demo_scenes"]
    done = call_script("eval_linear.py", *flags, check=False)
    assert done.returncode == 2 and "in colours" in done.stderr
