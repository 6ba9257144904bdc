"""A frozen teacher: opened by what names it, and its features of whole images kept in a file.

Without a cache the teacher sees the student's global views. --cache_teacher FILE.npy runs it once
over the images as k-NN sees them, uncropped but for a margin, and keeps its features in float16:
for all views of an image, in all epochs, for all later students. The file is checked at every
start, by the teacher's weights, the images' names and the features of the first of them, and
refused for others; stopped half-way, it goes on.
"""

import hashlib
import importlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset

import lowdino
from lowdino import checkpoint, data, distributed, evaluate, frozen, probe, sources
from lowdino.heads import DINOHead, MultiViewNetwork

CHUNK = 8192  # images whose features are computed and written to a cache at once


class UserError(ValueError):
    """What a user can mend, said in one sentence."""


@dataclass
class Teacher:
    """A frozen network with its classifier and DINO head, where it has them; or features alone."""

    name: str
    fingerprint: str  # of all its weights, or of its file of features
    width: int  # D, of its features
    device: torch.device
    backbone: nn.Module | None = None
    size: int = 0  # side of its input in pixels
    classifier: nn.Linear | None = None
    head: DINOHead | None = None
    center: Tensor | None = None
    features: np.ndarray | None = None  # (N, D), of these images, in their order
    images: data.ImageArray | data.ImageFiles | None = None

    @torch.no_grad()
    def __call__(self, view: Tensor, student: nn.Module) -> Tensor:
        """Features of a view that is normalised for the student: (B, 3, H, W) -> (B, D) float32."""
        theirs, own = frozen.normalisation(student), frozen.normalisation(self.backbone)
        if theirs != tuple(map(tuple, own)):
            values = (
                torch.tensor(v, device=view.device).view(1, -1, 1, 1) for v in (*theirs, *own)
            )
            student_mean, student_std, mean, std = values
            view = (view * student_std + student_mean - mean) / std
        if view.shape[-1] != self.size:
            side = (self.size, self.size)
            view = F.interpolate(view, side, mode="bicubic", align_corners=False, antialias=True)
        return self.backbone(view).float()

    def targets(
        self, views: list[Tensor], indices: Tensor, student: nn.Module, global_views: int = 2
    ) -> Tensor:
        """Its features for each of V views of the images at `indices`: (V * B, D).

        Looked up, those of the whole image for every view; else of the global views, which come
        first, and their mean for every local one.
        """
        if self.features is not None:
            rows = np.asarray(self.features[indices.cpu().numpy()], dtype=np.float32)
            return torch.from_numpy(rows).to(self.device).repeat(len(views), 1)
        seen = [self(view, student) for view in views[:global_views]]
        return torch.cat(seen + [sum(seen) / len(seen)] * (len(views) - len(seen)))

    def features_of(
        self, images: data.ImageArray | data.ImageFiles, workers: int, ranks: distributed.Ranks
    ) -> evaluate.Features:
        """Features of whole images, looked up or computed over all ranks.

        Raises:
            UserError: where the teacher is a file of features, of other images.
        """
        if self.features is not None and images is self.images:
            rows = torch.from_numpy(np.asarray(self.features, dtype=np.float32))
            labels = torch.as_tensor(images.labels)
            return evaluate.Features(rows.to(self.device), labels.to(self.device), [])
        if self.backbone is None:
            raise UserError(
                f"{self.name} holds features of the images to train on alone, and others are needed"
            )
        return features_of_images(self, images, range(len(images)), workers, ranks)


def fingerprint(*modules: nn.Module | None) -> str:
    """SHA-256 over names and values of all weights, in 16 digits for each module."""
    return "-".join(digest_of(module) for module in modules if module is not None)


def digest_of(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().flatten().clone().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------
# Opening
# ---------------------------------------------------------------------------------------------


def open_teacher(args, source: sources.Data, ranks: distributed.Ranks) -> Teacher:
    """The teacher that --teacher names.

    Args:
        args: with teacher, teacher_size, teacher_head, objective and global_crops_size.

    Raises:
        UserError: in one sentence, where it cannot be used.
    """
    if args.teacher.endswith((".npy", ".npz")):
        return features_of_file(args.teacher, source, ranks)
    arch, _, path = args.teacher.partition("=")
    path = path if arch in lowdino.ARCHS else args.teacher
    content: dict = {}
    head = center = None
    if not os.path.isfile(path) and ":" in path:
        name, backbone = path, imported(path)
    else:
        content = checkpoint.load(path)
        if "settings" in content:
            name = path
            backbone, head, center = teacher_of_run(path, content)
        else:
            name, backbone = frozen.open_network(args.teacher)
    if head is None and "dino" in args.objective:
        raise UserError(
            "--objective dino needs the teacher's head: give a checkpoint.pth of train.py, not "
            f"{path}"
        )
    size = args.teacher_size or getattr(backbone, "image_size", None) or args.global_crops_size
    if not isinstance(size, int):
        raise UserError(
            f"{name} takes images of {size} pixels; give one --teacher_size for both sides"
        )
    classifier = classifier_of_file(path, content) if args.teacher_head == "file" else None
    backbone, head, classifier = (freeze(m, ranks) for m in (backbone, head, classifier))
    channels = len(frozen.normalisation(backbone)[0])
    if channels != args.in_chans:
        raise UserError(f"{name} sees {channels} channels, and --in_chans is {args.in_chans}")
    width = width_of(name, backbone, size, ranks)
    key = fingerprint(backbone, head, classifier)
    return Teacher(
        name, key, width, ranks.device, backbone, size, classifier, head=head, center=center
    )


def freeze(module: nn.Module | None, ranks: distributed.Ranks) -> nn.Module | None:
    if module is None:
        return None
    module = module.to(ranks.device, memory_format=torch.channels_last)
    return module.eval().requires_grad_(False)


def width_of(name: str, backbone: nn.Module, size: int, ranks: distributed.Ranks) -> int:
    """Number of features that a network gives for an image."""
    try:
        with torch.no_grad():
            channels = len(frozen.normalisation(backbone)[0])
            features = backbone(torch.zeros(1, channels, size, size, device=ranks.device))
    except Exception as error:  # somebody else's code fails in any way there is
        raise UserError(
            f"{name} cannot take an image of {size} x {size} pixels, see --teacher_size: {error}"
        ) from error
    if not isinstance(features, Tensor) or features.ndim != 2:
        is_tensor = isinstance(features, Tensor)
        given = tuple(features.shape) if is_tensor else f"a {type(features).__name__}"
        raise UserError(
            f"{name} gives {given} for an image, where a tensor (1, features) was expected"
        )
    return features.shape[1]


def imported(path: str) -> nn.Module:
    """What MODULE:FUNCTION returns, looked for in the current folder too."""
    module, _, function = path.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        backbone = getattr(importlib.import_module(module), function)()
    except Exception as error:  # somebody else's code fails in any way there is
        raise UserError(f"--teacher {path}: cannot import and call it: {error}") from error
    if not isinstance(backbone, nn.Module):
        kind = type(backbone).__name__
        raise UserError(f"--teacher {path} returns a {kind}, where a network was expected")
    return backbone


def teacher_of_run(path: str, content: dict) -> tuple[nn.Module, DINOHead, Tensor]:
    """Backbone, head and centre of the momentum teacher in a checkpoint of train.py."""
    settings, state = content["settings"], content.get("method", {})
    weights = under("teacher.", state)
    if "loss.center" not in state or not weights:
        raise UserError(
            f"{path} is a checkpoint without a DINO head, as train.py --method dino has"
        )
    arch, own = settings["arch"], under("backbone.", weights)
    is_vit = arch in lowdino.vit.ARCHS
    backbone = lowdino.vit.like(own) if is_vit else lowdino.build_backbone(arch)
    lowdino.models.set_in_chans(backbone, settings.get("in_chans", 3))
    head = DINOHead(
        backbone.embed_dim,
        settings["out_dim"],
        settings["use_bn_in_head"],
        settings["norm_last_layer"],
        settings["hidden_dim"],
    )
    MultiViewNetwork(backbone, head).load_state_dict(weights)
    backbone.mean, backbone.std = map(tuple, content["normalisation"])
    backbone.image_size = settings["global_crops_size"]
    return backbone, head, state["loss.center"]


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of a state dict below a prefix, which is taken off."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def classifier_of_file(path: str, content: dict) -> nn.Linear:
    try:
        weights = content["classifier"]
        classifier = nn.Linear(weights["weight"].shape[1], weights["weight"].shape[0])
        classifier.load_state_dict(weights)
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise UserError(
            f"{path} holds no classifier, with weight and bias; eval_linear.py --finetune writes "
            "such a file, --teacher_head train trains one"
        ) from error
    return classifier


def features_of_file(path: str, source: sources.Data, ranks: distributed.Ranks) -> Teacher:
    """A teacher that is an array (N, D): an .npy, or `train` of eval_knn.py --features."""
    try:
        arrays = np.load(path, mmap_mode="r", allow_pickle=False)
        files = None
        if isinstance(arrays, np.lib.npyio.NpzFile):
            with arrays:
                files = arrays["train_files"] if "train_files" in arrays else None
                arrays = arrays["train"]
    except FileNotFoundError as error:
        raise UserError(f"no file {path}") from error
    except Exception as error:  # a damaged file makes zipfile and numpy fail in any way there is
        raise UserError(
            f"cannot read {path}: it is damaged, or not a file of features, (N, D), `train` in "
            "an .npz"
        ) from error
    if arrays.ndim != 2 or arrays.dtype.kind != "f":
        raise UserError(
            f"{path}: features should be (N, D) floating-point numbers, not {arrays.shape} "
            f"{arrays.dtype}"
        )
    names = getattr(source.pretrain, "paths", None)
    other_names = files is not None and names is not None
    if other_names:
        other_names = [os.path.basename(str(f)) for f in files] != list(
            map(os.path.basename, names)
        )
    if len(arrays) != len(source.pretrain) or other_names:
        raise UserError(
            f"{path} holds features of {len(arrays)} other images than the {len(source.pretrain)} "
            f"of {source.name}"
        )
    if not all(np.isfinite(arrays[i : i + CHUNK]).all() for i in range(0, len(arrays), CHUNK)):
        raise UserError(f"{path} has values that are not finite numbers")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    key = digest.hexdigest()[:16]
    images = source.pretrain
    return Teacher(path, key, arrays.shape[1], ranks.device, features=arrays, images=images)


# ---------------------------------------------------------------------------------------------
# Features of whole images, and their cache
# ---------------------------------------------------------------------------------------------


def features_of_images(
    teacher: Teacher,
    images: data.ImageArray | data.ImageFiles,
    indices: range,
    workers: int,
    ranks: distributed.Ranks,
) -> evaluate.Features:
    """Features of whole images, read at twice the teacher's side whatever the views need."""
    files = isinstance(images, data.ImageFiles)
    if files:
        images.max_side, before = 2 * teacher.size, images.max_side
    part = Subset(images, indices)
    found = frozen.features(teacher.backbone, part, teacher.size, ranks, workers=workers)
    if files:
        images.max_side = before
    return found


def cached_features(
    teacher: Teacher,
    images: data.ImageArray | data.ImageFiles,
    path: Path,
    workers: int,
    ranks: distributed.Ranks,
) -> np.ndarray:
    """The teacher's features of the whole images: (N, D) float16, in a memory-mapped file.

    The file is made where it is missing. Beside it, PATH.json says which weights and images it
    belongs to and how many rows are done, so that a stopped run goes on.

    Raises:
        UserError: where the file cannot be written, is damaged, belongs to other weights or images,
            or a feature does not fit float16.
    """
    notes = Path(f"{path}.json")
    weights = teacher.fingerprint.split("-")[0]  # the backbone's: heads change no feature
    own = {"teacher": weights, "images": images.fingerprint(), "size": teacher.size}
    done = rows_in_cache(path, notes, own, len(images))
    if done:
        compare_first_rows(teacher, images, path, workers, ranks)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if done < len(images) and not os.access(path.parent, os.W_OK):
            raise OSError(0, "it cannot be written to")
    except OSError as error:
        raise UserError(
            f"--cache_teacher {path}: folder {path.parent}: {error.strerror}"
        ) from error
    if dist.is_initialized():
        dist.barrier()  # all have read what the first rank is going to change
    # The file outlives this run: no other image may stand in for one that cannot be read.
    replaced, images.replace_bad = images.replace_bad, False
    fill_cache(teacher, images, path, own, done, workers, ranks)
    images.replace_bad = replaced
    if dist.is_initialized():
        dist.barrier()
    return np.load(path, mmap_mode="r")


def rows_in_cache(path: Path, notes: Path, own: dict, total: int) -> int:
    """How many rows of a cache are done, which must be one of the same teacher and images."""
    if not notes.exists():
        if path.exists():
            raise UserError(
                f"--cache_teacher {path} exists without {notes.name}, which would say whose it is: "
                "give another file"
            )
        return 0
    try:
        theirs = json.loads(notes.read_text())
        known = (("teacher", "weights"), ("images", "images"), ("size", "sizes"))
        others = [(what, theirs[key], own[key]) for key, what in known if theirs[key] != own[key]]
        done = 0 if others else check_rows(path, theirs["done"], total)
    except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
        raise UserError(f"--cache_teacher {path} is damaged: delete it and {notes.name}") from error
    if others:
        what, theirs, ours = others[0]
        raise UserError(
            f"--cache_teacher {path} belongs to other {what} ({theirs}, not {ours}): give another "
            f"file, or delete it and {notes.name}"
        )
    return done


def check_rows(path: Path, done: int, total: int) -> int:
    """`done`, where that many rows of a cache are there.

    Raises:
        ValueError, TypeError, OSError: where they are not.
    """
    if type(done) is not int or not 0 <= done <= total:
        raise ValueError(f"{done} of {total} rows")
    if done:
        stored = np.load(path, mmap_mode="r")
        fits = stored.ndim == 2 and len(stored) == total and stored.dtype == np.float16
        if not fits or not np.isfinite(stored[:done]).all():
            raise ValueError(f"{stored.shape} {stored.dtype}")
    return done


def compare_first_rows(teacher, images, path: Path, workers: int, ranks) -> None:
    """Refuse a cache whose first features are not those that the teacher gives now."""
    few = range(min(len(images), max(8, ranks.world)))
    first = features_of_images(teacher, images, few, workers, ranks).features.cpu()
    stored = np.load(path, mmap_mode="r")[: len(first)]
    near = 0.02 * first.std().item()
    if stored.shape != first.shape or not np.allclose(stored, first, rtol=0.02, atol=near):
        raise UserError(
            f"--cache_teacher {path} holds other features of the first images than this teacher "
            "gives: they, or how it sees them, have changed; give another file, or delete it and "
            f"{path.name}.json"
        )


def fill_cache(teacher, images, path: Path, own: dict, done: int, workers: int, ranks) -> None:
    """Compute the rows that are missing, CHUNK at a time; the first rank writes them."""

    def note(rows: int) -> None:
        with checkpoint.atomic(f"{path}.json") as file:
            file.write(json.dumps(own | {"done": rows}).encode())

    total = len(images)
    while done < total:
        # The last chunk takes in what would leave a rank without an image.
        stop = done + CHUNK if total - done - CHUNK >= ranks.world else total
        rows = features_of_images(teacher, images, range(done, stop), workers, ranks)
        rows = rows.features.half()
        if not rows.isfinite().all():
            raise UserError(
                f"features of {teacher.name} exceed float16's range, 65,504: --cache_teacher "
                "cannot hold them"
            )
        if ranks.first:
            if done == 0:
                note(0)
            mode, shape = "r+" if done else "w+", (total, rows.shape[1])
            file = np.lib.format.open_memmap(path, mode, np.float16, shape)
            file[done:stop] = rows.cpu().numpy()
            file.flush()
            note(stop)
            print(f"teacher: features of {stop} of {total} images in {path}", flush=True)
        done = stop


# ---------------------------------------------------------------------------------------------
# Its classifier
# ---------------------------------------------------------------------------------------------


def add_classifier(teacher: Teacher, args, source: sources.Data, ranks: distributed.Ranks) -> None:
    """Train the classifier that --teacher_head train asks for, and see that it fits.

    Raises:
        UserError: where labels are needed and missing, or the classifier is for others.
    """
    if args.teacher_head == "train":
        if source.train is None:
            raise UserError(f"--teacher_head train needs labels, and {source.name} has none")
        x, y, _ = teacher.features_of(source.train, args.num_workers, ranks)
        teacher.classifier = trained_classifier(x, y, source.classes)
    classifier, classes = teacher.classifier, source.classes
    if classifier and classifier.in_features != teacher.width:
        raise UserError(
            f"{teacher.name}: its classifier takes {classifier.in_features} features, its network "
            f"gives {teacher.width}"
        )
    if classifier and classes not in (0, classifier.out_features):
        raise UserError(
            f"{teacher.name}: its classifier knows {classifier.out_features} classes, "
            f"{source.name} has {classes}; --teacher_head train trains another"
        )
    if args.kd_weight < 1 and source.train is not source.pretrain:
        raise UserError(
            f"--kd_weight {args.kd_weight} needs labels, and {source.name} has none for the images "
            "to train on"
        )


def trained_classifier(features: Tensor, labels: Tensor, classes: int) -> nn.Linear:
    """Logistic regression on features (N, D), with weight decay 1e-4 on scaled ones, as a layer
    that takes them as they are."""
    scaler = probe.Scaler(features)
    weights = probe.logistic_regression(scaler(features), labels, classes, [1e-4])[:, 0]  # (D+1, C)
    layer = nn.Linear(features.shape[1], classes).to(features.device).requires_grad_(False)
    with torch.no_grad():
        layer.weight.copy_((scaler.matrix @ weights[:-1]).T)
        layer.bias.copy_(weights[-1] - scaler.mean @ scaler.matrix @ weights[:-1])
    return layer
