#!/usr/bin/env python3
"""Pre-train a small backbone without labels, by self-distillation with a momentum teacher (DINO,
LowDINO, SSLight), by the coding rate of many views (EMP-SSL), by MV-MR, or by a baseline.

    python train.py --arch mobilevit_xxs --minutes 1.2                      demo images: k-NN 0.99
    torchrun --nproc_per_node=8 train.py --arch mobilevit_s --data_path /path/to/pictures

Methods: emp pulls many views to their image's mean and raises the coding rate of the batch, and
begins with a dictionary of the images' patches. dino matches a teacher's distributions over
prototypes. mvmr raises the distance correlation with the plain image's embedding and with fixed
descriptors. Baselines: byol predicts a teacher's projections; moco finds the key of its image in a
queue; swav predicts the cluster of another view; simclr finds the other view in the batch; vicreg
and barlow pull two views together and decorrelate. dino, byol, moco and swav also take local views
(--local_crops_number); --alpha is the weight of the global ones.
"""

import torch

from lowdino import budget, data, distributed, engine, features, optim, settings
from lowdino.logger import Logger
from lowdino.recipes import METHODS
from lowdino.settings import Settings


def get_parser() -> settings.Parser:
    return settings.training_parser("train.py", __doc__)


def run(s: Settings, ranks: distributed.Ranks):
    signals = distributed.StopSignals()  # SIGTERM exits with status 75, Ctrl-C with 130

    # Settings: what the images and the machine decide is fitted here, each value with its reason.
    source, s = settings.open_training_images(s, ranks)

    # Resume: refuse a changed setting now, before the slow parts.
    log = Logger(s.output_dir, ranks.first, ranks.device)
    checkpointer = engine.Checkpointer(s, source, ranks, log)
    s = s.replace(amp=budget.amp_of(s.amp, ranks.device, checkpointer.saved))

    # Backbone: random weights or --init, with mean, std and value range of the file or the images.
    backbone = features.build_backbone(s)
    note = data.fit_backbone_to_images(s, backbone, source, checkpointer.saved)
    views = data.build_views(s, backbone).to(ranks.device)
    images = f"data: {source.name}, {len(source.pretrain)} images"
    log.say(f"{images}; {views.describe()}{note}", *source.notes)

    # Method: it owns networks, heads, queues and centres; a checkpoint keeps its state_dict().
    steps, epoch_steps = engine.run_length(s, source, ranks)
    method = METHODS[s.method](backbone, s, total_steps=steps, epoch_steps=epoch_steps)
    method = distributed.on_device(method, ranks)
    if not checkpointer.saved:  # which has the patch dictionary
        workers = s.num_workers
        log.say(*features.fit_dictionaries(method, source.pretrain, ranks, workers, s.seed))

    # Optimizer: biases and norms do not decay; the learning rate is set at every step.
    optimizer = optim.build(s.optimizer, method, s.lr, ranks.device)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=s.amp == "fp16")

    parts = dict(method=method, optimizer=optimizer, scaler=scaler, log=log, signals=signals)
    training = engine.Training(s, ranks, source, views, **parts)
    return engine.train(training, checkpointer)


def main() -> None:
    distributed.launch("train.py", lambda: settings.resolve(get_parser()), run)


if __name__ == "__main__":
    main()
