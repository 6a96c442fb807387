"""What happens: the training loop."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dreamlora.config import RunConfig
from dreamlora.errors import DivergedError, is_of_memory
from dreamlora.interfaces import Batch, Callback, Components, Conditioning, Family, Objective, StepResult
from dreamlora.interrupts import Interrupted, asked, deferred, heed
from dreamlora.memory import StageMemory
from dreamlora.models.new_tokens import TokenEmbeddings
from dreamlora.optimizers import grad_norm
from dreamlora.processes import gather_lists
from dreamlora.randomness import seed_of
from dreamlora.runfolder import RunFolder
from dreamlora.training.ema import MovingAverage
from dreamlora.training.gradients import average_gradients
from dreamlora.training.stream import Stream, moved

MAX_SKIPPED_STEPS = 20
"""fp16 steps in a row that the gradient scaler may skip; it needs about 10 to settle, more means NaN."""


class Predictor(nn.Module):
    """Everything that trains, as one module with one forward pass.

    Args:
        family: the plug-in.
        denoiser: with LoRA.
        text: the text components if something in them trains (batches then carry token ids), else None.
        guidance_scale: embedded guidance, for models that have it.
        new_tokens: their embeddings, by the text encoder that they are put into.
    """

    def __init__(
        self,
        family: Family,
        denoiser: nn.Module,
        text: Components | None,
        guidance_scale: float,
        new_tokens: Mapping[str, TokenEmbeddings] | None = None,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.encoders = nn.ModuleDict(
            {name: text[name] for name in family.TEXT_ENCODERS if name in text} if text else {}
        )
        self.new_tokens = nn.ModuleDict(new_tokens or {})
        self._family = family
        self._text = text
        self._guidance_scale = guidance_scale

    def forward(self, noisy: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """Prediction ``[B, C, h, w]`` for noisy latents of the same shape."""
        if self._text is not None:
            conditioning = {**conditioning, **self._family.encode_tokens(self._text, conditioning)}
        return self._family.predict(self.denoiser, noisy, times, conditioning, self._guidance_scale)


@dataclass
class Run:
    """A run that is ready to go: what the loop works on and what callbacks see.

    Attributes:
        model: ``Predictor`` as accelerate prepared it.
        trainables: what trains, by name: LoRA parameters, embeddings of new tokens.
        components: pipeline parts in memory ("unet"/"transformer", "scheduler", text parts if they train).
        conditioning: captions, and what belongs to their images, to batched conditioning (or token ids, if the text
            encoder trains), on the CPU.
        call_arguments: prompts to keyword arguments of the pipeline.
        vae: gives the autoencoder, loaded when the first sample is drawn; ``put_away`` takes it off the device.
        memory: that the stages take.
        settings: what a resumed run must share with this one.
        header: what the LoRA's files say of themselves at a step.
        step: steps done, those that were skipped included.
        skipped_steps: how many of the last ones, in a row, the gradient scaler of fp16 skipped.
        total_steps: where the run ends; ``end_here`` lowers it.
        begun_with: the trainables before the first step, of a resumed run that went on from a LoRA.
        average: of the trainables, which they hold whenever callbacks look; None: there is none.
        occasions: steps between two times, of each kind of work that takes long (measuring, drawing).
        settle: follows on every update of the weights, as a part of it.
        keep: writes a checkpoint when a signal ends the run.
        fallback: step and state before the step that is under way, if what follows on it takes long: a signal need not
            wait for all that, and a resumed run makes the step once more.
        amid: whether a step is being made: weights and optimizer may be of two steps. Only a second Ctrl-C, or an
            error, can be seen there.
        counted: what the optimizer had counted when that was logged last.
        stopping: the signal that ends the run after this step, in all processes; 0: none.
        eval_seconds: that the evaluation loss has taken, in this process.
        ended_early: why the run ends before the steps it was to have.
    """

    config: RunConfig
    folder: RunFolder
    accelerator: Accelerator
    family: Family
    objective: Objective
    components: Components
    model: nn.Module
    trainables: dict[str, nn.Parameter]
    optimizer: Any
    lr_scheduler: Any
    stream: Stream
    conditioning: Callable[[Sequence[str], Conditioning], Conditioning]
    call_arguments: Callable[[Sequence[str]], dict[str, Any]]
    vae: Callable[[], Components]
    put_away: Callable[[], None]
    memory: StageMemory
    total_steps: int
    average: MovingAverage | None = None
    begun_with: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    header: Callable[[int], dict[str, str]] = lambda step: {}
    callbacks: list[Callback] = field(default_factory=list)
    step: int = 0
    skipped_steps: int = 0
    eval_seconds: float = 0.0
    ended_early: str | None = None
    occasions: tuple[int, ...] = ()
    settle: Callable[[], None] = lambda: None
    keep: Callable[[], None] = lambda: None
    fallback: tuple[int, bytes] | None = None
    amid: bool = False
    counted: dict[str, int] = field(default_factory=dict)
    stopping: int = 0

    @property
    def new_tokens(self) -> dict[str, TokenEmbeddings]:
        """Embeddings of new tokens, by the text encoder that they are put into."""
        return dict(self.accelerator.unwrap_model(self.model).new_tokens.items())

    def takes_long(self, step: int) -> bool:
        """Whether something that takes long follows on a step."""
        return any(is_due(self, every, step) for every in self.occasions)

    def pipeline(self) -> Any:
        """A stock pipeline around the modules that are training."""
        return self.family.pipeline({**self.components, **self.vae()})

    def to_training(self) -> None:
        """Put into the parameters what trains."""
        self.optimizer.train()
        if self.average:
            self.average.train()

    def to_looking(self) -> None:
        """Put into the parameters what is measured, drawn and saved, if that is an average of what trains."""
        self.optimizer.eval()
        if self.average:
            self.average.eval()

    def end_here(self, reason: str) -> None:
        """Make this step the last one, for the loop and for the callbacks that still come."""
        self.total_steps = self.step
        self.ended_early = reason

    def predict(self, noisy: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """The model's prediction outside of training; nothing is synchronised between processes."""
        return self.accelerator.unwrap_model(self.model)(noisy, times, conditioning)


def is_due(run: Run, every: int | None, step: int | None = None) -> bool:
    """Whether what comes every so many steps (0, None: never) and at the end comes at a step; the run's by default."""
    step = run.step if step is None else step
    return bool(every) and (step % (every or 1) == 0 or step == run.total_steps)


def train(run: Run) -> None:
    """Train from ``run.step`` to ``run.total_steps``.

    An average of the path (that of schedule-free optimizers, or ``--ema_decay``) is what the parameters hold whenever
    callbacks look, so that is what is measured, sampled and saved. The switch is made at every step, whether anything
    looks or not: schedule-free optimizers round there, and a run must not depend on when it was looked at.

    Raises:
        DivergedError: the loss or a gradient is not finite: that update is not made; or the last update left weights
            that are not finite. What is in checkpoints is finite in any case.
        Interrupted: a signal came; there is a checkpoint then, unless nothing was trained yet, or the signal was a
            second Ctrl-C amid a step. So there is where memory does not suffice for what follows on a step.
    """
    try:
        try:
            _train(run)
        except (RuntimeError, MemoryError) as error:
            heed()  # a signal comes to all processes: what they share fails where another has ended by it already
            if is_of_memory(error) and run.accelerator.num_processes == 1:  # others wait for this one elsewhere
                run.keep()
            raise
    except Interrupted:
        run.keep()
        raise


def _train(run: Run) -> None:
    for callback in run.callbacks:
        callback.on_start(run)
    run.model.train()
    batches = next_batches(run, run.step, 0)
    while run.step < run.total_steps:
        batches = _step(run, batches)
    check_state(run)
    for callback in run.callbacks:
        callback.on_end(run)


def _step(run: Run, batches: list[Batch]) -> list[Batch]:
    """A step and what follows on it. A signal waits for it to be whole; but not for callbacks that take long."""
    long = run.takes_long(run.step + 1)
    with deferred():
        run.amid = True
        run.to_training()
        result, batches = optimizer_step(run, batches)
        run.to_looking()
        run.amid = False
        if not long:
            _follow(run, result)
    if run.stopping:
        raise Interrupted(run.stopping)
    if long:
        heed()
        _follow(run, result)
    return batches


def _follow(run: Run, result: StepResult) -> None:
    for callback in run.callbacks:
        callback.on_step(run, result)


def optimizer_step(run: Run, batches: list[Batch]) -> tuple[StepResult, list[Batch]]:
    """One optimizer step over all micro-batches; returns the next step's first one as well.

    A micro-batch is several batches if its images have several sizes. The next one is read while a GPU works on this
    one: by a thread, which a CPU would miss in its own work. ``read`` afterwards is the only synchronisation. With the
    loss the processes tell each other whether a signal asks one of them for the end.
    """
    started = time.perf_counter()
    accumulation = run.config.train.gradient_accumulation_steps
    loss = torch.zeros((), device=run.accelerator.device)
    names: list[str] = []
    for micro in range(accumulation):
        following = (run.step, micro + 1) if micro + 1 < accumulation else (run.step + 1, 0)
        if run.accelerator.device.type != "cpu":
            run.stream.read_ahead(*following)
        names += [name for batch in batches for name in batch.names]
        micro_loss = micro_batch_loss(run, batches, micro)
        run.accelerator.backward(micro_loss)
        loss += micro_loss.detach()
        batches = next_batches(run, *following)
    average_gradients(list(run.trainables.values()), run.accelerator)
    stop = torch.full_like(loss, bool(asked()))
    if run.accelerator.num_processes > 1:
        loss, stop = run.accelerator.reduce(torch.stack([loss, stop]), "mean")
    mean_loss, grad_norm, share = read(loss, clip_gradients(run), stop)
    run.stopping = (asked() or signal.SIGTERM) if share else 0
    learning_rate = float(run.optimizer.param_groups[0]["lr"])
    _check_finite(run, "loss", mean_loss, names)
    _update(run, grad_norm, names)
    run.step += 1
    return StepResult(run.step, mean_loss, grad_norm, learning_rate, time.perf_counter() - started), batches


def micro_batch_loss(run: Run, batches: list[Batch], micro: int) -> Tensor:
    """Weighted loss of one micro-batch; summed over micro-batches it is the step's mean loss."""
    return torch.stack([_batch_loss(run, batch, micro, part) for part, batch in enumerate(batches)]).sum()


def _batch_loss(run: Run, batch: Batch, micro: int, part: int) -> Tensor:
    _seed_dropout(run, micro, part)
    noisy = run.objective.corrupt(batch.latents, batch.noise, batch.times)
    target = run.objective.target(batch.latents, batch.noise, batch.times)
    prediction = run.model(noisy, batch.times, batch.conditioning)
    error = run.objective.errors(prediction, target, batch.times, batch.masks)
    return (batch.weights * run.objective.weight(batch.times) * error).sum()


def _seed_dropout(run: Run, micro: int, part: int) -> None:
    """Dropout draws from torch's global stream; seeding it by position leaves no state to save for a resume."""
    place = (run.step, micro, run.accelerator.process_index, *([part] if part else []))
    seed = seed_of(run.config.train.seed, "dropout", *place)
    device = run.accelerator.device
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    # torch.manual_seed looks for all kinds of devices, each time anew: 0.4 ms
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def next_batches(run: Run, step: int, micro: int) -> list[Batch]:
    """A micro-batch of the stream on the run's device."""
    return [moved(batch, run.accelerator.device) for batch in run.stream.batches(step, micro)]


def clip_gradients(run: Run) -> Tensor:
    """Clip as ``--max_grad_norm`` says. The norm of all gradients before ``()``, in the optimizer's units: finite only
    if all of them are.

    In fp16 the gradients are unscaled first; the same on all processes, whose gradients were averaged.
    """
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.unscale_(run.optimizer.optimizer)
    parameters = list(run.trainables.values())
    norm = grad_norm(parameters, run.optimizer)
    if run.config.optim.max_grad_norm:
        clip_grads_with_norm_(parameters, run.config.optim.max_grad_norm, norm)
    return norm


def read(*numbers: Tensor) -> list[float]:
    """Numbers on the host. This waits for the GPU: everything else of a step only gives it work."""
    values: list[float] = torch.stack(numbers).tolist()
    return values


def _update(run: Run, grad_norm: float, names: list[str]) -> None:
    """Step and schedule; refuses gradients that are not finite, and what an optimizer can no longer factorise.

    In fp16 such a step is skipped, and the scale of the loss lowered. The optimizer is not called through the scaler:
    ``GradScaler.step`` would wait for the GPU to learn what ``grad_norm`` says already, and with a fused optimizer
    nobody could tell that it skipped.
    """
    scaler = run.accelerator.scaler
    finite = math.isfinite(grad_norm)
    run.skipped_steps = 0 if finite else run.skipped_steps + 1
    if scaler is None or run.skipped_steps > MAX_SKIPPED_STEPS:
        _check_finite(run, "norm of the gradients", grad_norm, names)
    if finite:
        try:
            run.optimizer.optimizer.step()
        except torch.linalg.LinAlgError as error:
            raise DivergedError(
                f"the optimizer met matrices at step {run.step + 1} that have grown too far ({error}). {_way_out(run)}"
            ) from None
        run.settle()
        run.lr_scheduler.step()
        if run.average:
            run.average.update(run.lr_scheduler.last_epoch)
    run.optimizer.zero_grad()
    if scaler is not None:
        scaler.update()


def check_state(run: Run) -> None:
    """Refuse weights and a state of the optimizer that are not finite, which an update of finite gradients can make.

    For all processes, which hold the same. Waits for the GPU: for what is about to be saved, not for every step.

    Raises:
        DivergedError: the message names the first such tensor.
    """
    tensors = [(f"LoRA's {name}", parameter.detach()) for name, parameter in run.trainables.items()]
    tensors += [
        (f"optimizer's {key}", value)
        for state in run.optimizer.state.values()
        for key, value in state.items()
        if type(value) is Tensor and value.is_floating_point()  # moments in 8 bits are classes of their own
    ]
    if math.isfinite(get_total_norm([tensor for _, tensor in tensors], math.inf)):
        return
    wrong = next(name for name, tensor in tensors if not tensor.isfinite().all())
    raise DivergedError(f"the {wrong} is not finite after step {run.step}, and is not saved. {_way_out(run)}")


def _check_finite(run: Run, what: str, value: float, names: list[str]) -> None:
    if math.isfinite(value):
        return
    files = sorted(set(gather_lists(names)))
    raise DivergedError(
        f"the {what} is not finite at step {run.step + 1} ({value}). Images in the batch: {', '.join(files)}. "
        f"The LoRA was not changed by this step. {_way_out(run)}"
    )


def _way_out(run: Run) -> str:
    steps = run.folder.checkpoint_steps()
    last = (
        f"The last checkpoint, {run.folder.checkpoint_dir(steps[-1])}, is good." if steps else "There is no checkpoint."
    )
    return (
        f"Try a lower --learning_rate (now {run.optimizer.param_groups[0]['lr']:g}), --mixed_precision bf16 instead of "
        f"fp16, or a smaller --max_grad_norm. {last}"
    )
