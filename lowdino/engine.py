"""The training loop, and what surrounds a step: resume, guard, log, save, evaluate, stop."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lowdino import (
    budget,
    checkpoint,
    data,
    datasets,
    distributed,
    evaluate,
    health,
    logger,
    optim,
    pictures,
    report,
    settings,
)
from lowdino.distributed import UserError, user_errors
from lowdino.features import compute_features, normalisation
from lowdino.methods import Method
from lowdino.parts import (
    build_backbone,
    build_optimizer,
    build_views,
    choose_amp,
    forward,
    make_views,
    set_schedules,
    try_step,
)

# GradScaler starts from 2^16 and halves its scale where gradients overflow in float16.
LEAST_SCALE = 2.0**-10


class Diverged(UserError, FloatingPointError):
    """A loss or gradients that are not finite."""


def train(
    args,
    ranks: distributed.Ranks,
    source: datasets.Source,
    build: Callable[..., Method],
    more_settings: dict | None = None,
    knn_note: Callable[[], str] = str,
) -> Method:
    """Train a method, from its checkpoint in --output_dir if there is one, and return it.

    Args:
        args: resolved by `settings.settle`. build: makes the method of (backbone, args,
            total_steps=, epoch_steps=). more_settings: what a resumed run must share beside the
            flags. knn_note: words to print after a k-NN accuracy.

    Raises:
        UserError: where settings and checkpoint do not fit, or too many images are bad; `Diverged`.
        SystemExit: after a signal; the same call resumes the run.
    """
    run = Run(args, ranks, source, build, more_settings or {}, knn_note)
    method, optimizer, scaler = run.method, run.optimizer, run.scaler
    model = distributed.data_parallel(method)
    parameters = [p for p in method.parameters() if p.requires_grad]

    for batch in run.batches(model):
        run.clock.waited()
        step = run.step

        set_schedules(optimizer, args, step, run.total_steps, run.epoch_steps, run.peak_lr)
        views = make_views(run.multicrop, batch, step, args, ranks)
        run.show(views)

        run.remember_buffers()
        loss = forward(model, views, batch, step, args, ranks)

        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        method.before_step(step)
        norms = optim.clip_gradients_by_parameter(parameters, args.clip_grad)

        if run.all_finite(loss, norms, batch):
            scaler.step(optimizer)
            scaler.update()
            method.after_step(step)
            run.add_loss(loss)
        else:
            run.leave_out(model, views, batch)

        run.step += 1
        run.log_step()
        run.save_if_due()
        run.stop_if_signalled()
        run.evaluate_if_due()
        run.correct_plan_if_due()
    return run.finish()


class Run:
    """A training on one rank: its parts and its state, and what is done around a step.

    The state is `step`, `first_knn`, `skipped` (steps left out in a row), and the sums of the loss
    and its terms since the last log line, with that of the method, the optimizer and the scaler.
    """

    def __init__(self, args, ranks, source, build, more_settings, knn_note):
        self.args, self.ranks, self.source, self.knn_note = args, ranks, source, knn_note
        self.signals = distributed.StopSignals()
        self.output = Path(args.output_dir)
        self.log = logger.Log(self.output, active=ranks.first)

        self.total_batch = args.batch_size_per_gpu * ranks.world
        self.epoch_steps = len(source.pretrain) // self.total_batch
        self.total_steps = args.epochs * self.epoch_steps if args.epochs else None
        # How often k-NN is evaluated; by a budget that is said as late as its plan.
        self.knn_steps = args.knn_freq * self.epoch_steps
        self.budget = None
        if args.minutes:
            every = self.knn_steps if "knn_freq" in args.by_hand else None
            self.budget = budget.Budget(args.minutes, args.started, every)
        reference = args.lr_reference_batch
        self.peak_lr = args.lr * (self.total_batch / reference if reference else 1)

        # Compared before a method is built, which may work for hours.
        self.settings = settings.compared(args, source.pretrain, ranks.world) | more_settings
        with user_errors():
            saved = checkpoint.load_checkpoint(self.output, warn=self.warn)
        if saved:
            self.compare_settings(saved)
        choose_amp(args, ranks, saved)

        backbone = build_backbone(args)
        said = data.fit_backbone_to_images(args, backbone, source, saved)
        self.multicrop = build_views(args, backbone).to(ranks.device)
        images = f"data: {source.name}, {len(source.pretrain)} images"
        self.log.say(f"{images}; {self.multicrop.describe()}{said}", *source.notes)
        steps = dict(total_steps=self.total_steps or math.inf, epoch_steps=self.epoch_steps)
        self.method = distributed.on_device(build(backbone, args, **steps), ranks)
        self.optimizer = build_optimizer(args, self.method, ranks.device)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=args.amp == "fp16")
        self.parts = {
            "method": self.method,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
        }

        self.step, self.first_knn, self.last_knn, self.skipped = 0, None, None, 0
        self.loss_sum, self.loss_steps = torch.zeros((), device=ranks.device), 0
        self.buffers_before: list[Tensor] = []
        self.stopping = self.correcting = False
        if saved:
            self.load(saved)
        self.agree_on_step()
        if ranks.first:
            self.log.rewind(self.step)
        self.health = health.Health(self.method.out_dim, self.method.remedy)
        self.table = logger.Table()
        self.reporter = report.Reporter(self.output, args.global_crops_size, ranks.device)
        with user_errors():
            self.bad_images = logger.BadImages(
                self.output, len(source.pretrain), args.max_bad_fraction, active=ranks.first
            )

    # -- Resume ---------------------------------------------------------------------------------

    def warn(self, text: str) -> None:
        self.log.say(f"{'!' * 80}\nWARNING: {text}\n{'!' * 80}")

    def compare_settings(self, saved: dict) -> None:
        """Refuse a checkpoint of other settings, or with --accept_changes name them in the log.

        Only settings that the checkpoint knows are compared: a flag that is newer than it has its
        default.
        """
        if "settings" not in saved or "method" not in saved:
            raise UserError(
                f"{self.output}/checkpoint.pth is not a checkpoint of this version's training; "
                "give another --output_dir"
            )
        theirs = saved["settings"]
        changed = [
            f"{name} {theirs[name]}, not {value}"
            for name, value in self.settings.items()
            if name in theirs and theirs[name] != value
        ]
        if changed and not self.args.accept_changes:
            raise UserError(
                f"{self.output} holds a run with {'; '.join(changed)}: give the same settings to "
                "go on with it, another --output_dir, or --accept_changes"
            )
        for name in ("arch", "optimizer"):  # whose state fits no other, whatever is accepted
            own = self.settings[name]
            if theirs[name] != own:
                raise UserError(f"{self.cannot_go_on()}its --{name} is {theirs[name]}, not {own}")
        self.accepted = bool(changed)
        if changed:
            self.log.say(f"accepted: {self.output} held a run with {'; '.join(changed)}")

    def cannot_go_on(self) -> str:
        return f"{self.output} holds a run that these settings cannot go on with: "

    def load(self, saved: dict) -> None:
        """Take up the state of a checkpoint."""
        try:
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
        except torch.cuda.OutOfMemoryError:
            raise
        except (KeyError, RuntimeError, ValueError) as error:
            first = " ".join(str(error).split())[:200]
            raise UserError(f"{self.cannot_go_on()}its {name} does not fit ({first})") from error
        self.step, self.first_knn, self.skipped = (
            saved[name] for name in ("step", "first_knn", "skipped")
        )
        if self.args.minutes and saved["settings"].get("minutes") == self.args.minutes:
            self.budget = None
            self.adopt(saved["total_steps"], saved["knn_steps"])
        if self.total_steps and self.step > self.total_steps:  # --epochs is less than it was
            raise UserError(
                f"{self.output} holds a run that has made {self.step} steps, and now "
                f"{self.total_steps} are asked for"
            )
        # With other settings the loss may have other terms.
        if not self.accepted and len(saved["loss_sums"]) == self.ranks.world:
            self.loss_sum = saved["loss_sums"][self.ranks.rank].to(self.ranks.device)
            self.loss_steps = saved["loss_steps"]
        self.log.say(f"going on from {self.output} after step {self.step}")

    def agree_on_step(self) -> None:
        """Ranks that resume from different steps would wait for each other for ever."""
        steps = distributed.gather_objects(self.step)
        if len(set(steps)) > 1:
            raise UserError(
                f"the ranks found checkpoints of different steps in --output_dir {self.output} "
                f"({', '.join(map(str, steps))}): every machine needs to see the same folder"
            )

    def write_settings(self) -> None:
        """The settings as they are now, known or found."""
        if not self.ranks.first:
            return
        known = {"world": self.ranks.world, "total_steps": self.total_steps}
        known["run"] = report.facts(self.method, self.source, self.ranks.device)
        self.log.say(*settings.write(self.output / "args.json", self.args, known))

    # -- Start ----------------------------------------------------------------------------------

    def batches(self, model: nn.Module) -> Iterator[data.Batch]:
        """The batches still to do, on the device, after all that comes before the first step."""
        if self.args.compile:
            # In place, so that names stay; an evaluation calls the backbone alone, uncompiled.
            for name in ("student", "teacher"):
                part = getattr(self.method, name, None)
                if isinstance(part, nn.Module):
                    part.compile(dynamic=False)
        loader = data.on_device(self.open_loader(), self.ranks.device)
        batch = None
        if self.step == self.total_steps:
            done = f"already finished: {self.length()}"
            self.log.say(f"{done}; give another --output_dir to train anew")
        else:
            batch = next(loader)
            self.method.train()
            self.measure(lambda: try_step(self, model, batch))
        self.write_settings()
        # A run that was stopped while it evaluated has this to do yet.
        recorded = distributed.gather_objects(self.log.find("knn", self.step))[0]
        if self.knn_is_due and recorded is None:
            self.evaluate()
            if self.step == 0:
                self.first_knn = self.last_knn
        self.method.train()
        self.clock = logger.Clock()
        self.signals.held = True
        while self.step < self.total_steps:
            yield batch
            if self.step < self.total_steps:
                batch = next(loader)

    def open_loader(self) -> torch.utils.data.DataLoader:
        args, ranks, source = self.args, self.ranks, self.source
        if data.lacks_shared_memory(source.pretrain, args.num_workers, args.batch_size_per_gpu):
            self.log.say(data.PIPES)
        images, where = self.cached_images()
        if source.train is source.pretrain:
            self.source = replace(source, train=images)
        batches = data.TrainingBatches(
            len(source.pretrain),
            args.batch_size_per_gpu,
            args.seed,
            self.step,
            sys.maxsize if args.minutes else self.total_steps,  # which a correction may raise
            ranks.rank,
            ranks.world,
        )
        pin = ranks.device.type == "cuda" and where != "device"
        return data.training_loader(images, batches, args.num_workers, pin_memory=pin)

    def measure(self, step: Callable[[], None]) -> None:
        """Time a few steps, where --amp or --minutes ask for it, and take them back."""
        args, device = self.args, self.ranks.device
        if args.amp == "auto" or self.budget:
            with budget.put_back(self.parts):
                if args.amp == "auto":
                    found = budget.faster_amp(args, step, device)
                    said = "{none:.3g} s in float32, {bf16:.3g} s in bf16".format(**found)
                    self.log.say(f"--amp {args.amp}: a step takes {said}")
                else:
                    found = {args.amp: budget.seconds(step, device)}
        self.settings["amp"] = args.amp
        if self.budget:
            if self.source.test is not None and args.knn_freq:
                backbone = self.method.backbone
                seconds = budget.seconds_of_evaluation(backbone, args, self.source, self.ranks)
                self.budget.evaluated(seconds)
                self.knn_note()  # which has a teacher evaluated, once
            self.report(page=False)  # which tells how long its pictures take
            plan = self.budget.plan(self.step, found[args.amp])
            self.adopt(*distributed.gather_objects(plan)[0])
            if wrong := settings.check_warm_ups(args, self.total_steps / self.epoch_steps):
                raise UserError(wrong)

    def adopt(self, total: int, knn_steps: int) -> None:
        """Take so many steps as the length of the run, and evaluate every `knn_steps`."""
        self.total_steps = self.method.total_steps = total
        self.knn_steps = knn_steps
        settings.fit_epochs(self.args, total / self.epoch_steps)
        self.log.say(f"plan: {total} steps, {self.length()}")

    def length(self) -> str:
        """How long the run is, in words."""
        if self.args.epochs:
            return f"{self.args.epochs} epochs"
        epochs = self.total_steps / self.epoch_steps
        return f"{epochs:.3g} epochs in {self.args.minutes:g} minutes"

    def cached_images(self) -> tuple[torch.utils.data.Dataset, str]:
        """The images to train on, decoded once where --cache says so, and where they are kept."""
        args, device, images = self.args, self.ranks.device, self.source.pretrain
        where, start = args.cache, time.perf_counter()
        if self.step == self.total_steps:
            where = "none"
        elif where == "auto":
            where = data.where_to_cache(images, device)
        found = data.cached(images, where, device, args.num_workers)
        if found is not images:
            seconds = time.perf_counter() - start
            self.log.say(f"images decoded and kept on the {where} in {seconds:.1f} s")
        return found, where

    def show(self, views: list[Tensor]) -> None:
        """The first step's views as a picture."""
        if self.step == 0 and self.ranks.first:
            mean, std = normalisation(self.method.backbone)
            with user_errors(), checkpoint.atomic(self.output / "crops.png") as file:
                pictures.save_views(file, views, mean, std)

    # -- Guard ----------------------------------------------------------------------------------

    def remember_buffers(self) -> None:
        """What a forward pass changes by itself, batch norm's statistics and centres, is to be
        undone where a step may be left out."""
        buffers = list(self.method.buffers()) if self.args.skip_nonfinite else []
        if buffers:
            if not self.buffers_before:
                self.buffers_before = [b.clone() for b in buffers]
            torch._foreach_copy_(self.buffers_before, buffers)

    def all_finite(self, loss: Tensor, norms: Tensor, batch: data.Batch) -> bool:
        """Whether loss and gradients are finite on all ranks; the one exchange of a step.

        It also settles on all ranks whether to stop after this step or to correct a plan, and which
        images are bad.
        Gradients that float16 cannot hold are GradScaler's to deal with.
        """
        finite = (loss if self.scaler.is_enabled() else loss + norms.sum()).isfinite()
        flags = [~finite, self.signals.seen, bool(self.bad_images.unknown(batch.bad))]
        flags.append(bool(self.budget and self.budget.is_due()))
        found = distributed.any_rank(flags, self.ranks.device)
        nonfinite, self.stopping, bad, self.correcting = found
        if bad:
            with user_errors():
                self.bad_images.add(sum(distributed.gather_objects(list(batch.bad)), []))
        if not nonfinite:
            self.skipped = 0
        return not nonfinite

    def leave_out(self, model: nn.Module, views: list[Tensor], batch: data.Batch) -> None:
        """Undo a step whose loss or gradients are not finite, or end the run."""
        found = self.culprits(model, views, batch)
        self.skipped += 1
        said = f"diverging loss at step {self.step + 1}: {found}"
        if self.skipped > self.args.skip_nonfinite:
            raise Diverged(
                f"{said}; a lower --lr or a longer --warmup_epochs may help, --skip_nonfinite "
                f"leaves such steps out; {self.output} keeps what was saved before"
            )
        self.log.say(f"{said}; left out, {self.skipped} in a row")
        if self.buffers_before:
            torch._foreach_copy_(list(self.method.buffers()), self.buffers_before)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.update(self.scaler.get_scale())  # which is not to blame

    def culprits(self, model: nn.Module, views: list[Tensor], batch: data.Batch) -> str:
        """On which ranks a step's loss or gradients are not finite, and for which images.

        The step is computed again, for what its backward pass left is a mean over all ranks.
        """
        model.zero_grad(set_to_none=True)
        no_sync = model.no_sync if isinstance(model, DistributedDataParallel) else nullcontext
        with no_sync():
            loss = forward(model, views, batch, self.step, self.args, self.ranks)
            loss.backward()
        files = getattr(self.source.pretrain, "paths", None)
        names = [files[i] if files else f"number {i}" for i in batch.indices[:8].tolist()]
        more = " and others" if len(batch.indices) > 8 else ""
        where = f"on rank {self.ranks.rank} for images {', '.join(names)}{more}"
        losses = gradients = None
        if not loss.isfinite():
            losses = f"it is {loss.item():.4g} {where}"
        elif not all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None):
            gradients = f"it is {loss.item():.4g}, but its gradients are not finite {where}"
        # A loss over the images of all ranks spreads bad gradients: they count where every loss is
        # finite.
        for found in zip(*distributed.gather_objects((losses, gradients))):
            if any(found):
                return "; ".join(filter(None, found))
        return "it was finite when it was computed again"

    # -- Log, save, evaluate, stop ----------------------------------------------------------------

    def add_loss(self, loss: Tensor) -> None:
        values = torch.stack([loss.detach(), *self.method.terms.values()]).float()
        self.loss_sum, self.loss_steps = self.loss_sum + values, self.loss_steps + 1

    def mean_losses(self) -> dict[str, float]:
        """Loss and its terms as means since the last call, and the metrics of this step."""
        means = distributed.mean_over_ranks(self.loss_sum / self.loss_steps).tolist()
        self.loss_sum, self.loss_steps = torch.zeros_like(self.loss_sum), 0
        means = dict(zip(["loss", *self.method.terms], means))
        if self.method.out_dim:
            means["loss_over_lnk"] = means["cross_entropy"] / math.log(self.method.out_dim)
        return means | {k: v for k, v in self.method.metrics().items() if k not in means}

    @property
    def epoch_ended(self) -> bool:
        return self.step % self.epoch_steps == 0 or self.step == self.total_steps

    def log_step(self) -> None:
        """A log line where one is due: mean loss since the last, metrics of this step, speed."""
        self.clock.stepped(self.total_batch)
        left = self.total_steps - self.step
        self.log.progress(self.step, self.total_steps, self.clock.seconds_left(left))
        if self.step % self.args.log_freq and not self.epoch_ended:
            return
        if self.scaler.is_enabled() and self.scaler.get_scale() < LEAST_SCALE:
            raise Diverged(
                f"diverging gradients at step {self.step}: at no scale does float16 hold them; "
                "--amp bf16 or none, a lower --lr or a longer --warmup_epochs may help; "
                f"{self.output} keeps what was saved before"
            )
        if self.skipped:
            return
        metrics, speed = self.mean_losses(), self.clock.read(left)
        weights = self.optimizer.param_groups[0]
        values = {
            **metrics,
            "lr": weights["lr"],
            "weight_decay": weights["weight_decay"],
            "memory_mb": logger.memory_mb(self.ranks.device),
        }
        epoch = (self.step - 1) // self.epoch_steps
        steps = f"{self.step}/{self.total_steps}"
        self.log.say(*self.table.lines(steps, epoch, values | speed))
        self.log.record(step=self.step, epoch=epoch, **values, **speed)
        for text in self.health.read(self.step, **metrics):
            self.log.say(f"health: {text}")

    def save_if_due(self) -> None:
        every = self.args.save_every_steps
        due = self.epoch_ended or self.knn_is_due or (every and self.step % every == 0)
        if due or self.stopping:
            self.save()

    @user_errors()
    def save(self) -> None:
        """Checkpoint and, at the end of an epoch, the backbone alone."""
        args, backbone = self.args, self.method.backbone
        loss_sums = distributed.gather_strided(self.loss_sum[None], self.ranks.world)
        if not self.ranks.first:
            return
        content = {name: part.state_dict() for name, part in self.parts.items()} | {
            "step": self.step,
            "total_steps": self.total_steps,
            "knn_steps": self.knn_steps,
            "first_knn": self.first_knn,
            "skipped": self.skipped,
            "loss_sums": loss_sums,
            "loss_steps": self.loss_steps,
            "settings": self.settings,
            "normalisation": [list(values) for values in normalisation(backbone)],
            "value_range": getattr(backbone, "value_range", None),
        }
        if self.epoch_ended:
            epoch, size = self.step // self.epoch_steps, args.global_crops_size
            path = self.output / "backbone.pth"
            checkpoint.save_backbone(path, backbone, args.arch, size, epoch)
            whole = self.step % self.epoch_steps == 0
            if whole and args.saveckp_freq and epoch % args.saveckp_freq == 0:
                checkpoint.save_atomic(self.output / f"checkpoint{epoch:04}.pth", content)
        self.log.sync()
        # Last: a run that is killed before it does these steps again.
        checkpoint.save_checkpoint(self.output, content)

    def stop_if_signalled(self) -> None:
        if self.stopping:
            self.log.say(
                f"stopped by a signal after step {self.step}, which is saved: the same command "
                "goes on from there"
            )
            sys.exit(self.signals.status)

    @property
    def knn_is_due(self) -> bool:
        """Every --knn_freq epochs, or as often as --minutes leave time for, and at the end."""
        if self.source.test is None or not self.args.knn_freq:
            return False
        regular = self.knn_steps and self.step % self.knn_steps == 0
        return self.step == self.total_steps or bool(regular)

    def evaluate_if_due(self) -> None:
        if self.knn_is_due:
            with self.signals.at_once():
                self.evaluate()
            self.clock.restart()
        elif self.epoch_ended and (self.reporter.due or self.step == self.total_steps):
            self.report()
            self.clock.restart()

    def evaluate(self) -> None:
        """The k-NN accuracy of the backbone, and a report."""
        args, source, ranks, start = self.args, self.source, self.ranks, time.perf_counter()
        epoch, backbone = self.step // self.epoch_steps, self.method.backbone
        distributed.broadcast_buffers(backbone)
        train, test = (
            compute_features(
                backbone, images, args.global_crops_size, ranks, workers=args.num_workers
            )
            for images in (source.train, source.test)
        )
        self.last_knn = evaluate.knn_accuracy(train, test, args.nb_knn, source.classes)
        if self.budget:
            self.budget.evaluated(time.perf_counter() - start)
        network = self.method.evaluated.replace("_", " ")
        said = f"k-NN (k={args.nb_knn}) of the {network} {self.last_knn:.4f}"
        self.log.say(f"epoch {epoch}: {said}{self.knn_note()}")
        self.log.record(step=self.step, epoch=epoch, knn=self.last_knn)
        self.report((train, test))

    def report(self, features=None, page: bool = True) -> None:
        """Pictures, of features where an evaluation has them, and the page that shows them."""
        if not self.ranks.first:
            return
        due = self.reporter.due or self.step == self.total_steps
        whole, parts = due and self.args.knn_freq > 0, (self.method.backbone, self.source)
        with self.budget.reporting() if self.budget else nullcontext():
            self.reporter.write(*parts, features, pictures=whole, page=page)

    def correct_plan_if_due(self) -> None:
        """Keep to --minutes, where the machine has become slower or faster than it was."""
        if not self.correcting or self.step == self.total_steps:
            return
        better = self.budget.correction(self.step, self.total_steps)
        better = distributed.gather_objects(better)[0]
        if better is not None:
            self.adopt(*better)

    def finish(self) -> Method:
        """What is said at the end."""
        self.signals.held = False
        args = self.args
        if self.last_knn is not None:
            before = "" if self.first_knn is None else f", {self.first_knn:.4f} before the first"
            said = f"k-NN (k={args.nb_knn}) accuracy: {self.last_knn:.4f} after {self.length()}"
            self.log.say(f"{said}{before}{self.knn_note()}")
        if self.clock.steps:
            self.log.say(f"health: {self.health.verdict()}")
            if known := self.bad_images.known:
                self.log.say(f"{len(known)} images could not be read; see {self.bad_images.path}")
        self.log.say(f"backbone: {self.output / 'backbone.pth'}")
        return self.method
