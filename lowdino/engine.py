"""The training loop, and the classes around it: checkpoint, evaluation, guard.

Why a resumed run is exact: it computes what the uninterrupted run computes, bit for bit on a CPU,
because no generator of random numbers outlives a step. Order, views and dropped blocks are drawn
anew from (stream, seed, step or epoch, rank); `schedules.Stream` is the one table of streams.
Schedules are functions of the step too. Everything else is in the checkpoint: the states of method,
optimizer and gradient scaler, and the few numbers of `Progress`. Log records later than the
checkpoint are cut off. What would change the numbers is compared at the start: settings, the
weights of --init and of a teacher, names or pixels of the images, the number of ranks.
"""

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lowdino import augment, budget, checkpoint, data, distributed, optim, report, settings
from lowdino.budget import Budget, adopt, describe_length
from lowdino.datasets import Source
from lowdino.distributed import Diverged, UserError, user_errors
from lowdino.evaluate import knn_accuracy
from lowdino.features import compute_splits, normalisation, patch_accuracy, whiten, whiten_file
from lowdino.health import Health
from lowdino.logger import BadImages, Logger
from lowdino.methods import Method
from lowdino.pictures import save_views
from lowdino.schedules import Stream, cosine

LEAST_SCALE = 2.0**-10  # GradScaler starts from 2^16 and halves where float16 overflows


@dataclass
class Training:
    """The parts of a training, as train.py puts them together; `states` are saved."""

    settings: settings.Settings
    ranks: distributed.Ranks
    source: Source
    views: augment.MultiCrop
    method: Method
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    log: Logger
    signals: distributed.StopSignals

    def states(self) -> dict:
        return {"method": self.method, "optimizer": self.optimizer, "scaler": self.scaler}


@dataclass
class Progress:
    """How far a run is, and how long; a checkpoint holds it."""

    epoch_steps: int
    total_steps: int | None  # None until --minutes are planned
    knn_steps: int  # steps between evaluations; 0: only at the end
    step: int = 0
    skipped: int = 0  # steps in a row that were undone
    first_knn: float | None = None

    @property
    def epoch(self) -> int:
        return self.step // self.epoch_steps

    @property
    def finished(self) -> bool:
        return self.step == self.total_steps

    @property
    def epoch_ended(self) -> bool:
        return self.step % self.epoch_steps == 0 or self.finished


def run_length(s: settings.Settings, source: Source, ranks) -> tuple[float, int]:
    """Steps of the run, infinity where --minutes are not planned yet, and steps per epoch."""
    epoch_steps = len(source.pretrain) // (s.batch_size_per_gpu * ranks.world)
    return (s.epochs * epoch_steps if s.epochs else math.inf), epoch_steps


# -- A step ----------------------------------------------------------------------------------------


def peak_lr(s: settings.Settings, world: int) -> float:
    """--lr, scaled linearly from --lr_reference_batch to the total batch."""
    batch, reference = s.batch_size_per_gpu * world, s.lr_reference_batch
    return s.lr * batch / reference if reference else s.lr


def set_schedules(t: Training, progress: Progress) -> None:
    """Learning rate and weight decay of every group, as functions of the step."""
    s, step, total = t.settings, progress.step, progress.total_steps
    warmup = round(s.warmup_epochs * progress.epoch_steps)
    lr = cosine(step, total, peak_lr(s, t.ranks.world), s.min_lr, warmup)
    weight_decay = cosine(step, total, s.weight_decay, s.weight_decay_end)
    for group in t.optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


def make_views(t: Training, batch: data.Batch, step: int) -> list[Tensor]:
    """The views of a batch, (B, C, S, S) each, drawn from the step alone."""
    stream, device = Stream.VIEWS, t.ranks.device
    generator = augment.seeded_generator(device, stream, t.settings.seed, step, t.ranks.rank)
    views = t.views(batch.images, batch.sizes, generator)
    return [view.contiguous(memory_format=torch.channels_last) for view in views]


def forward(t: Training, model: nn.Module, views: list[Tensor], batch: data.Batch, step: int):
    """The loss under autocast, stochastic depth drawn from the step alone."""
    device, amp = t.ranks.device.type, t.settings.amp
    # torch.manual_seed seeds all devices, in half a millisecond; a CPU needs its generator only.
    seed = torch.default_generator.manual_seed if device == "cpu" else torch.manual_seed
    seed(augment.derived_seed(Stream.DROP_PATH, t.settings.seed, step, t.ranks.rank))
    with torch.autocast(device, budget.AUTOCAST[amp], enabled=amp != "none"):
        return model(views, batch, step)


# -- The loop --------------------------------------------------------------------------------------


def train(t: Training, checkpointer: "Checkpointer", knn_note: Callable[[], str] = str) -> Method:
    """Train from the checkpoint, where there is one, to the end; return the method.

    `knn_note` makes words to print behind a k-NN accuracy. A UserError where settings and
    checkpoint do not fit or too many images are bad, `Diverged`, or SystemExit after a signal: then
    the same command resumes the run.
    """
    signals, method, log = t.signals, t.method, t.log
    progress, model = checkpointer.load(t), distributed.data_parallel(method)
    evaluator, guard = Evaluator(t, progress, knn_note), StepGuard(t)
    batches, minutes = start(t, progress, model, checkpointer, evaluator)
    parameters = [p for p in method.parameters() if p.requires_grad]
    signals.held = True  # from here on a signal waits for the end of its step
    while not progress.finished:
        batch = next(batches)
        log.clock.waited()

        # Schedules and views are functions of the step, so a resumed run continues them.
        set_schedules(t, progress)
        views = make_views(t, batch, progress.step)
        evaluator.show_views(views)

        # A forward pass changes buffers, such as batch norm's: keep them, to undo the step.
        guard.snapshot()
        loss = forward(t, model, views, batch, progress.step)

        # A method may drop gradients; each parameter's is clipped by itself, as in DINO.
        t.optimizer.zero_grad(set_to_none=True)
        t.scaler.scale(loss).backward()
        t.scaler.unscale_(t.optimizer)
        method.before_step(progress.step)
        norms = optim.clip_gradients_by_parameter(parameters, t.settings.clip_grad)

        # One all-reduce of four flags, so that all ranks decide alike: is the loss not finite, an
        # image bad, a signal there, a new plan of --minutes due?
        events = [*guard.events(loss, norms, batch), signals.seen, minutes.is_due()]
        not_finite, bad, stopping, replanning = distributed.any_rank(events, t.ranks.device)
        if bad:
            guard.add_bad_images(batch)
        if not_finite:
            guard.undo(model, views, batch, progress)
        else:
            guard.take_step(loss, progress)  # the optimizer, then the momentum teacher
        progress.step += 1

        # Log; save before an evaluation, which may take long; stop; evaluate; keep to --minutes.
        log.step(progress, t)
        if stopping or checkpointer.is_due(progress) or evaluator.is_due():
            checkpointer.save(t, progress)
        if stopping:
            log.say(f"stopped by a signal after step {progress.step}, which is saved: run again")
            sys.exit(signals.status)
        evaluator.after_step(signals)
        if replanning and not progress.finished:
            minutes.replan(t, progress)
    signals.held = False
    evaluator.finish(guard.bad_images)
    return method


def start(t: Training, progress: Progress, model: nn.Module, checkpointer, evaluator):
    """All that comes before the first step: batches, autocast type, plan, settings, first k-NN.

    Returns an iterator of batches on the device, and the `budget.Budget`.
    """
    s, log = t.settings, t.log
    log.health = Health(t.method.out_dim, t.method.remedy)
    if s.compile:
        # In place, so that names stay; an evaluation calls the backbone alone, uncompiled.
        for name in ("student", "teacher"):
            if isinstance(part := getattr(t.method, name, None), nn.Module):
                part.compile(dynamic=False)
    batches = iter(())
    # A plan of the checkpoint is kept.
    minutes = Budget(s.minutes if progress.total_steps is None else None, s.started)
    if progress.finished:
        trained = describe_length(s, progress)
        log.say(f"already finished: {trained}; give another --output_dir to train")
    else:
        batches = open_batches(t, progress)
        batch = next(batches)
        batches = itertools.chain([batch], batches)
        t.method.train()
        if s.amp == "auto" or minutes.planning:
            pace = budget.time_steps(t, lambda: try_step(t, progress, model, batch))
        if minutes.planning:
            evaluator.measure(minutes)
            plan = minutes.plan(progress.step, pace)
            adopt(t, progress, *distributed.gather_objects(plan)[0])
    checkpointer.compared["amp"] = t.settings.amp
    if t.ranks.first:
        facts = {"world": t.ranks.world, "total_steps": progress.total_steps}
        facts["run"] = report.facts(t.method, t.source, t.ranks.device)
        log.say(*settings.write(Path(s.output_dir) / "args.json", t.settings, facts))
        others = f", {optim.MUON_OTHERS:g} of biases and norms" * (s.optimizer == "muon")
        log.say(f"{s.optimizer}, peak learning rate {peak_lr(s, t.ranks.world):.4g}{others}")
    evaluator.before_first_step()
    t.method.train()
    log.clock.restart()
    return batches, minutes


def open_batches(t: Training, progress: Progress) -> Iterator[data.Batch]:
    """The batches from this step on, decoded once where --cache says so, on the device."""
    s, images, device, begun = t.settings, t.source.pretrain, t.ranks.device, time.perf_counter()
    if data.lacks_shared_memory():
        t.log.say(data.NO_WORKERS)
    where = data.where_to_cache(images, device) if s.cache == "auto" else s.cache
    kept = data.cached(images, where, device, s.num_workers)
    if kept is not images:
        t.log.say(f"images decoded and kept on the {where} in {time.perf_counter() - begun:.1f} s")
    if t.source.train is images:
        t.source = replace(t.source, train=kept)
    # The length of a run of --minutes may still change.
    stop = sys.maxsize if s.minutes else progress.total_steps
    order = data.TrainingBatches(
        len(images), s.batch_size_per_gpu, s.seed, progress.step, stop, t.ranks.rank, t.ranks.world
    )
    pin = device.type == "cuda" and where != "device"
    loader = data.open_loader(kept, s.num_workers, batch_sampler=order, pin_memory=pin)
    return data.on_device(loader, device)


def try_step(t: Training, progress: Progress, model: nn.Module, batch: data.Batch) -> None:
    """A step for the time that it takes, without guard and log."""
    views = make_views(t, batch, progress.step)
    loss = forward(t, model, views, batch, progress.step)
    t.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for p in t.method.parameters() if p.requires_grad]
    optim.clip_gradients_by_parameter(parameters, t.settings.clip_grad)
    t.optimizer.step()
    t.method.after_step(progress.step)


# -- Around a step ---------------------------------------------------------------------------------


class Checkpointer:
    """Compares, loads and saves the checkpoint of a run.

    `more` is what a resumed run must share beside its settings, by name. A UserError where the
    checkpoint is damaged, or of other settings without --accept_changes.
    """

    def __init__(self, s: settings.Settings, source, ranks, log: Logger, more: dict | None = None):
        self.folder, self.log, self.ranks = Path(s.output_dir), log, ranks
        self.compared = settings.compared(s, source.pretrain.fingerprint(), ranks.world)
        self.compared |= more or {}
        self.every, self.keep_every, self.accepted = s.save_every_steps, s.saveckp_freq, False
        with user_errors():
            self.saved = checkpoint.load_checkpoint(self.folder, warn=log.warn)
        if self.saved:
            self.compare(s)

    def refuse(self, reason: str) -> UserError:
        return UserError(f"cannot resume from {self.folder}: {reason}")

    def compare(self, s: settings.Settings) -> None:
        """Refuse a checkpoint of other settings, or with --accept_changes log the differences.

        A setting that is newer than the checkpoint is not compared. Of those that differ, the ones
        that were typed now or then are named, because others follow from them.
        """
        if "settings" not in self.saved or "method" not in self.saved:
            raise self.refuse("its checkpoint.pth is of another version: give another --output_dir")
        before = self.saved["settings"]
        changed = {
            name: f"{name} {before[name]}, not {value}"
            for name, value in self.compared.items()
            if name in before and before[name] != value
        }
        for name in changed.keys() & {"arch", "method", "optimizer"}:  # whatever is accepted
            raise self.refuse(f"its run has {changed[name]}: give another --output_dir")
        derived = s.values.keys() - s.typed - {*self.saved.get("typed", ())}
        told = "; ".join(text for name, text in changed.items() if name not in derived)
        if changed and not s.accept_changes:
            ways = "the same settings, another --output_dir, or --accept_changes"
            raise self.refuse(f"its run has {told or '; '.join(changed.values())}; give {ways}")
        self.accepted = bool(changed)
        if changed:
            self.log.say(f"accepted: the run in {self.folder} had {'; '.join(changed.values())}")

    def load(self, t: Training) -> Progress:
        """The progress of the checkpoint, whose states `t` takes over; or that of a new run."""
        s, saved = t.settings, self.saved
        total, epoch_steps = run_length(s, t.source, self.ranks)
        planned = None if total == math.inf else total
        progress = Progress(epoch_steps, planned, s.knn_freq * epoch_steps)
        if saved:
            try:
                for name, part in t.states().items():
                    part.load_state_dict(saved[name])
            except torch.cuda.OutOfMemoryError:
                raise
            except (KeyError, RuntimeError, ValueError) as error:
                first = " ".join(str(error).split())[:200]
                raise self.refuse(f"its {name} does not fit ({first})") from error
            for name in ("step", "first_knn", "skipped"):
                setattr(progress, name, saved[name])
            if s.minutes and saved["settings"].get("minutes") == s.minutes:
                adopt(t, progress, saved["total_steps"], saved["knn_steps"])
            if (total := progress.total_steps) and progress.step > total:
                raise self.refuse(f"it has made {progress.step} steps, and {total} are asked for")
            # With other settings the loss may have other terms.
            if not self.accepted and len(saved["loss_sums"]) == self.ranks.world:
                t.log.restore(saved["loss_sums"][self.ranks.rank], saved["loss_steps"])
            t.log.say(f"resuming from {self.folder} after step {progress.step}")
        # Ranks that resume from different steps would wait for each other: a deadlock.
        steps = distributed.gather_objects(progress.step)
        if len(set(steps)) > 1:
            raise UserError(
                f"ranks see checkpoints of steps {', '.join(map(str, steps))} in --output_dir "
                f"{self.folder}: every machine needs to see the same folder"
            )
        if self.ranks.first:
            t.log.rewind(progress.step)
        return progress

    def is_due(self, progress: Progress) -> bool:
        return progress.epoch_ended or bool(self.every and progress.step % self.every == 0)

    @user_errors()
    def save(self, t: Training, progress: Progress) -> None:
        """Write the checkpoint and, at the end of an epoch, the backbone alone."""
        s, backbone, epoch = t.settings, t.method.backbone, progress.epoch
        loss_sums = distributed.gather_strided(t.log.loss_sum[None], self.ranks.world)
        if not self.ranks.first:
            return
        content = {name: part.state_dict() for name, part in t.states().items()} | vars(progress)
        content |= {
            "loss_sums": loss_sums,
            "loss_steps": t.log.loss_steps,
            "settings": self.compared,
            "typed": sorted(s.typed),
            "normalisation": [list(values) for values in normalisation(backbone)],
            "value_range": getattr(backbone, "value_range", None),
        }
        if progress.epoch_ended:
            path = self.folder / "backbone.pth"
            checkpoint.save_backbone(path, backbone, s.arch, s.global_crops_size, epoch)
            complete = progress.step % progress.epoch_steps == 0
            if complete and self.keep_every and epoch % self.keep_every == 0:
                checkpoint.save_atomic(self.folder / f"checkpoint{epoch:04}.pth", content)
        t.log.sync()
        # Written last: a run that is killed earlier resumes from the checkpoint before.
        checkpoint.save_checkpoint(self.folder, content)


class Evaluator:
    """k-NN accuracy and report: before the first step, when due, and at the end."""

    def __init__(self, t: Training, progress: Progress, knn_note: Callable[[], str]):
        self.t, self.progress, self.knn_note = t, progress, knn_note
        s = t.settings
        self.labelled = t.source.test is not None and s.knn_freq > 0
        self.minutes = Budget(None, 0.0)  # the plan, which must know how long evaluations take
        self.last_knn: float | None = None
        self.whitening: nn.Linear | None = None  # of the last evaluation
        self.reporter = report.Reporter(Path(s.output_dir), s.global_crops_size, t.ranks.device)

    @cached_property
    def floor(self) -> dict[str, float]:
        """The accuracy of the method's patch dictionary, see `patch_accuracy`."""
        return patch_accuracy(self.t.method, self.t.source, self.t.settings, self.t.ranks)

    def is_due(self) -> bool:
        """Every --knn_freq epochs, or as often as --minutes leave time for, and at the end."""
        progress = self.progress
        regular = progress.knn_steps and progress.step % progress.knn_steps == 0
        return self.labelled and (progress.finished or bool(regular))

    def measure(self, minutes: Budget) -> None:
        """Measure how long evaluation and report take, and tell the plan, now and later."""
        t, self.minutes = self.t, minutes
        if "knn_freq" in t.settings.typed:
            minutes.every = self.progress.knn_steps
        if self.labelled:
            network, _ = t.method.backbone, self.floor  # which takes its time before the plan
            minutes.evaluated(budget.seconds_of_evaluation(network, t.settings, t.source, t.ranks))
            self.knn_note()  # evaluates a teacher, once
        self.report(page=False)

    def before_first_step(self) -> None:
        """The k-NN of the start, or the one that an interrupted run did not record."""
        progress = self.progress
        self.last_knn = distributed.gather_objects(self.t.log.find("knn", progress.step))[0]
        if self.is_due() and self.last_knn is None:
            self.evaluate()
            if progress.step == 0:
                progress.first_knn = self.last_knn

    def after_step(self, signals: distributed.StopSignals) -> None:
        progress = self.progress
        if self.is_due():
            with signals.at_once():
                self.evaluate()
            self.t.log.clock.restart()
        elif progress.epoch_ended and (self.reporter.due or progress.finished):
            self.report()
            self.t.log.clock.restart()

    def evaluate(self) -> None:
        """The k-NN accuracy of the backbone, and a report."""
        t, progress, s, backbone = self.t, self.progress, self.t.settings, self.t.method.backbone
        floor, begun = self.floor, time.perf_counter()
        distributed.broadcast_buffers(backbone)
        pair = compute_splits(backbone, t.source, s.global_crops_size, t.ranks, s.num_workers)
        self.last_knn = plain = knn_accuracy(*pair, s.nb_knn, t.source.classes)
        words = "".join(f", of the patch dictionary {x:.4f}" for x in floor.values())
        if t.method.whitens:
            self.whitening, pair = whiten(*pair)
            self.last_knn = knn_accuracy(*pair, s.nb_knn, t.source.classes)
            words = f" ({plain:.4f} not whitened){words}"
        self.minutes.evaluated(time.perf_counter() - begun)
        accuracy = f"k-NN (k={s.nb_knn}) of the {t.method.evaluated.replace('_', ' ')}"
        t.log.say(f"epoch {progress.epoch}: {accuracy} {self.last_knn:.4f}{words}{self.knn_note()}")
        values = dict(knn=self.last_knn, plain_knn=plain) | floor
        t.log.record(step=progress.step, epoch=progress.epoch, **values)
        self.report(pair)

    def report(self, features=None, page: bool = True) -> None:
        """Pictures, of features where an evaluation has them, and the page that shows them."""
        t = self.t
        if not t.ranks.first:
            return
        pictures = (self.reporter.due or self.progress.finished) and t.settings.knn_freq > 0
        with self.minutes.reporting():
            self.reporter.write(t.method.backbone, t.source, features, pictures, page)

    def show_views(self, views: list[Tensor]) -> None:
        """The first step's views as a picture."""
        if self.progress.step == 0 and self.t.ranks.first:
            path = Path(self.t.settings.output_dir) / "crops.png"
            with user_errors(), checkpoint.atomic(path) as file:
                save_views(file, views, *normalisation(self.t.method.backbone))

    def finish(self, bad_images: BadImages) -> None:
        """The last lines of the log."""
        t, progress, folder = self.t, self.progress, Path(self.t.settings.output_dir)
        if t.method.whitens:
            whiten_file(folder, self.whitening, t.source.pretrain, t.settings, t.ranks)
        if self.last_knn is not None:
            first = progress.first_knn
            before = "" if first is None else f", {first:.4f} before the first"
            accuracy = f"k-NN (k={t.settings.nb_knn}) accuracy: {self.last_knn:.4f}"
            note = self.knn_note() if t.log.clock.steps else ""
            t.log.say(f"{accuracy} after {describe_length(t.settings, progress)}{before}{note}")
        if t.log.clock.steps:
            t.log.say(f"health: {t.log.health.verdict()}")
            if known := bad_images.known:
                t.log.say(f"{len(known)} images could not be read; see {bad_images.path}")
        t.log.say(f"backbone: {folder / 'backbone.pth'}")


class StepGuard:
    """Takes a step, or undoes one that is not finite and names its images; counts bad images."""

    def __init__(self, t: Training):
        s, self.t = t.settings, t
        self.buffers: list[Tensor] = []  # as they were before the step
        images = len(t.source.pretrain)
        with user_errors():
            self.bad_images = BadImages(s.output_dir, images, s.max_bad_fraction, t.ranks.first)

    def snapshot(self) -> None:
        """Keep the buffers, where a skipped step is to be undone."""
        buffers = list(self.t.method.buffers()) if self.t.settings.skip_nonfinite else []
        if buffers:
            if not self.buffers:
                self.buffers = [b.clone() for b in buffers]
            torch._foreach_copy_(self.buffers, buffers)

    def restore(self) -> None:
        if self.buffers:
            torch._foreach_copy_(list(self.t.method.buffers()), self.buffers)

    def events(self, loss: Tensor, norms: Tensor, batch: data.Batch) -> list[Tensor | bool]:
        """Whether loss or gradients are not finite, and whether bad images are new on this rank.

        Gradients that float16 cannot hold are GradScaler's to skip.
        """
        total = loss if self.t.scaler.is_enabled() else loss + norms.sum()
        return [~total.isfinite(), bool(self.bad_images.unknown(batch.bad))]

    def take_step(self, loss: Tensor, progress: Progress) -> None:
        """The optimizer's step, and the method's after it."""
        t, step = self.t, progress.step
        t.scaler.step(t.optimizer)
        t.scaler.update()
        if t.scaler.is_enabled() and (step + 1) % t.settings.log_freq == 0:
            if t.scaler.get_scale() < LEAST_SCALE:  # asked for at log steps, as the host waits
                raise Diverged(
                    f"diverging gradients at step {step + 1}: at no scale does float16 hold them; "
                    "--amp bf16 or none, a lower --lr or a longer --warmup_epochs may help; "
                    f"{t.settings.output_dir} keeps what was saved before"
                )
        t.method.after_step(step)
        progress.skipped = 0
        t.log.add(loss, t.method.terms)

    def add_bad_images(self, batch: data.Batch) -> None:
        """Note the bad images of all ranks; a UserError where they are too many."""
        with user_errors():
            self.bad_images.add(sum(distributed.gather_objects(list(batch.bad)), []))

    def undo(self, model: nn.Module, views: list[Tensor], batch, progress: Progress) -> None:
        """Undo a step whose loss or gradients are not finite, or end the run."""
        t = self.t
        self.restore()
        culprits = self.culprits(model, views, batch, progress.step)
        self.restore()
        progress.skipped += 1
        diverging = f"diverging loss at step {progress.step + 1}: {culprits}"
        if progress.skipped > t.settings.skip_nonfinite:
            raise Diverged(
                f"{diverging}; a lower --lr or a longer --warmup_epochs may help, --skip_nonfinite "
                f"undoes such steps; {t.settings.output_dir} keeps what was saved before"
            )
        t.log.say(f"{diverging}; undone, {progress.skipped} in a row")
        t.optimizer.zero_grad(set_to_none=True)
        t.scaler.update(t.scaler.get_scale())  # keep the scale

    def culprits(self, model: nn.Module, views: list[Tensor], batch: data.Batch, step: int) -> str:
        """The ranks and images whose loss or gradients are not finite, in words.

        The step is computed again, because its backward pass left a mean over all ranks.
        """
        t = self.t
        model.zero_grad(set_to_none=True)
        no_sync = model.no_sync if isinstance(model, DistributedDataParallel) else nullcontext
        with no_sync():
            loss = forward(t, model, views, batch, step)
            loss.backward()
        files = getattr(t.source.pretrain, "paths", None)
        names = [files[i] if files else f"number {i}" for i in batch.indices[:8].tolist()]
        more = " and others" if len(batch.indices) > 8 else ""
        where = f"on rank {t.ranks.rank} for images {', '.join(names)}{more}"
        losses = gradients = None
        if not loss.isfinite():
            losses = f"it is {loss.item():.4g} {where}"
        elif not all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None):
            gradients = f"it is {loss.item():.4g}, but its gradients are not finite {where}"
        # A loss over the images of all ranks spreads bad gradients: they count where every loss is
        # finite.
        for sentences in zip(*distributed.gather_objects((losses, gradients))):
            if any(sentences):
                return "; ".join(filter(None, sentences))
        return "it was finite when it was computed again"
