"""What is timed: a module, a whole training step, or blocks that time themselves; and its arms."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from vitx.data.config import DataConfig
from vitx.measure.timing import Arm, Block, PairTimes, Step, TimingConfig, step_arm, time_rounds
from vitx.model.config import ModelConfig
from vitx.settings import override
from vitx.training import state as training
from vitx.training.config import OptimConfig, TrainConfig

ENDLESS = 2**40
"""Steps of a schedule that no timing comes to the end of."""


@dataclass(frozen=True)
class Training:
    """The training step of a configuration, to be timed in place of a module's; without its data.

    Precision, optimizer, accumulation and moving average are those of the configuration, and so is
    `compile`: a `TimingConfig` says only whether there is something to compile.
    """

    config: TrainConfig

    def example(self, device: torch.device) -> Tensor:
        """A batch of random images, b c h w."""
        model = self.config.model
        return torch.randn(self.config.batch, model.channels, *model.size, device=device)

    def make_step(self, device: torch.device) -> Step:
        """A fresh state's step on one batch, again and again."""
        endless = override(self.config, steps=ENDLESS)
        state, image = training.init(endless, device=device), self.example(device)
        target = torch.randint(endless.model.classes, (endless.batch,), device=device)
        return lambda: training.step(state, (image, target), endless)


@runtime_checkable
class Blocks(Protocol):
    """What times its own blocks on the CPU, its processes' work among them."""

    @property
    def images(self) -> int:
        """Of one iteration."""
        ...

    def make_block(self) -> Block: ...


Subject = nn.Module | Training | Blocks
AnySubject = TypeVar("AnySubject", bound=Subject)


def as_timed(
    subject: AnySubject, example: Tensor, config: TimingConfig
) -> tuple[AnySubject, Tensor]:
    """Both in the dtype of the configuration: in training the parameters stay as they are."""
    if config.dtype == "as given" or config.mode == "training":
        return subject, example
    if not isinstance(subject, nn.Module):
        return subject, example
    dtype = getattr(torch, config.dtype)
    return subject.to(dtype), example.to(dtype)


def prepare(model: nn.Module, config: TimingConfig) -> Callable[[Tensor], Tensor]:
    """The module as it is timed: itself, or compiled whole without a graph break."""
    if config.compile == "none":
        return model
    mode = None if config.compile == "default" else config.compile
    return torch.compile(model, fullgraph=True, mode=mode)


def make_arm(
    subject: Subject,
    example: Tensor,
    config: TimingConfig,
    run: Callable[[Tensor], Tensor] | None = None,
) -> Arm:
    """What is timed of a subject; `run` is what `prepare` made of a module."""
    device = example.device
    if isinstance(subject, Training):
        return step_arm(subject.make_step(device), subject.config.batch, device)
    if isinstance(subject, nn.Module):
        return step_arm(make_step(subject, run, example, config), len(example), device)
    return Arm(subject.make_block(), subject.images)


def make_step(
    module: nn.Module,
    run: Callable[[Tensor], Tensor] | None,
    example: Tensor,
    config: TimingConfig,
) -> Step:
    """One inference call, or one whole training step of `vitx.training`.

    The step is forward pass, loss, backward pass, clipping and AdamW, with autocast and a loss
    scale as the dtype asks for. `run` is what `prepare` made of the module.
    """
    if run is None:  # not `run or …`: a compiled module may have no truth value
        run = prepare(module, config)
    if config.mode == "inference":
        module.eval()

        def infer() -> None:
            with torch.inference_mode():
                run(example)

        return infer
    trained = step_config(len(example), config)
    with torch.no_grad():
        classes = module(example[:2]).shape[-1]
    state = training.init(trained, model=module, device=example.device)
    state.run = run
    generator = torch.Generator().manual_seed(config.seed)
    target = torch.randint(classes, (len(example),), generator=generator).to(example.device)
    return lambda: training.step(state, (example, target), trained)


def step_config(batch: int, config: TimingConfig) -> TrainConfig:
    """The training step of any module; its `model` is not used."""
    return TrainConfig(
        model=ModelConfig(),
        data=DataConfig(name="fake"),
        optim=OptimConfig(lr=1e-5, clip=1.0),
        steps=ENDLESS,
        batch=batch,
        precision="float32" if config.dtype == "as given" else config.dtype,
    )


def make_arms(
    subjects: Mapping[str, Subject], example: Tensor, config: TimingConfig
) -> dict[str, Arm]:
    """The arm of every subject, in the dtype that is timed."""
    return {
        name: make_arm(*as_timed(subject, example, config), config)
        for name, subject in subjects.items()
    }


def pair(
    subjects: Mapping[str, Subject], example: Tensor, config: TimingConfig, number: int
) -> PairTimes:
    """The times of all subjects by their arm's name, in this process."""
    tree = any(isinstance(subject, Blocks) for subject in subjects.values())
    arms = make_arms(subjects, example, config)
    return time_rounds(arms, config, number, example.device, tree=tree)


def probe(subjects: Mapping[str, Subject], example: Tensor, config: TimingConfig) -> float:
    """The candidate's images per second in a few calls, beside all that a pair holds in memory."""
    arms = make_arms(subjects, example, config)
    rounds = [{name: arm.block(1) for name, arm in arms.items()} for _ in range(4)]
    return arms["candidate"].images / min(seconds["candidate"] for seconds in rounds[1:])
