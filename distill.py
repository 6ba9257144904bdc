#!/usr/bin/env python3
"""Distil a big frozen teacher into a small network, without labels or with them (LowDINO, figure 3;
DINOv2, section 5).

    python distill.py --teacher dinov2_vits14_pretrain.pth --arch mobilevit_s --data_path pictures
    python distill.py --teacher resnet50=dino_resnet50_pretrain.pth --arch resnet5m \
        --objective simkd --cache_teacher t.npy
    python distill.py --teacher dino/checkpoint.pth --arch mobilevit_xxs --objective dino

A teacher is a backbone.pth, a state dict of DINO's or DINOv2's ViT, ARCH=FILE for another plain
state dict, a checkpoint.pth of train.py (of --method dino with its head), MODULE:FUNCTION that
returns a network, or a .npy or .npz of its features. Objectives: kd follows softened logits
(LowDINO, equation 4), simkd features, similarity the similarities to a queue of images, dino the
teacher's distributions over its prototypes, mvmr distance correlation with its features.
"""

from pathlib import Path

import torch

from lowdino import (
    budget,
    data,
    datasets,
    distillation,
    distributed,
    engine,
    evaluate,
    features,
    optim,
    settings,
)
from lowdino.distillation import Distillation, Teacher
from lowdino.features import compute_features
from lowdino.logger import Logger
from lowdino.settings import Settings


def get_parser() -> settings.Parser:
    return settings.training_parser("distill.py", __doc__)


class TeacherAccuracy:
    """The teacher's k-NN accuracy in words, measured when first asked for."""

    def __init__(self, s: Settings, teacher: Teacher, source: datasets.Source, ranks):
        self.s, self.teacher, self.source, self.ranks = s, teacher, source, ranks
        self.words = None if teacher.backbone else ""

    def __call__(self) -> str:
        if self.words is None:
            splits = self.source.train, self.source.test
            workers, k = self.s.num_workers, self.s.nb_knn
            train, test = (self.teacher.features_of(x, workers, self.ranks) for x in splits)
            accuracy = evaluate.knn_accuracy(train, test, k, self.source.classes)
            self.words = f", of the teacher {accuracy:.4f}"
        return self.words


@torch.no_grad()
def classifier_accuracy(s: Settings, method: Distillation, source, ranks) -> str | None:
    """Accuracy of the teacher's classifier on its own features and, through simkd's projector, on
    the student's; and accuracy of the student's classifier."""
    teacher = method.teacher
    if not teacher.classifier or teacher.backbone is None or source.test is None:
        return None
    test = teacher.features_of(source.test, s.num_workers, ranks)
    accuracy = evaluate.accuracy(teacher.classifier(test.features), test.labels)
    words = f"the teacher's classifier: {accuracy:.4f} on its features"
    network = getattr(method, method.evaluated).eval()
    distributed.broadcast_buffers(network)
    size, workers = s.global_crops_size, s.num_workers
    student = compute_features(network.backbone, source.test, size, ranks, workers=workers)
    if "simkd" in s.objective:
        logits = teacher.classifier(network.heads["simkd"](student.features))
        accuracy = evaluate.accuracy(logits, student.labels)
        words += f", {accuracy:.4f} on the student's through simkd's projector"
    if "kd" in s.objective:
        accuracy = evaluate.accuracy(network.heads["kd"](student.features), student.labels)
        words += f"; the student's: {accuracy:.4f}"
    return words


def run(s: Settings, ranks: distributed.Ranks):
    signals = distributed.StopSignals()  # SIGTERM exits with status 75, Ctrl-C with 130

    # Settings and teacher; a run that was stopped is compared before the teacher works for hours.
    source, s = settings.open_training_images(s, ranks)
    teacher = distillation.open_teacher(s, source, ranks)
    log = Logger(s.output_dir, ranks.first, ranks.device)
    same = {"teacher's weights": teacher.fingerprint, "cached": bool(s.cache_teacher)}
    checkpointer = engine.Checkpointer(s, source, ranks, log, same)
    s = s.replace(amp=budget.amp_of(s.amp, ranks.device, checkpointer.saved))

    # The student's backbone, and its views, which the teacher sees too.
    backbone = features.build_backbone(s)
    note = data.fit_backbone_to_images(s, backbone, source, checkpointer.saved)
    views = data.build_views(s, backbone).to(ranks.device)
    images = f"data: {source.name}, {len(source.pretrain)} images"
    log.say(f"{images}; {views.describe()}{note}", *source.notes)

    # The teacher's features of the whole images, and its classifier, where they are asked for.
    if s.cache_teacher:
        path, teacher.images = Path(s.cache_teacher), source.pretrain
        teacher.features = features.cached_features(
            teacher, teacher.images, path, s.num_workers, ranks
        )
    distillation.add_classifier(teacher, s, source, ranks)

    # Method, optimizer and loop, as in train.py.
    steps, epoch_steps = engine.run_length(s, source, ranks)
    method = Distillation(backbone, s, teacher, total_steps=steps, epoch_steps=epoch_steps)
    method = distributed.on_device(method, ranks)
    optimizer = optim.build(s.optimizer, method, s.lr, ranks.device)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=s.amp == "fp16")
    parts = dict(method=method, optimizer=optimizer, scaler=scaler, log=log, signals=signals)
    training = engine.Training(s, ranks, source, views, **parts)
    engine.train(training, checkpointer, TeacherAccuracy(s, teacher, source, ranks))
    if (words := classifier_accuracy(s, method, source, ranks)) and ranks.first:
        print(words, flush=True)


def main() -> None:
    distributed.launch("distill.py", lambda: settings.resolve(get_parser()), run)


if __name__ == "__main__":
    main()
