"""The one training loop, on accelerate: a CPU, a GPU, or several processes (DDP, FSDP2) started by its launcher.

Parameters and AdamW are float32; products run in bf16 under autocast. Everything that decides the next step
(parameters, optimizer, place in the data, random states, running means) is in a checkpoint, so a run that is killed and
started again takes the same steps.
"""

from __future__ import annotations

import copy
import math
import time
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, broadcast, gather_object, set_seed
from torch import Tensor

from zoo.errors import ConfigError, TrainingError
from zoo.train.checkpoint import Checkpoint
from zoo.train.data import Batch
from zoo.train.guards import Interrupted, LossWatch
from zoo.train.progress import Bar
from zoo.train.recipe import Stage
from zoo.train.run import Run, RunState, random_states, restore_random_states
from zoo.train.stages import (
    Guide,
    Objective,
    check_stage,
    choose_parameters,
    converted_layers,
    first_non_finite,
    make_optimizer,
)
from zoo.train.teacher_cache import TeacherCache


def make_accelerator() -> Accelerator:
    """The processes and devices there are; precision is the stage's own affair."""
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision="no", kwargs_handlers=[unused])


def run_stages(run: Run) -> None:
    """Run every stage that is not done yet, from the newest checkpoint if there is one. The student is changed."""
    accelerator = make_accelerator()
    checkpoint = run.checkpoints.newest() if run.checkpoints is not None else None
    if checkpoint is not None:
        known = set(RunState.__dataclass_fields__)
        run.state = RunState(**{k: v for k, v in checkpoint.state.items() if k in known})
        run.touched = list(checkpoint.state["touched"])
        _load_parameters(run.student, checkpoint.tensors("model"))
    run.log.rewind(run.state.step)
    while run.state.stage < len(run.stages):
        StageLoop(run, accelerator, checkpoint).run()
        checkpoint = None
    run.student.requires_grad_(True).eval()


@torch.no_grad()
def _load_parameters(student: Any, tensors: dict[str, Tensor]) -> None:
    ours = {**dict(student.named_parameters()), **saved_buffers(student)}
    for name, t in tensors.items():
        _copy(ours[name], t)


def saved_buffers(student: Any) -> dict[str, Tensor]:
    """The buffers that are saved with a model's weights: training may change them (biases that balance experts)."""
    kept = student.state_dict().keys()
    return {name: t for name, t in student.named_buffers() if name in kept}


def _whole(t: Tensor) -> Tensor:
    """A tensor as one piece on the CPU (under FSDP every process must ask for it)."""
    t = t.detach()
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).cpu()


@torch.no_grad()
def _copy(target: Tensor, source: Tensor) -> None:
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)  # type: ignore[attr-defined]
    target.copy_(source)


def _set_training(student: Any, stage: Stage) -> None:
    """Training mode; without dropout where a teacher is followed, for what is dropped cannot be known from it."""
    student.train()
    if stage.needs_teacher:
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()


def set_gradient_checkpointing(student: Any, on: bool) -> None:
    """Compute activations again in the backward pass instead of keeping them. The method's name has changed lately."""
    verb = "enable" if on else "disable"
    method = getattr(student, f"activation_checkpointing_{verb}", None) or getattr(
        student, f"gradient_checkpointing_{verb}"
    )
    if on:
        method({"use_reentrant": False})
    elif any(getattr(module, "gradient_checkpointing", False) for module in student.modules()):
        method()


class StageLoop:
    """One stage of a run: prepared, resumed, stepped until its budget is used, recorded."""

    def __init__(self, run: Run, accelerator: Accelerator, checkpoint: Checkpoint | None) -> None:
        self.run_, self.accelerator, self.state = run, accelerator, run.state
        self.index = run.state.stage
        self.stage = stage = run.stages[self.index]
        self.device = accelerator.device
        self.seed = stage.seed if stage.seed is not None else run.seed * 1009 + self.index
        set_seed(self.seed)
        self._prepare_models()
        self._prepare_data()
        self.watch = LossWatch()
        self.ema: dict[str, Tensor] = {}
        self._mark = (time.process_time(), time.monotonic())
        self._saved_at, self._last_share = time.monotonic(), 0.0
        if checkpoint is not None and self.state.stage_steps:
            self._resume(checkpoint)
        elif stage.ema is not None:
            self.ema = {name: _whole(p).clone() for name, p in self.trained.items()}

    def _prepare_models(self) -> None:
        run, stage = self.run_, self.stage
        student, teacher = run.student, run.teacher
        check_stage(stage, student, teacher)
        if teacher is not None:
            teacher.to(self.device).eval().requires_grad_(False)
        _set_training(student.to(self.device), stage)
        converted = converted_layers(student, teacher)
        groups = choose_parameters(student, stage, converted)
        set_gradient_checkpointing(student, stage.gradient_checkpointing)
        names = {name for group in groups for name in group.names}
        run.touched += [n for n, _ in student.named_parameters() if n in names and n not in run.touched]
        self.sharded = self.accelerator.distributed_type == DistributedType.FSDP
        if self.sharded and stage.kind == "align":
            raise ConfigError("an align stage calls mixers one by one and cannot be sharded; run it with DDP or alone")
        # FSDP changes modules for good; the run's own student stays whole and takes the result at the end
        self.student = copy.deepcopy(student) if self.sharded else student
        self.objective = Objective(self.student, teacher, stage, converted)
        optimizer = make_optimizer(self.student, groups, stage)
        self.module, self.optimizer = self.accelerator.prepare(self.objective, optimizer)
        self.trained = {n: p for n, p in self.student.named_parameters() if n in names}
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]

    def _prepare_data(self) -> None:
        run, stage = self.run_, self.stage
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        self.row_tokens = run.data.row_tokens(stage)
        self.step_tokens = stage.batch_size * self.row_tokens * stage.accumulate * world
        again = None
        if stage.epochs > 1:
            again = max(1, math.ceil(self._budget() / stage.epochs / (self.step_tokens / stage.accumulate)))
        self.data = run.data.stream(stage, seed=self.seed, rank=rank, world=world, restart_after=again)
        self.held: list[Batch] = run.data.held_out(stage, run.eval_tokens) if run.eval_tokens else []
        self.cache = None
        if again is not None and stage.cache_teacher and stage.needs_teacher and run.out is not None:
            key = f"stage-{self.index}-rank-{rank}"
            self.cache = TeacherCache(run.out / "teacher_cache", key, again, stage.precision == "bf16")

    def _budget(self) -> float:
        """The stage's budget, with images as the tokens that they are."""
        budget = self.stage.budget
        return budget.amount * self.row_tokens if budget.unit == "images" else budget.amount

    # -- the loop ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Step until the budget is used; raises Interrupted after saving, TrainingError where it makes no sense."""
        title = f"{self.index + 1}/{len(self.run_.stages)} {self.stage.kind}"
        with Bar(title, self.run_.show and self.accelerator.is_main_process) as bar:
            while (share := self._share()) < 1:
                self._step(share)
                row = self._record()
                bar.update(self._share(), row["loss"], row["tokens_per_second"], self.state.stage_seconds)
                if self._agree(float(self.run_.stop.set)):
                    self._save()
                    raise Interrupted(self._how_to_go_on())
                if self._save_is_due():
                    self._save()
        self._finish()

    def _share(self) -> float:
        """The part of the budget that is used."""
        self._tick()
        used = {
            "tokens": self.state.stage_tokens,
            "images": self.state.stage_tokens,
            "seconds": self.state.stage_seconds,
            "cpu_seconds": self.state.stage_cpu_seconds,
        }
        return self._agree(used[self.stage.budget.unit] / self._budget())

    def _tick(self) -> None:
        cpu, wall = time.process_time(), time.monotonic()
        spent = self._sum(cpu - self._mark[0])
        self.state.cpu_seconds += spent
        self.state.stage_cpu_seconds += spent
        self.state.stage_seconds += wall - self._mark[1]
        self._mark = (cpu, wall)

    def _sum(self, value: float) -> float:
        if self.accelerator.num_processes == 1:
            return value
        return float(self.accelerator.reduce(torch.tensor(value, device=self.device), "sum"))

    def _agree(self, value: float) -> float:
        """The first process decides for all: clocks and signals differ between processes."""
        if self.accelerator.num_processes == 1:
            return value
        return float(broadcast(torch.tensor(value, device=self.device, dtype=torch.float64)))

    def _step(self, share: float) -> None:
        stage, state = self.stage, self.state
        # the rate at the middle of the step; with a budget in time the last step says how long a step is
        half = 0.5 * max(0.0, share - self._last_share)
        if stage.budget.unit in ("tokens", "images"):
            half = 0.5 * self.step_tokens / self._budget()
        self._last_share = share
        factor = stage.schedule.factor(min(1.0, share + half))
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        started, tokens = time.monotonic(), 0
        self.loss: float = 0.0
        self.terms: dict[str, float] = {}
        for part in range(stage.accumulate):
            place = self.data.state_dict()
            batch = next(self.data).to(self.device)
            tokens += batch.tokens
            guide = self._guide(batch)
            last = part == stage.accumulate - 1
            with nullcontext() if last else self.accelerator.no_sync(self.module):
                loss, terms = self.module(batch, guide)
                if not math.isfinite(value := float(loss.detach())):
                    self._give_up(batch, guide, place)
                self.accelerator.backward(loss / stage.accumulate)
            self.loss += value / stage.accumulate
            for name, term in terms.items():
                self.terms[name] = self.terms.get(name, 0.0) + float(term) / stage.accumulate
        norm = self.accelerator.clip_grad_norm_(list(self.trained.values()), stage.clip or math.inf)
        self.norm = float(norm) if norm is not None else 0.0
        if not math.isfinite(self.norm):
            self._give_up(batch, guide, place)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.student.model.after_step()
        self._update_ema()
        state.step, state.stage_steps = state.step + 1, state.stage_steps + 1
        # Full rows need not be counted; a step of padded ones has at most `step_tokens`.
        tokens = self.step_tokens if self.run_.data.full_rows(stage) else int(self._sum(tokens))
        state.tokens, state.stage_tokens = state.tokens + tokens, state.stage_tokens + tokens
        self.loss = self._sum(self.loss) / self.accelerator.num_processes
        state.first_loss = self.loss if state.first_loss is None else state.first_loss
        self.speed = tokens / max(1e-9, time.monotonic() - started)
        if self.watch.update(self.loss):
            raise TrainingError(
                f"step {state.step}, stage {self.index + 1} ({stage.kind}): the loss diverges, {self.loss:.4g} after "
                f"{self.watch.best:.4g}; {self._advice()}"
            )

    def _guide(self, batch: Batch) -> Guide:
        if self.cache is None:
            return self.objective.teach(batch)
        guide = self.cache.get(self.data.index - 1, lambda: self.objective.teach(batch))
        return {name: t.to(self.device) for name, t in guide.items()}

    def _update_ema(self) -> None:
        if self.stage.ema is not None:
            for name, p in self.trained.items():
                self.ema[name].lerp_(_whole(p), 1 - self.stage.ema)

    def _give_up(self, batch: Batch, guide: Guide, place: dict[str, Any]) -> None:
        where = "the loss" if self.sharded else first_non_finite(self.objective, batch, guide)
        if where == "the gradient":
            bad = (n for n, p in self.trained.items() if p.grad is not None and not torch.isfinite(p.grad).all())
            where = f"the gradient of {next(bad, 'a parameter')}"
        raise TrainingError(
            f"step {self.state.step + 1}, stage {self.index + 1} ({self.stage.kind}): a value that is not finite, "
            f"first in {where} (batch {place['index']}); {self._advice()}"
        )

    def _advice(self) -> str:
        tips = [f"try a lower lr than {max(self.peaks):g}"]
        if self.stage.precision == "bf16":
            tips.append("precision: fp32")
        tips.append("a clip such as 1.0" if self.stage.clip is None else f"a smaller clip than {self.stage.clip:g}")
        kept = "" if self.run_.checkpoints is None else "; checkpoints are as they were"
        return ", ".join(tips) + kept

    def _record(self) -> dict[str, Any]:
        self._tick()
        row = {
            "step": self.state.step,
            "stage": self.index,
            "kind": self.stage.kind,
            "tokens": self.state.tokens,
            "loss": self.loss,
            **self.terms,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": self.norm,
            "tokens_per_second": self.speed,
            "cpu_seconds": self.state.cpu_seconds,
        }
        if self.accelerator.is_main_process:
            self.run_.log.write(row)
        return row

    # -- saving and going on -------------------------------------------------------------------------------------

    def _save_is_due(self) -> bool:
        when = self.run_.when
        if self.run_.checkpoints is None:
            return False
        steps = when.every_steps is not None and self.state.stage_steps % when.every_steps == 0
        seconds = when.every_seconds is not None and time.monotonic() - self._saved_at >= when.every_seconds
        return bool(self._agree(float(steps or seconds)))

    def _save(self) -> None:
        """Write a checkpoint in the middle of the stage."""
        optimizer = {}
        for name, p in self.trained.items():
            for key, value in self._optimizer_state(p).items():
                optimizer[f"{name}|{key}"] = _whole(value)
        self._write({"optimizer": optimizer, "ema": self.ema}, self.data.state_dict())

    def _write(self, tensors: dict[str, dict[str, Tensor]], data: dict[str, Any] | None) -> None:
        run, state = self.run_, self.state
        if run.checkpoints is None:
            return
        score = self._evaluate()
        if score is None:
            score = self.watch.mean
        parameters = dict(self.student.named_parameters())
        model = {name: _whole(parameters[name]) for name in run.touched}
        model |= {name: _whole(t) for name, t in saved_buffers(self.student).items()}
        randoms = gather_object([random_states()])
        state.data, state.watch = data, asdict(self.watch)
        values = {**asdict(state), "touched": run.touched, "random": randoms}
        if self.accelerator.is_main_process:
            ranked = None if score is None else (self.index, score)
            run.checkpoints.save(state.step, {"model": model, **tensors}, values, ranked)
        self.accelerator.wait_for_everyone()
        self._saved_at = time.monotonic()

    def _optimizer_state(self, parameter: Tensor) -> dict[str, Tensor]:
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        return inner.state.get(parameter, {})

    def _resume(self, checkpoint: Checkpoint) -> None:
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        stored = checkpoint.tensors("optimizer")
        for name, p in self.trained.items():
            values = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if (t := stored.get(f"{name}|{key}")) is not None:
                    values[key] = t if key == "step" else torch.zeros_like(p)
                    if key != "step":
                        _copy(values[key], t)
            if values:
                inner.state[p] = values
        self.ema = checkpoint.tensors("ema")
        self.watch = LossWatch(**self.state.watch)
        if self.state.data is not None:
            self.data.load_state_dict(self.state.data)
        states = checkpoint.state["random"]
        if len(states) == self.accelerator.num_processes:
            restore_random_states(states[self.accelerator.process_index])

    @torch.no_grad()
    def _evaluate(self) -> float | None:
        """The mean loss over the held-out batches, or None where there are none."""
        if not self.held:
            return None
        self.student.eval()
        total, sums = 0.0, dict[str, float]()
        for batch in self.held:
            batch = batch.to(self.device)
            loss, terms = self.module(batch, self.objective.teach(batch))
            total += float(loss)
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + float(term) / len(self.held)
        _set_training(self.student, self.stage)
        loss = total / len(self.held)
        row = {"step": self.state.step, "stage": self.index, "kind": self.stage.kind, "held_out_loss": loss}
        row |= {f"held_out_{name}": value for name, value in sums.items() if len(sums) > 1}
        if self.accelerator.is_main_process:
            self.run_.log.write(row)
        return loss

    def _finish(self) -> None:
        """Take over the averaged weights, record the stage, write a checkpoint that begins the next one."""
        state = self.state
        for name, average in self.ema.items():
            _copy(self.trained[name], average)
        if self.sharded:
            whole = dict(self.run_.student.named_parameters())
            for name, p in self.trained.items():
                whole[name].data.copy_(_whole(p))
            for name, t in saved_buffers(self.run_.student).items():
                t.copy_(_whole(saved_buffers(self.student)[name]))
        self._tick()
        record = {
            "kind": self.stage.kind,
            "steps": state.stage_steps,
            "tokens": state.stage_tokens,
            "cpu_seconds": round(state.stage_cpu_seconds, 3),
            "seconds": round(state.stage_seconds, 3),
            "first_loss": state.first_loss,
            "last_loss": self.watch.mean,
        }
        state.done = [*state.done, record]
        state.stage += 1
        state.stage_steps = state.stage_tokens = 0
        state.stage_cpu_seconds = state.stage_seconds = 0.0
        state.first_loss = None
        self._write({}, None)
        if self.cache is not None:
            self.cache.clear()
        set_gradient_checkpointing(self.run_.student, False)
        self.accelerator.free_memory()

    def _how_to_go_on(self) -> str:
        if self.run_.out is None:
            return f"stopped at step {self.state.step}; without an output folder there is nothing to go on from"
        return f"stopped at step {self.state.step}, saved in {self.run_.out}; start the same command again to go on"
