"""Networks of other than three channels, ranges of values, strengths of views, open_image."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from runs import is_one_sentence, options, records, saved, small
from torchvision.transforms import v2

import lowdino
from lowdino import augment, checkpoint, data, datasets, image_io, models, vit
from lowdino.features import compute_rank_features
from lowdino.image_io import PixelFormat, read_image


def bands(seed, height=40, width=32, count=5):
    """A cloudy array (H, W, N) uint8 whose bands have means of their own."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 100, (height // 8, width // 8, count))
    return (coarse.repeat(8, 0).repeat(8, 1) + 30 * np.arange(count)).astype(np.uint8)


def listing(folder, arrays, ending=".npy"):
    """A text file that names files of the arrays."""
    folder.mkdir(exist_ok=True)
    names = []
    for i, values in enumerate(arrays):
        names.append(f"{i}{ending}")
        if ending == ".npy":
            np.save(folder / names[-1], values)
        else:
            Image.fromarray(values).save(folder / names[-1])
    (folder / "all.txt").write_text("\n".join(names))
    return folder / "all.txt"


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def test_arrays_have_channels_last_or_first(tmp_path):
    path, last = str(tmp_path / "a.npy"), bands(0)
    expected = torch.from_numpy(last).permute(2, 0, 1)
    for values in (last, last.transpose(2, 0, 1), np.asfortranarray(last)):
        np.save(path, values)
        assert torch.equal(read_image(path, None, PixelFormat(5)), expected)
        assert image_io.shorter_side(path, PixelFormat(5)) == 32
    np.save(path, bands(0, 40, 40, 40))  # could be both: channels are last
    image = read_image(path, None, PixelFormat(40))
    assert torch.equal(image, torch.from_numpy(bands(0, 40, 40, 40)).permute(2, 0, 1))
    np.save(path, last[..., 0])
    assert torch.equal(read_image(path, None, PixelFormat(1)), expected[:1])
    assert torch.equal(read_image(path), expected[:1].expand(3, -1, -1))  # grey becomes RGB
    small_side = read_image(path, 16)
    by_pillow = Image.fromarray(last[..., 0]).resize((16, 20), 3, reducing_gap=2.0)
    np.testing.assert_array_equal(small_side[0].numpy(), np.asarray(by_pillow))
    np.save(path, np.array([[0.0, 0.25], [np.nan, 2.0]]))
    assert read_image(path, None, PixelFormat(1, (0, 1))).tolist() == [[[0, 64], [0, 255]]]


def test_pictures_of_other_channels(tmp_path):
    rgba, grey = bands(0, count=4), bands(1, count=4)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")  # no compositing: the fourth is a band
    image = read_image(str(tmp_path / "rgba.png"), None, PixelFormat(4))
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), rgba)
    Image.fromarray(rgba[..., :3]).save(tmp_path / "rgb.png")
    luma = np.asarray(Image.fromarray(rgba[..., :3]).convert("L"))
    np.testing.assert_array_equal(
        read_image(str(tmp_path / "rgb.png"), None, PixelFormat(1))[0], luma
    )
    pages = [Image.fromarray(grey[..., i].astype(np.uint16) * 16) for i in range(4)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    image = read_image(str(tmp_path / "pages.tif"), None, PixelFormat(4, (0, 4095)))
    expected = (grey.astype(float) * 16 * 255 / 4095).round()
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_another_number_of_channels_is_one_sentence(tmp_path):
    np.save(tmp_path / "a.npy", bands(0))
    np.save(tmp_path / "objects.npy", np.array([[{}]]), allow_pickle=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "rgb.png")
    for name, channels, message in (
        ("a.npy", 4, r"a.npy: its shape \(40, 32, 5\) has no axis of 4 channels, first or last"),
        ("a.npy", 3, r"a.npy: its shape \(40, 32, 5\) has no axis of 3 channels"),
        ("objects.npy", 1, "objects.npy: "),
        ("rgb.png", 5, "rgb.png: it has 3 channels, and 5 are wanted"),
    ):
        with pytest.raises(ValueError, match=message):
            read_image(str(tmp_path / name), None, PixelFormat(channels))


# --------------------------------------------------------------------------------------------------
# Range and statistics
# --------------------------------------------------------------------------------------------------


def sampled_range(source):
    return image_io.find_value_range(source.pretrain.paths, source.pretrain.pixel_format)


@pytest.mark.parametrize(
    "dtype, low, high, expected",
    [
        (np.uint16, 3, 900, (0, 1023)),
        (np.uint16, 0, 1023, (0, 1023)),
        (np.uint16, 0, 1024, (0, 2047)),
        (np.uint16, 0, 200, (0, 255)),
        (np.int32, 0, 65535, (0, 65535)),
        (np.int16, -1000, 3000, (-1000, 3000)),
        (np.int32, 0, 70000, (0, 70000)),
        (np.float32, 0.25, 0.5, (0, 1)),
        (np.float64, -2, 6, (-2, 6)),
        (np.float32, 7, 7, (7, 8)),
        (np.uint8, 0, 9, None),
    ],
)
def test_the_range_is_that_of_the_values(tmp_path, dtype, low, high, expected):
    arrays = [np.full((8, 8), low, dtype), np.full((8, 8), high, dtype)]
    source = datasets.load(str(listing(tmp_path / "a", arrays)))
    assert sampled_range(source) == expected


def test_the_range_is_found_over_an_even_sample_of_what_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(image_io, "SAMPLE", 3)
    arrays = [np.full((8, 8), 100 * i, np.uint16) for i in range(7)]
    arrays[2][0, 0] = 60000  # not in the sample: 0, 3 and 6
    source = datasets.load(str(listing(tmp_path / "a", arrays)))
    assert sampled_range(source) == (0, 1023)
    (tmp_path / "a" / "6.npy").write_text("no array")
    assert sampled_range(source) == (0, 511)


def test_statistics_are_those_of_all_pixels(tmp_path):
    arrays = [bands(i, 40 + 8 * i) for i in range(4)]
    source = datasets.load(str(listing(tmp_path / "a", arrays)))
    source.set_pixel_format(channels=5)
    files = source.pretrain
    mean, std = image_io.channel_statistics(files.paths, files.max_side, files.pixel_format)
    together = np.concatenate([a.reshape(-1, 5) for a in arrays]) / 255
    np.testing.assert_allclose(mean, together.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(std, together.std(axis=0), rtol=1e-6)


# --------------------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["mobilevit_xxs", "resnet5m", "resnet18", "mobilenet_v2", "vit"])
def test_grey_images_keep_their_features_in_any_number_of_channels(arch):
    """The known rule: repeated weights times 3 / N, and their sum for one channel."""
    tiny = vit.VisionTransformer(16, 32, 64, depth=1, num_heads=1)
    network = tiny.eval() if arch == "vit" else lowdino.build_backbone(arch).eval()
    grey = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        expected = network(grey.expand(-1, 3, -1, -1))
        for channels in (1, 6):
            adapted = copy.deepcopy(network)
            models.set_in_chans(adapted, channels)
            assert adapted.mean is None and network.mean is not None
            features = adapted(grey.expand(-1, channels, -1, -1))
            torch.testing.assert_close(features, expected, atol=1e-3, rtol=1e-3)
    weight = models.stem_of(network)[1].weight
    models.set_in_chans(network, 5)
    five = models.stem_of(network)[1].weight
    assert torch.equal(five, weight[:, [0, 1, 2, 0, 1]] * 0.6)
    with pytest.raises(ValueError, match="weights of 5 channels cannot be adapted to 4"):
        models.set_in_chans(network, 4)


def test_a_backbone_file_keeps_its_channels_and_range(tmp_path):
    network = lowdino.build_backbone("mobilevit_xxs", 5).eval()
    network.mean, network.std = (0.1, 0.2, 0.3, 0.4, 0.5), (1.0,) * 5
    network.value_range = (0.0, 4095.0)
    path = str(tmp_path / "backbone.pth")
    checkpoint.save_backbone(path, network, "mobilevit_xxs", 32, 1)
    again, x = lowdino.load_backbone(path), torch.randn(2, 5, 32, 32)
    assert again.mean == network.mean and tuple(again.value_range) == (0, 4095)
    with torch.no_grad():
        assert torch.equal(again(x), network(x))
    torch.save(lowdino.build_backbone("mobilenet_v3_small", 2).state_dict(), path)
    plain = lowdino.load_backbone(path, "mobilenet_v3_small")
    assert len(plain.mean) == len(plain.std) == models.stem_of(plain)[1].in_channels == 2


# --------------------------------------------------------------------------------------------------
# Views
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 5])
def test_brightness_and_contrast_are_torchvisions_in_any_number_of_channels(channels):
    images = torch.rand(6, channels, 16, 16)
    factors = 1 + (torch.rand(6, 3) - 0.5)
    order = torch.arange(4).expand(6, 4)  # brightness, contrast
    still = factors.clone()
    still[:, 2] = 1
    jittered = augment.color_jitter(images, still, torch.zeros(6), order)
    for image, (brightness, contrast, _), ours in zip(images, factors, jittered):
        bright = (image * brightness).clamp(0, 1)
        mean = bright.mean()  # of one channel torchvision's own contrast
        expected = (contrast * bright + (1 - contrast) * mean).clamp(0, 1)
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)
        if channels == 1:
            theirs = v2.functional.adjust_brightness(image, brightness.item())
            theirs = v2.functional.adjust_contrast(theirs, contrast.item())
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_views_of_two_channels_have_no_colour_of_their_own():
    """Equal channels stay equal: nothing treats them as red and green."""
    images = torch.randint(256, (4, 1, 48, 40), dtype=torch.uint8).expand(-1, 2, -1, -1)
    crop = augment.MultiCrop(32, 16, 2, mean=(0.0, 0.0), std=(1.0, 1.0))
    sizes = torch.tensor([[48, 40]]).expand(4, 2)
    for view in crop(images, sizes, augment.seeded_generator("cpu", 0)):
        assert view.shape[1] == 2 and torch.equal(view[:, 0], view[:, 1])


def test_views_of_a_text_line_are_of_all_its_parts():
    """Its columns are numbered by their value, so that a view tells where it is from."""
    line = (torch.arange(600) / 600 * 255).to(torch.uint8).expand(40, 3, 32, 600)
    sizes = torch.tensor([[32, 600]]).expand(40, 2)
    still = dict(jitter=(0,) * 4, grayscale=0, solarize=0, mean=(0.0,) * 3, std=(1.0,) * 3)
    crop = augment.MultiCrop(32, 16, 2, blur=(0, 0, 0), **still)
    views = crop(line, sizes, augment.seeded_generator("cpu", 0))
    where = torch.stack([view.mean(dim=(1, 2, 3)) for view in views])  # (4, 40)
    assert where.min() < 0.15 and where.max() > 0.85
    assert (where - where[0]).abs().max() < 64 / 600  # views of an image are of one part of it


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------

SHORT = "--epochs 1 --num_workers 0 --global_crops_number 2 --knn_freq 0"


def test_twelve_bits_are_trained_and_evaluated_in_their_range(tmp_path, call_script):
    files = [bands(i, count=1)[..., 0].astype(np.uint16) * 16 for i in range(8)]
    files[0][0, 0] = 4080
    for split in ("train", "val"):
        for name in "ab":
            folder = tmp_path / "deep" / split / name
            folder.mkdir(parents=True)
            listing(folder, files[:4] if name == "a" else files[4:], ".png")
            (folder / "all.txt").unlink()
    flags = small(SHORT, data_path=tmp_path / "deep", output_dir=tmp_path / "out")
    done = call_script("train.py", *flags)
    assert "values 0 to 4095 (found in a sample) become 0 to 255" in done.stdout
    kept = checkpoint.load(tmp_path / "out" / "backbone.pth")
    assert kept["value_range"] == [0, 4095] and saved(tmp_path / "out")["value_range"] == (0, 4095)
    # The range is the checkpoint's, whatever the files have become.
    Image.fromarray(np.full((40, 32), 65535, np.uint16)).save(tmp_path / "deep/train/a/0.png")
    again = call_script("train.py", *flags)
    assert "values 0 to 4095 (before)" in again.stdout and "already finished" in again.stdout
    weights, features = tmp_path / "out" / "backbone.pth", tmp_path / "features.npz"
    named = dict(weights=weights, data_path=tmp_path / "deep", features=features, device="cpu")
    done = call_script("eval_knn.py", *options("--nb_knn 1 --num_workers 0", **named))
    assert "values 0 to 4095 (the backbone's)" in done.stdout
    backbone = lowdino.load_backbone(str(weights))
    paths = datasets.load(str(tmp_path / "deep")).test.paths
    with torch.no_grad():
        ours = torch.cat([backbone(lowdino.open_image(path, backbone)) for path in paths])
    expected = torch.from_numpy(np.load(features)["test"])
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["dino", "mvmr"])
def test_five_bands_are_trained_and_evaluated(tmp_path, call_script, method):
    file = listing(tmp_path / "bands", [bands(i) for i in range(8)])
    flags = [*SHORT.split(), "--arch", "mobilevit_xxs", "--batch_size_per_gpu", 4, "--in_chans", 5]
    flags += options("--device cpu --amp none", data_path=file, output_dir=tmp_path / "out")
    done = call_script("train.py", "--method", method, *flags)
    together = np.concatenate([bands(i).reshape(-1, 5) for i in range(8)]) / 255
    kept = checkpoint.load(tmp_path / "out" / "backbone.pth")
    np.testing.assert_allclose(kept["mean"], together.mean(axis=0), rtol=1e-5)
    assert "no hue, saturation and grayscale" in done.stdout and "value_range" not in kept
    assert Image.open(tmp_path / "out" / "crops.png").mode == "RGB"
    assert len(records(tmp_path / "out", "loss")) >= 1
    weights = tmp_path / "out" / "backbone.pth"
    out = options("--device cpu --num_workers 0", weights=weights, features=tmp_path / "x.npz")
    call_script("eval_knn.py", *out, "--data_path", file)
    backbone = lowdino.load_backbone(str(weights))
    with torch.no_grad():
        features = backbone(lowdino.open_image(tmp_path / "bands" / "3.npy", backbone))[0]
    expected = torch.from_numpy(np.load(tmp_path / "x.npz")["train"][3])
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)
    other = listing(tmp_path / "others", [bands(i, count=4) for i in range(4)])
    done = call_script("eval_knn.py", *out, "--data_path", other, check=False)
    assert is_one_sentence(done, "has no axis of 5 channels, first or last")
    done = call_script("eval_knn.py", *out, "--data_path", "demo", check=False)
    assert is_one_sentence(done, "demo images: 3 channels, where 5 are needed")


def test_weights_of_colours_start_a_network_of_grey(tmp_path, call_script, picture_folder):
    torch.manual_seed(1)
    network = lowdino.build_backbone("mobilevit_xxs")
    torch.save(network.state_dict(), tmp_path / "rgb.pth")
    flags = small(f"{SHORT} --in_chans 1", data_path=picture_folder, init=tmp_path / "rgb.pth")
    flags += ["--lr", 0, "--weight_decay", 0, "--weight_decay_end", 0, "--momentum_teacher", 1]
    done = call_script("train.py", *flags, "--output_dir", tmp_path / "out")
    assert "the first layer of --init is adapted to 1 channels" in done.stdout
    kept = checkpoint.load(tmp_path / "out" / "backbone.pth")
    stem = kept["state_dict"]["stem.conv.weight"]
    torch.testing.assert_close(stem, network.stem.conv.weight.sum(dim=1, keepdim=True).detach())
    weights = tmp_path / "out" / "backbone.pth"
    done = call_script(
        "train.py", *small(SHORT, init=weights, output_dir=tmp_path / "b"), check=False
    )
    assert is_one_sentence(done, "backbone.pth: weights of 1 channels cannot be adapted to 3")
    flags = options("--arch mobilevit_xxs --device cpu --batch_size_per_gpu 4", teacher=weights)
    flags += [*SHORT.split(), "--data_path", picture_folder, "--output_dir", tmp_path / "c"]
    done = call_script("distill.py", *flags, check=False)
    assert is_one_sentence(done, "sees 1 channels, and --in_chans is 3")


def test_absurd_flags_of_pixels_are_one_sentence(tmp_path, call_script, picture_folder):
    for text, message in (
        ("--in_chans 0", "--in_chans must lie between 1 and 16, not 0"),
        ("--in_chans 1 --data_path demo", "demo images: 3 channels, where 1 are needed"),
        ("--value_range 5 5", "--value_range needs LOW < HIGH, not 5 5"),
        ("--value_range 0 4095", "pictures.* has none in a sample: leave it out"),
        ("--jitter 3", "--jitter must lie between 0 and 2.5"),
        ("--blur 2", "--blur must lie between 0 and 1"),
        ("--max_megapixels 0", "--max_megapixels must be above 0"),
    ):
        flags = small(SHORT, data_path=picture_folder, output_dir=tmp_path / "out")
        done = call_script("train.py", *flags, *text.split(), check=False)
        assert is_one_sentence(done, message), (text, done.stderr)


def test_colours_stay_where_strengths_are_0(tmp_path):
    """A picture of one colour keeps it in all views."""
    import train
    from lowdino import settings

    argv = small("--jitter 0 --grayscale 0 --blur 0 --solarize 0 --global_crops_size 224")
    args = settings.resolve(train.get_parser(), [*argv, "--local_crops_size", "96"])
    network = lowdino.build_backbone("mobilevit_xxs")
    crop = data.build_views(args, network)
    images = torch.tensor([200, 90, 30], dtype=torch.uint8).view(1, 3, 1, 1).repeat(8, 1, 64, 64)
    views = crop(images, torch.full((8, 2), 64), augment.seeded_generator("cpu", 0))
    expected = augment.normalize(images[:, :, :1, :1] / 255, crop.mean, crop.std)
    for view in views:
        torch.testing.assert_close(view, expected.expand_as(view), atol=1e-5, rtol=0)
    crop = data.build_views(args.replace(jitter=0.5, blur=0.5, solarize=0.3), network)
    torch.testing.assert_close(crop.jitter, torch.tensor([0.2, 0.2, 0.1, 0.05]))
    assert crop.groups[0][2:] == ((0.5, 0.05), (0.0, 0.3)) and crop.groups[1][2] == (0.25,)


@pytest.mark.parametrize("size", [(40, 60), (90, 30), (300, 200)])
@pytest.mark.parametrize("side", [32, 128])
def test_open_image_is_what_an_evaluation_feeds(tmp_path, size, side):
    values = np.random.default_rng(0).integers(0, 256, (*size, 4), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")  # with transparency
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(values[..., :3]).save(tmp_path / "b.jpg", exif=exif)
    network = torch.nn.Flatten()  # the features are the input itself
    network.mean, network.std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    files = data.ImageFiles(
        [str(tmp_path / name) for name in ("a.png", "b.jpg")], max_side=2 * side
    )
    ranks = lowdino_ranks()
    fed, _ = compute_rank_features(network, files, side, ranks)
    for path, expected in zip(files.paths, fed):
        image = lowdino.open_image(path, network, side)
        assert image.shape == (1, 3, side, side)
        torch.testing.assert_close(image.flatten(), expected, atol=0.02, rtol=0)


def lowdino_ranks():
    from lowdino import distributed

    return distributed.Ranks(0, 1, torch.device("cpu"))
