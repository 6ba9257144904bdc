"""Detectors on our backbones: what they are given, that they learn, and the table."""

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import tv_tensors
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d, box_iou
from torchvision.transforms.v2 import functional

import eval_linear
import lowdino
from lowdino import annotations, checkpoint, data, demo, detection, distributed, features, linear
from lowdino.evaluate import average_precision, match

ALONE = distributed.Ranks(0, 1, torch.device("cpu"))


def arguments(**changes):
    """The flags of this task, with a step of two pictures."""
    flags = "mobilevit_xxs --task detection --data_path demo_scenes --steps 1".split()
    flags += ["--batch_size_per_gpu", "2"]
    return eval_linear.get_parser().parse(flags, eval_linear.check).replace(**changes)


def with_defaults(**changes):
    return eval_linear.with_defaults(arguments(**changes))


def subject_of(name="mobilevit_xxs", source=None, size=64, ranks=ALONE, **changes):
    """A network and its scenes."""
    source = source or scenes()
    backbone = features.open_network(name)[1]
    return linear.Subject(with_defaults(**changes), ranks, 1, name, name, backbone, source, size)


def scenes(train=4, test=2):
    splits = (annotations.Scenes(range(count)) for count in (train, test))
    return annotations.BoxSource("scenes", *splits, demo.SCENE_CLASSES)


def train(name="mobilevit_xxs", indices=(0, 1, 2, 3), seed=0, **changes):
    return detection.train(subject_of(name, **changes), list(indices), seed)


# ---------------------------------------------------------------------------------------------
# What a detector is given
# ---------------------------------------------------------------------------------------------


def test_flips_equal_torchvisions():
    image, target = scenes().train[0]
    boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=(96, 96))
    flipped_image, flipped = detection.flipped(image, target)
    assert (flipped_image == functional.horizontal_flip(image)).all()
    assert (flipped["boxes"] == functional.horizontal_flip(boxes)).all()
    assert (flipped["labels"] == target["labels"]).all()


def test_training_batches_depend_on_seed_and_step_alone():
    items = [scenes().train[i] for i in range(4)]
    flips = {}
    for step in range(8):
        images, _ = detection.training_batch(items, 0, step, 0)
        again, _ = detection.training_batch(items, 0, step, 0)
        assert all((a == b).all() for a, b in zip(images, again))
        wanted = [image / 255 for image, _ in items]
        flips[step] = [bool((a != b).any()) for a, b in zip(images, wanted)]
        for image, plain, flip in zip(images, wanted, flips[step]):
            assert (image == (plain.flip(2) if flip else plain)).all()
    assert 8 < sum(sum(row) for row in flips.values()) < 24
    assert len({tuple(row) for row in flips.values()}) > 3


def test_crowds_are_not_trained_on():
    image, target = scenes().train[0]
    target = target | {"crowd": torch.arange(len(target["labels"])) == 1}
    _, (kept,) = detection.training_batch([(image, target)], 0, 0, 0)
    assert set(kept) == {"boxes", "labels"}
    assert all(len(value) == len(target["labels"]) - 1 for value in kept.values())


def test_anchors_at_800_pixels_are_cocos():
    sizes = detection.anchor_sizes(800, detection.LARGE.strides)
    assert sizes == ((32,), (64,), (128,), (256,), (512,))


def test_anchors_suit_the_demo_scenes():
    """Nearly every object has an anchor that counts as found, 0.5 and more."""
    _, backbone = features.open_network("mobilevit_xxs")
    detector = detection.build(backbone, 10, 96, freeze_bn=False)
    pictures = ImageList(torch.zeros(1, 3, 96, 96), [(96, 96)])
    maps = [torch.zeros(1, 64, 96 // stride, 96 // stride) for stride in detection.SMALL.strides]
    (anchors,) = detector.rpn.anchor_generator(pictures, maps)
    boxes = torch.cat([target["boxes"] for target in scenes(train=100).train.targets])
    best = box_iou(boxes, anchors).amax(dim=1)
    assert (best > 0.5).float().mean() > 0.9


@pytest.mark.parametrize(
    "size, height, width", [(32, 40, 32), (40, 40, 40), (64, 66, 64), (65, 65, 65), (96, 96, 96)]
)
def test_boxes_are_pooled_where_they_lie(size, height, width):
    """Whatever torchvision's padding adds to the first picture; the scales are kept from it on."""
    _, backbone = features.open_network("mobilevit_xxs")
    detector = detection.build(backbone, 2, size, freeze_bn=True)
    target = {"boxes": torch.tensor([[4.0, 4, 20, 30]]), "labels": torch.tensor([1])}
    detector.train()([torch.rand(3, height, width)], [target])
    assert detector.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    # A map whose cells hold their own x in pixels, the first one's 0, as torchvision has it.
    x = 4 * torch.arange(16.0).expand(1, 1, 16, 16)
    maps = {"0": x} | {str(i): torch.zeros(1, 1, 16 >> i, 16 >> i) for i in (1, 2, 3)}
    pooled = detector.roi_heads.box_roi_pool(maps, [torch.tensor([[14.0, 14, 42, 42]])], [])
    torch.testing.assert_close(pooled[0, 0, 0], 14 + 4 * (torch.arange(7) + 0.5))


def test_shares_of_the_pictures_are_nested():
    small, large = (linear.random_subset(100, fraction, 3) for fraction in (0.1, 0.5))
    assert (len(small), len(large)) == (10, 50) and set(small) < set(large)
    assert small == sorted(small) == linear.random_subset(100, 0.1, 3)
    assert small != linear.random_subset(100, 0.1, 4)
    assert len(linear.random_subset(5, 0.01, 0)) == 1


def test_size_is_the_pictures_own():
    def pictures(*sizes):
        return argparse.Namespace(sizes=sizes)

    assert detection.suitable_size(pictures((300, 200), (100, 150), (90, 800))) == 96  # whole 32s
    assert detection.suitable_size(pictures((3000, 2000))) == 800
    assert detection.suitable_size(pictures((20, 30))) == 32


@pytest.mark.parametrize("workers, shared_memory", [(0, True), (1, True), (1, False)])
def test_batches_are_the_items(workers, shared_memory, monkeypatch):
    monkeypatch.setattr(data, "lacks_shared_memory", lambda: not shared_memory)
    source, order = scenes().train, [[2, 0], [1]]
    batches = list(linear.picture_batches(subject_of(num_workers=workers), source, order))
    assert [len(items) for items in batches] == [2, 1]
    for (image, target), i in zip((item for items in batches for item in items), (2, 0, 1)):
        assert (image == source[i][0]).all()
        assert {*target} == {"boxes", "labels", "crowd"}
        assert all((value == source[i][1][name]).all() for name, value in target.items())


def test_batches_read_what_they_give_alone(monkeypatch):
    source, read = scenes().train, []
    item = annotations.Scenes.__getitem__
    monkeypatch.setattr(
        annotations.Scenes, "__getitem__", lambda data_set, i: read.append(i) or item(data_set, i)
    )
    list(linear.picture_batches(subject_of(), source, [[2], [1]]))
    assert read == [2, 1]


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def test_a_run_repeats_itself():
    one, same, other = (train(steps=3, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all((one[name] == same[name]).all() for name in one)
    assert any((one[name] != other[name]).any() for name in one)


@pytest.fixture
def saved(tmp_path):
    """A backbone file whose batch norm has statistics of its own."""
    torch.manual_seed(0)
    backbone = lowdino.build_backbone("resnet5m")
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
    checkpoint.save_backbone(tmp_path / "backbone.pth", backbone, "resnet5m", 64, 1)
    return str(tmp_path / "backbone.pth")


def statistics(module):
    return [value for name, value in module.state_dict().items() if "running_mean" in name]


@pytest.mark.parametrize("large", [True, False])
def test_batch_norm_of_pretrained_weights(saved, large, monkeypatch):
    """It is frozen on large pictures, as torchvision has it, and trained on small ones."""
    small = detection.SMALL._replace(freeze_bn=large)
    monkeypatch.setattr(detection, "SMALL", small)
    _, backbone = features.open_network(saved)
    trained = train(saved).backbone.body.backbone
    same = [bool((a == b).all()) for a, b in zip(statistics(backbone), statistics(trained))]
    assert all(same) if large else not any(same)
    assert any(isinstance(module, FrozenBatchNorm2d) for module in trained.modules()) == large
    weights = dict(backbone.named_parameters())
    assert any((p != weights[name]).any() for name, p in trained.named_parameters())
    assert detection.detector_size(200).freeze_bn and detection.detector_size(199) is small


def test_batch_norm_of_random_weights_is_trained(monkeypatch):
    monkeypatch.setattr(detection, "SMALL", detection.SMALL._replace(freeze_bn=True))
    _, backbone = features.open_network("resnet5m")
    trained = train("resnet5m").backbone.body.backbone
    assert all((a != b).any() for a, b in zip(statistics(backbone), statistics(trained)))


def test_learning_rates_of_blocks(monkeypatch):
    """All parameters are trained, each at the rate of its block."""
    optimizers = []

    class Spy(torch.optim.AdamW):
        def step(self):
            optimizers.append(
                [(len(g["params"]), g["lr"] / g["scale"], g["scale"]) for g in self.param_groups]
            )
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    detector = train(steps=2, lr=[1e-4], layer_decay=0.5)
    first, last = optimizers
    assert sum(count for count, _, _ in first) == len([*detector.parameters()])
    assert all(rate == pytest.approx(1e-4) for _, rate, _ in first)
    assert all(rate == pytest.approx(5e-5) for _, rate, _ in last)
    assert {scale for _, _, scale in first} > {1.0, 0.5, 0.25}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_divergence_is_one_sentence():
    with pytest.raises(linear.Diverged, match="diverging loss: it.* at step .; a lower --lr may"):
        train(steps=8, lr=[1e12])


def test_fewer_pictures_than_ranks():
    ranks = distributed.Ranks(0, 3, torch.device("cpu"))
    with pytest.raises(distributed.UserError, match="2 labelled images are fewer than the 3 ranks"):
        train(indices=[0, 1], ranks=ranks)


def test_one_small_picture_is_too_few_for_batch_norm():
    with pytest.raises(distributed.UserError, match="batch norm needs two images per process"):
        train(indices=[0], size=32)
    train(indices=[0], size=33)


def test_pictures_without_boxes_are_negatives():
    source = scenes()
    for target in source.train.targets[1:]:
        for name, value in target.items():
            target[name] = value[:0]
    train(source=source, steps=2)
    train(source=source, indices=(1, 2))


@pytest.mark.slow
def test_a_detector_learns_two_scenes_by_heart():
    subject = subject_of(source=scenes(2, 2), size=96, steps=150, lr=[1e-3])
    assert detection.evaluate(subject, detection.train(subject, [0, 1], 0)).ap50 > 0.9


def test_large_pictures_take_torchvisions_own_numbers():
    _, backbone = features.open_network("mobilevit_xxs")
    detector = detection.build(backbone, 90, 320, freeze_bn=True)
    usual = FasterRCNN(detector.backbone, 91)
    ours, theirs = ({n: v.shape for n, v in m.state_dict().items()} for m in (detector, usual))
    assert ours == theirs
    for name in ("_pre_nms_top_n", "_post_nms_top_n", "nms_thresh"):
        assert getattr(detector.rpn, name) == getattr(usual.rpn, name)
    for part in ("rpn", "roi_heads"):
        one, two = (vars(getattr(m, part).fg_bg_sampler) for m in (detector, usual))
        assert one == two


# ---------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------


class Known(nn.Module):
    """A detector that finds what it is told, in the order of the pictures."""

    def __init__(self, answers):
        super().__init__()
        self.answers, self.sizes = iter(answers), []

    def forward(self, images):
        self.sizes.append(len(images))
        assert all(image.max() <= 1 for image in images)
        return [next(self.answers) for _ in images]


def test_evaluation_is_that_of_average_precision():
    pictures, answers = scenes(test=5).test, []
    for i, target in enumerate(pictures.targets):
        boxes = target["boxes"] + torch.tensor([0.0, i, 0, i])  # ever further off
        scores = torch.linspace(0.9, 0.1, len(boxes))
        answers.append({"boxes": boxes, "labels": target["labels"], "scores": scores})
    detector = Known(answers)
    score = detection.evaluate(subject_of(source=scenes(test=5)), detector)
    assert detector.sizes == [2, 2, 1]
    wanted = average_precision([match(*pair) for pair in zip(answers, pictures.targets)])
    assert score.ap == wanted.ap and 0.2 < score.ap < score.ap50


def test_ranks_share_the_evaluation(monkeypatch):
    """Of five pictures the first of two ranks does three, and both know the score of all."""
    pictures, answers = scenes(test=5).test, []
    for i, target in enumerate(pictures.targets):
        scores = torch.full((len(target["labels"]),), 0.5)  # their order is that of the pictures
        boxes = target["boxes"] + 30 * (i % 2)
        answers.append({"boxes": boxes, "labels": target["labels"], "scores": scores})
    subject = subject_of(source=scenes(test=5))
    wanted = detection.evaluate(subject, Known(answers))

    class Gathered(Exception):
        pass

    def gather(matches):
        raise Gathered(matches)

    def evaluate(rank):
        of_rank = replace(subject, ranks=distributed.Ranks(rank, 2, ALONE.device))
        return detection.evaluate(of_rank, Known(answers[rank::2]))

    monkeypatch.setattr(distributed, "gather_objects", gather)
    parts = []
    for rank in (0, 1):
        with pytest.raises(Gathered) as caught:
            evaluate(rank)
        parts.append(caught.value.args[0])
    assert [len(part) for part in parts] == [3, 2]
    monkeypatch.setattr(distributed, "gather_objects", lambda matches: parts)
    for rank in (0, 1):
        assert evaluate(rank)[:2] == wanted[:2]


# ---------------------------------------------------------------------------------------------
# Flags and table
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"models": []}, "--task detection needs one backbone or more"),
        ({"models": ["pixels"]}, "--task detection needs one backbone or more"),
        ({"lr": [1, 2]}, "--task detection takes one --lr and one --weight_decay"),
        ({"weight_decay": [1, 2]}, "--task detection takes one --lr and one --weight_decay"),
        ({"layer_decay": 1.5}, "--layer_decay lies above 0, up to 1, not at 1.5"),
        ({"layer_decay": 0.0}, "--layer_decay lies above 0, up to 1, not at 0.0"),
    ],
)
def test_wrong_flags(changes, sentence):
    assert detection.check(arguments(**changes)) == sentence
    assert detection.check(arguments()) is None


@pytest.fixture
def few_scenes(monkeypatch):
    monkeypatch.setattr(demo, "SCENE_TRAIN", 4)
    monkeypatch.setattr(demo, "SCENE_TEST", 3)


def row_of(args):
    (subject,) = eval_linear.open_subjects(args, ALONE)
    return detection.measure(subject)


def test_a_row(few_scenes, capsys):
    args = with_defaults(label_fraction=[0.5], seeds=[0, 1])
    row = row_of(args)
    json.dumps(row)
    assert row["image_size"] == 96 and row["parameters_M"] == pytest.approx(0.951024)
    (half,) = row["trained"]
    assert half["images"] == [2, 2]
    for ap, ap50 in zip(half["ap"], half["ap50"]):
        assert 0 <= ap <= ap50 <= 1
    args, row["trained"] = args.replace(label_fraction=[0.5, 1.0]), [half, half]
    columns = detection.columns(args)
    headings, cells = [*columns], [cell(row) for cell in columns.values()]
    assert headings == ["pixels", "AP50, 50 %", "AP, 50 %", "AP50, 100 %", "AP, 100 %"]
    assert "±" in cells[-1]
    printed = capsys.readouterr().out
    assert "4 training and 3 test pictures, 10 classes, 96 px" in printed
    assert "0.5 of the pictures (2 images), seed 1: AP50 " in printed


@pytest.fixture
def coco_folder(tmp_path):
    """Noise of several sizes, with a picture without boxes, and boxes that leave theirs."""
    (tmp_path / "annotations").mkdir()
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        images, rows_ = [], []
        for i, (width, height) in enumerate([(50, 40), (64, 70), (40, 40)]):
            values = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(values).save(tmp_path / f"{split}/{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
            row = {"id": i, "image_id": i, "category_id": 5 + i, "bbox": [10, 10, 20, 200]}
            rows_ += [row] * (i < 2)
        content = {"images": images, "annotations": rows_}
        content["categories"] = [{"id": 5, "name": "a"}, {"id": 6, "name": "b"}]
        (tmp_path / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return str(tmp_path)


def test_a_folder_in_cocos_form(coco_folder, capsys):
    row = row_of(with_defaults(data_path=coco_folder, num_workers=0))
    assert row["image_size"] == 32 and len(row["trained"]) == 1
    assert "instances_train.json: 2 boxes reach beyond" in capsys.readouterr().out


def test_networks_of_other_channels(few_scenes, tmp_path):
    backbone = lowdino.build_backbone("resnet5m")
    lowdino.models.set_in_chans(backbone, 1)
    backbone.mean, backbone.std = (0.5,), (0.2,)
    checkpoint.save_backbone(tmp_path / "grey.pth", backbone, "resnet5m", 64, 1)
    with pytest.raises(distributed.UserError, match="are pictures in colours, and .* is of 1"):
        row_of(with_defaults(models=[str(tmp_path / "grey.pth")]))


def test_protocol_says_what_is_done():
    args = with_defaults(steps=70, lr=[0.002], layer_decay=0.7)
    assert "Faster R-CNN on an FPN" in detection.protocol(args)
    for part in ("learning rate 0.002, x 0.7 per block", "70 steps of 2 pictures per process"):
        assert part in detection.protocol(args)


# ---------------------------------------------------------------------------------------------
# From outside
# ---------------------------------------------------------------------------------------------


def test_eval_linear(few_scenes, call_script, tmp_path):
    flags = ("--task", "detection", "--data_path", "demo_scenes", "--steps", 2)
    done = call_script(
        "eval_linear.py", "mobilevit_xxs", *flags, "--seeds", 0, 1, "--output_dir", tmp_path
    )
    assert "protocol: torchvision's Faster R-CNN on an FPN" in done.stdout
    heads, _, row = (tmp_path / "table.md").read_text().splitlines()
    assert heads == "| model | pixels | AP50, 100 % | AP, 100 % |"
    assert row.startswith("| mobilevit_xxs at random initialisation | 96 | ")
    assert row in done.stdout
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["settings"]["steps"] == 2 and len(table["rows"][0]["trained"]) == 1


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (("--data_path", "demo"), "no pictures with boxes at demo: give a folder in COCO's form"),
        (("--solver", "lbfgs"), "--solver goes with --task classification"),
        (
            ("--data_path", "demo_scenes", "--value_range", 0, 9),
            "--value_range is of values of more than 8 bits, and demo_scenes has none",
        ),
        (("--steps", 0), "--steps must be at least 1, not 0"),
        (("--image_size", 31), "--image_size must be at least 32, not 31"),
    ],
)
def test_eval_linear_says_what_is_wrong(call_script, flags, sentence):
    done = call_script("eval_linear.py", "resnet5m", "--task", "detection", *flags, check=False)
    assert done.returncode == 2 and sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_other_tasks_have_no_steps(call_script):
    done = call_script("eval_linear.py", "resnet5m", "--steps", 3, check=False)
    assert done.returncode == 2 and "--steps goes with --task detection" in done.stderr


@pytest.fixture
def run_ranks(run_script, coco_folder, tmp_path):
    """The cell of the table that eval_linear.py makes of one training, on so many ranks."""

    def run(arch, ranks, **flags):
        flags = {"image_size": 64, "batch_size_per_gpu": 1, "num_workers": 0} | flags
        flags = [part for name, value in flags.items() for part in (f"--{name}", value)]
        out = tmp_path / str(ranks)
        flags += ["--task", "detection", "--data_path", coco_folder, "--output_dir", out]
        done = run_script("eval_linear.py", arch, *flags, ranks=ranks)
        assert (out / "table.md").read_text() in done.stdout
        (cell,) = json.loads((out / "table.json").read_text())["rows"][0]["trained"]
        return cell

    return run


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["mobilevit_xxs", "resnet5m", "vit_tiny"])
def test_two_ranks_train(run_ranks, arch):
    cell = run_ranks(arch, 2, steps=3)
    assert 0 <= cell["ap"][0] <= cell["ap50"][0] <= 1


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(run_ranks):
    """Of the same weights: of random ones, in which no step at a learning rate of 0 does anything,
    and without batch norm, which would see one picture in place of two."""
    one, two = (run_ranks("vit_tiny", ranks, steps=1, lr=0) for ranks in (1, 2))
    assert one == two and one["ap50"][0] > 0
