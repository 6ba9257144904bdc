"""Frozen networks: opened by name or file, their features over all ranks, and a cache of these."""

import copy
import json
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Subset

import lowdino
from lowdino import (
    augment,
    checkpoint,
    data,
    datasets,
    descriptors,
    distributed,
    evaluate,
    losses,
    probe,
    schedules,
)
from lowdino.distributed import Ranks, UserError, user_errors
from lowdino.heads import Projector
from lowdino.schedules import Stream

Images = data.ImageArray | data.ImageFiles

# -- Networks --------------------------------------------------------------------------------------


class RawPixels(nn.Module):
    """The pixels as features, (B, C * min(S, 32)^2), reduced to 32 x 32 by area means.

    More pixels add little, and the cost of a probe grows with the square of their number.
    """

    def forward(self, x: Tensor) -> Tensor:
        return descriptors.reduced(x).flatten(1)


class Pooled(nn.Module):
    """A backbone with a choice of pooling.

    `pool` is "default", that of the backbone; "mean" or "max" of its last map; or "default+mean" or
    "default+max", both side by side.
    """

    def __init__(self, backbone: nn.Module, pool: str):
        super().__init__()
        self.backbone, self.pool = backbone, pool
        self.mean, self.std = normalisation(backbone)
        self.training = backbone.training

    def forward(self, x: Tensor) -> Tensor:
        if self.pool == "default":
            return self.backbone(x)  # (B, D)
        features = self.backbone.forward_features(x).flatten(2)  # (B, C, h * w)
        features = features.amax(dim=2) if self.pool.endswith("max") else features.mean(dim=2)
        if self.pool.startswith("default+"):
            features = torch.cat([self.backbone(x), features], dim=1)
        return features  # (B, C) or (B, D + C)


def normalisation(network: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel that a network's input needs; by default ImageNet's."""
    mean = getattr(network, "mean", augment.IMAGENET_MEAN)
    return mean, getattr(network, "std", augment.IMAGENET_STD)


def open_network(name: str, seed: int = 0) -> tuple[str, nn.Module]:
    """Open a network by name: its title and the module; a UserError where there is none.

    `name` is "pixels" or "patches", which learn nothing; an architecture, for its random
    initialisation by `seed`; a file that `lowdino.load_backbone` reads; or ARCH=FILE, for a plain
    state dict of a ConvNet.
    """
    if name == "pixels":
        return "raw pixels", RawPixels()
    if name == "patches":
        return "patch dictionary", descriptors.PatchDictionary()
    arch, equals, weights = name.partition("=")
    torch.manual_seed(seed)
    if arch in lowdino.ARCHS and not equals:
        return f"{arch} at random initialisation, seed {seed}", lowdino.build_backbone(arch)
    if arch not in lowdino.ARCHS:
        if not os.path.exists(name):
            known = f"no such architecture; there are {', '.join(lowdino.ARCHS)}"
            raise UserError(f"no file {name}, and {known}")
        arch, weights = None, name
    backbone = lowdino.load_backbone(weights, arch)
    epoch = f", epoch {backbone.epoch}" if hasattr(backbone, "epoch") else ""
    return f"{backbone.arch} of {weights}{epoch}", backbone


def build_backbone(s) -> nn.Module:
    """The backbone to train, from random weights or --init, the same on every rank.

    A UserError says that --init does not fit the settings.
    """
    torch.manual_seed(s.seed)
    is_vit = s.arch in lowdino.vit.ARCHS
    if s.init:
        backbone = lowdino.load_backbone(s.init, s.arch).train()
        backbone.whitening = nn.Identity()  # that of the weights before training
        if is_vit and (size := backbone.patch_size) != s.patch_size:
            raise UserError(f"--init {s.init} has patches of {size} px: give --patch_size {size}")
    else:
        shape = dict(patch_size=s.patch_size, image_size=s.global_crops_size)
        backbone = lowdino.build_backbone(s.arch, **(shape if is_vit else {}))
    try:
        lowdino.models.set_in_chans(backbone, s.in_chans)
    except ValueError as error:
        raise UserError(f"--init {s.init}: {error} (--in_chans {s.in_chans})") from error
    if is_vit:
        backbone.set_drop_path_rate(s.drop_path_rate)
    return backbone


FLOORS = {"pixels", "patches"}  # networks that learn nothing


# -- Features --------------------------------------------------------------------------------------


def check_finite(outputs: Tensor, name: str) -> None:
    """Raise a UserError where a network's outputs, called `name`, are not all finite."""
    if not outputs.isfinite().all():
        raise UserError(
            f"{name} of the network are not finite: its weights are damaged or diverged"
        )


def open_images(
    args, backbone: nn.Module, ranks: Ranks, labelled: bool = True
) -> tuple[datasets.Source, int, int]:
    """The images of an evaluation, the side of the network's input, and the number of workers.

    `args` are of `settings.EVALUATION_FLAGS`. A UserError says that needed labels are missing.
    """
    source = datasets.open_source(args, ranks.rank)
    if labelled and source.test is None:
        raise UserError(f"{source.name} has no labels to test on: {source.no_labels}")
    channels = len(normalisation(backbone)[0])
    source.set_pixel_format(channels=channels, max_megapixels=args.max_megapixels)
    size = args.image_size or getattr(backbone, "image_size", None)
    size = size or data.suitable_size(source.pretrain)
    source.limit_side(2 * size)
    remark = data.fit_images_to_backbone(args, backbone, source)
    if remark and ranks.first:
        print(f"{source.name}{remark}")
    workers = data.loader_processes(source.pretrain, args.num_workers)
    if isinstance(backbone, descriptors.PatchDictionary):
        fit_dictionaries(backbone, source.pretrain, ranks, workers, getattr(args, "seed", 0))
    return source, size, workers


def compute_rank_features(
    network, images: Images, size: int, ranks: Ranks, batch_size=256, workers=0, through=iter
) -> tuple[Tensor, Tensor]:
    """Features and labels of this rank's share of the images: every world-th one.

    Args:
        size: side of the central view, in pixels. batch_size: per process.
        through: a function that passes the batches on, to time them for instance.
    """
    mean, std = normalisation(network)

    def view(canvas: Tensor, sizes: Tensor) -> Tensor:
        x = augment.central_view(canvas, sizes, size, mean, std)
        return x.contiguous(memory_format=torch.channels_last)

    batches = data.evaluation_loader(images, batch_size, workers, ranks.rank, ranks.world)
    return evaluate.extract_features(network, through(batches), view, ranks.device)


def compute_features(
    backbone, images: Images, size: int, ranks: Ranks, batch_size=256, workers=0, pool="default"
) -> evaluate.Features:
    """float32 features (N, D), labels (N,) and file names of all images, on every rank.

    Each rank computes a share, see `compute_rank_features`. `pool` is that of `Pooled`. A UserError
    says that some features are not finite.
    """
    network = Pooled(backbone, pool)
    share = compute_rank_features(network, images, size, ranks, batch_size, workers)
    names = getattr(images, "paths", None) or [str(i) for i in range(len(images))]
    rows = (distributed.gather_strided(part, len(images)) for part in share)
    features = evaluate.Features(*rows, names)
    check_finite(features.features, "features")
    return features


def compute_splits(
    backbone, source: datasets.Source, size: int, ranks: Ranks, workers=0, **options
) -> list[evaluate.Features]:
    """`compute_features` of the labelled training images and of the test images."""
    splits = source.train, source.test
    options["workers"] = workers
    return [compute_features(backbone, part, size, ranks, **options) for part in splits]


def whiten(
    train: evaluate.Features, test: evaluate.Features
) -> tuple[nn.Linear, list[evaluate.Features]]:
    """The whitening layer of the training features, and both splits through it."""
    layer = whitening_layer(train.features)
    return layer, [part._replace(features=layer(part.features)) for part in (train, test)]


def whitening_layer(features: Tensor) -> nn.Linear:
    """A layer that half-whitens such features (N, D), (B, D) -> (B, D); see `probe.HalfWhitening`.

    Then all directions count in a cosine, not only those of the largest variance. The power, 0.35,
    was the best of three for k-NN of held-out training images.
    """
    scaler, D = probe.HalfWhitening(features, power=0.35), features.shape[1]
    layer = nn.Linear(D, D, device=features.device).requires_grad_(False)
    layer.weight.copy_(scaler.matrix.T)
    layer.bias.copy_(-scaler.mean @ scaler.matrix)
    return layer


# -- The patch dictionary --------------------------------------------------------------------------

SAMPLE = 10_000  # images that a dictionary and a whitening are fitted to


def sampled(images: Images, seed: int) -> Subset:
    """At most SAMPLE of the images, drawn by the seed."""
    generator = augment.seeded_generator("cpu", Stream.SAMPLE, seed)
    chosen = torch.randperm(len(images), generator=generator)[:SAMPLE]
    return Subset(images, chosen.sort().values.tolist())


def sample_pixels(images: Images, channels: int, seed: int, ranks: Ranks, workers=0) -> Tensor:
    """The sampled images reduced to 32 x 32 pixels, (n, C, 32, 32) in [0, 1], on every rank."""
    pixels = RawPixels()
    pixels.mean, pixels.std = (0.0,) * channels, (1.0,) * channels
    rows = compute_features(pixels, sampled(images, seed), 32, ranks, workers=workers).features
    return rows.clamp(0, 1).view(-1, channels, 32, 32)


@user_errors()
def whiten_file(folder: Path, layer: nn.Linear | None, images: Images, s, ranks: Ranks) -> None:
    """Add a whitening to the backbone.pth in a run's folder: `layer`, else that of a sample."""
    path = folder / "backbone.pth"
    content = checkpoint.load(path) if path.exists() else {}
    if "whitening.weight" in content.get("state_dict", ["whitening.weight"]):
        return
    if layer is None:
        backbone = lowdino.load_backbone(path).to(ranks.device, memory_format=torch.channels_last)
        size, workers = s.global_crops_size, s.num_workers
        rows = compute_features(backbone, sampled(images, s.seed), size, ranks, workers=workers)
        layer = whitening_layer(rows.features)
    if ranks.first:
        for name, value in layer.state_dict(prefix="whitening.").items():
            content["state_dict"][name] = value.cpu()
        checkpoint.save_atomic(path, content)


def crop_recall(network: nn.Module, images: Tensor, seed: int = 0, most: int = 1000) -> float:
    """A score without labels: how often a crop's nearest features are those of the same image.

    Two crops, of half the area or more, with other colours, are made of each of `most` images
    (N, C, S, S) in [0, 1]. The share of second crops whose nearest first crop is of their image.
    """
    images = (images[:most] * 255).round().to(torch.uint8)
    size, (mean, std) = images.shape[-1], normalisation(network)
    crops = augment.MultiCrop(
        size, size, 0, (0.5, 1.0), blur=(0, 0, 0), solarize=0, mean=mean, std=std
    )
    sizes = torch.tensor([[size, size]], device=images.device).expand(len(images), 2)
    generator = augment.seeded_generator(images.device, Stream.CROPS, seed)
    training = network.training
    with torch.no_grad():
        views = crops.to(images.device)(images, sizes, generator)
        first, second = (torch.cat([network.eval()(x) for x in v.split(250)]) for v in views)
    network.train(training)
    _, nearest = evaluate.nearest_neighbours(first, second, k=1)
    return (nearest[:, 0].cpu() == torch.arange(len(images))).float().mean().item()


def patch_features(dictionary: descriptors.PatchDictionary, batch: data.Batch) -> Tensor:
    """A dictionary's features of the uncropped images of a batch: (B, D)."""
    size, normal = dictionary.image_size, (dictionary.mean, dictionary.std)
    return dictionary(augment.central_view(batch.images, batch.sizes, size, *normal))


class PatchStart(nn.Module):
    """A loss to begin any method with: views follow the similarities of a patch dictionary.

    The teacher of `losses.SimilarityLoss` is `descriptors.PatchDictionary` of the plain image. The
    weight falls on a cosine, from `weight` at the first step to 0 at the end of the run. Without a
    weight there are no parameters and no loss.
    """

    def __init__(self, backbone: nn.Module, weight: float):
        super().__init__()
        self.weight = weight
        if weight:
            self.dictionary = descriptors.PatchDictionary(len(normalisation(backbone)[0]))
            width = self.dictionary.embed_dim
            self.projector = Projector(backbone.embed_dim, max(backbone.embed_dim, width), width)
            self.loss = losses.SimilarityLoss(width, teacher_temp=0.1)
            self.register_buffer("useful", torch.tensor(True))

    def forward(self, features: Tensor, batch: data.Batch | None, step: int, total_steps: float):
        """The weighted loss, a scalar, for features (V B, D) of V views of a batch."""
        if not self.weight:
            return 0.0
        if batch is None:
            raise ValueError("patches_weight needs the batch of a view; 0 does without")
        loss = self.loss(self.projector(features), patch_features(self.dictionary, batch))
        weight = schedules.cosine(step, total_steps, self.weight, 0.0)
        return weight * self.useful * loss


def patch_accuracy(method: nn.Module, source: datasets.Source, s, ranks: Ranks) -> dict[str, float]:
    """The k-NN accuracy of a method's patch dictionary, as `patches_knn`: a floor.

    Empty without a dictionary, and in runs of less than ten minutes, which have no time for it.
    """
    start = getattr(method, "patches", None)
    if not (start and start.weight) or (s.minutes or 10) < 10:
        return {}
    dictionary = start.dictionary
    pair = compute_splits(dictionary, source, dictionary.image_size, ranks, s.num_workers)
    return {"patches_knn": evaluate.knn_accuracy(*pair, s.nb_knn, source.classes)}


def fit_dictionaries(
    module: nn.Module, images: Images, ranks: Ranks, workers=0, seed=0
) -> list[str]:
    """Fit the patch dictionaries of a network or method, on all ranks alike; lines for the log.

    One that recognises no more crops than the network does before its training is left out of a
    method's loss. Without dictionaries nothing is done.
    """
    known = [part for part in module.modules() if isinstance(part, descriptors.PatchDictionary)]
    if not known:
        return []
    begun, module = time.perf_counter(), module.to(ranks.device)
    pixels = sample_pixels(images, len(known[0].mean), seed, ranks, workers)
    for dictionary in known:
        dictionary.fit(pixels, seed)
    line = f"patch dictionary of {len(pixels)} images in {time.perf_counter() - begun:.0f} s"
    if start := getattr(module, "patches", None):
        score, floor = (crop_recall(net, pixels) for net in (start.dictionary, module.backbone))
        start.useful.fill_(score > floor)
        line += f"; by it {score:.1%} of crops find their image, by the network {floor:.1%}"
        line += ", so the run does without it" * (score <= floor)
    distributed.broadcast_buffers(module)
    return [line]


# -- The cache of a teacher's features -------------------------------------------------------------
# PATH is an .npy array (N, D) float16. PATH.json holds its key (weights, images and size) and the
# number of rows that are done, so that a stopped run can resume.

CHUNK = 8192  # images per step of computing, checking and writing


def compute_teacher_features(
    teacher, images: Images, indices: range, workers: int, ranks: Ranks
) -> evaluate.Features:
    """Features of the images at `indices`, read at twice the teacher's side whatever views need."""
    images = copy.copy(images)
    images.max_side = 2 * teacher.size  # which images in memory ignore
    part = Subset(images, indices)
    return compute_features(teacher.backbone, part, teacher.size, ranks, workers=workers)


def cached_features(teacher, images: Images, path: Path, workers: int, ranks: Ranks) -> np.ndarray:
    """The teacher's features of all images, (N, D) float16 and memory-mapped, by way of the cache.

    A UserError says that the file cannot be written, is damaged or belongs to other weights or
    images, or that a feature does not fit float16.
    """
    backbone = teacher.fingerprint.split("-")[0]  # heads change no feature
    key = {"teacher": backbone, "images": images.fingerprint(), "size": teacher.size}
    images = copy.copy(images)
    images.replace_bad = False  # the file outlives this run, so nothing may replace an image
    features_of = partial(compute_teacher_features, teacher, images, workers=workers, ranks=ranks)
    total = len(images)
    done = count_cached_rows(path, key, total)
    if done:
        first = range(min(total, max(8, ranks.world)))
        compare_first_rows(path, features_of(first).features.cpu())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if done < total and not os.access(path.parent, os.W_OK):
            raise OSError(0, "it cannot be written to")
    except OSError as error:
        reason = f"folder {path.parent}: {error.strerror}"
        raise UserError(f"--cache_teacher {path}: {reason}") from error
    if dist.is_initialized():
        dist.barrier()  # all have read what the first rank is going to change
    while done < total:
        # The last chunk is longer where its rest would leave a rank without an image.
        stop = done + CHUNK if total - done - CHUNK >= ranks.world else total
        rows = features_of(range(done, stop)).features.half()
        if not rows.isfinite().all():
            reason = f"features of {teacher.name} exceed float16's range, 65,504"
            raise UserError(f"--cache_teacher {path}: {reason}")
        if ranks.first:
            write_rows(path, key, done, total, rows.cpu().numpy())
        done = stop
    if dist.is_initialized():
        dist.barrier()
    return np.load(path, mmap_mode="r")


def count_cached_rows(path: Path, key: dict, total: int) -> int:
    """Number of rows that are done in the cache at `path`; a UserError where it does not fit."""
    notes = Path(f"{path}.json")
    if not notes.exists():
        if path.exists():
            reason = f"exists without {notes.name}, which would say whose it is"
            raise UserError(f"--cache_teacher {path} {reason}: give another file")
        return 0
    try:
        stored = json.loads(notes.read_text())
        differing = [name for name in key if stored[name] != key[name]]
        fits = differing or rows_fit(path, stored["done"], total)
    except (ValueError, KeyError, TypeError, OSError, EOFError):
        fits = False
    if not fits:
        raise UserError(f"--cache_teacher {path} is damaged: delete it and {notes.name}")
    for name in differing:
        raise UserError(
            f"--cache_teacher {path} belongs to {name} {stored[name]}, not {key[name]}: give "
            f"another file, or delete it and {notes.name}"
        )
    return stored["done"]


def rows_fit(path: Path, done: object, total: int) -> bool:
    """Whether a cache of `total` rows has its first `done` rows."""
    if type(done) is not int or not 0 <= done <= total:
        return False
    if done == 0:
        return True
    stored = np.load(path, mmap_mode="r")
    shape_fits = stored.ndim == 2 and len(stored) == total and stored.dtype == np.float16
    return shape_fits and bool(np.isfinite(stored[:done]).all())


def compare_first_rows(path: Path, features: Tensor) -> None:
    """Raise a UserError where the cache does not begin with these features (n, D), nearly."""
    stored = np.load(path, mmap_mode="r")[: len(features)]
    near = 0.02 * features.std().item()
    if stored.shape != features.shape or not np.allclose(stored, features, rtol=0.02, atol=near):
        raise UserError(
            f"--cache_teacher {path} holds other features of the first images than this teacher "
            f"gives: give another file, or delete it and {path.name}.json"
        )


def write_rows(path: Path, key: dict, start: int, total: int, rows: np.ndarray) -> None:
    """Write rows of a cache from row `start` on, then note that they are done."""

    @user_errors()
    def note(done: int) -> None:
        with checkpoint.atomic(f"{path}.json") as file:
            file.write(json.dumps(key | {"done": done}).encode())

    if start == 0:
        note(0)  # first, because an array without its notes is refused
    mode, shape = "r+" if start else "w+", (total, rows.shape[1])
    array = np.lib.format.open_memmap(path, mode, np.float16, shape)
    stop = start + len(rows)
    array[start:stop] = rows
    array.flush()
    note(stop)
    print(f"teacher: features of {stop} of {total} images in {path}", flush=True)
