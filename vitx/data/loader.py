"""Batches: order and draws by seed, variations, on a device.

Images in memory are varied in batches on the device; pictures in files are read, cropped and
flipped by workers. Both ways draw numbers that depend on (seed, epoch) alone; the shares of
mixed images are drawn by (seed, step).
"""

from collections import deque
from collections.abc import Generator, Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader

from vitx.data import augment, transforms
from vitx.data.dataset import Dataset
from vitx.data.images import BadImage, Files, Split
from vitx.data.sources import Images
from vitx.model.axes import Image
from vitx.registry import UserError

Batch = tuple[Image, Tensor]
"""Normalised images and their class numbers (b), or class probabilities (b, classes) if mixed."""


def epoch_order(seed: int, epoch: int, images: int) -> Int[Tensor, " images"]:
    """The order of an epoch: a permutation that depends on nothing but its arguments."""
    return torch.randperm(images, generator=_generator(seed, epoch, stream=0))


@lru_cache(maxsize=32)  # each seed that is trained as a lane has draws for each variation
def epoch_draws(
    seed: int, epoch: int, images: int, draws: int, *, stream: int = 1
) -> Float[Tensor, "images draws"]:
    """Uniform numbers of an epoch, a row per image of the split, whatever the order or device.

    Each augmentation has its own `stream`, so that switching one on moves no other's draws.
    """
    return torch.rand(images, draws, generator=_generator(seed, epoch, stream=stream))


AFFINE, CROP, FLIP, ERASE, MIX, FILES = range(1, 7)
"""Streams of draws."""


def steps_per_epoch(images: int, batch: int, *, drop_last: bool) -> int:
    """Batches of an epoch."""
    return images // batch if drop_last else -(-images // batch)


def check_batch(dataset: Dataset, batch: int, ranks: int) -> None:
    """ValueError if the training split has no such batch, or several processes can't share it."""
    images, drop_last = len(dataset.train), dataset.config.drop_last
    steps = steps_per_epoch(images, batch, drop_last=drop_last)
    if not steps:
        raise UserError(f"batch = {batch} is larger than the training split of {images}")
    least = batch if drop_last else images - (steps - 1) * batch
    if ranks > 1 and least < 2 * ranks:
        raise UserError(
            f"a batch of {least} images can't be shared by {ranks} processes, which take at least "
            "2 each" + ("" if drop_last else "; data.drop_last=True leaves out an epoch's last")
        )


def batches(
    dataset: Dataset,
    *,
    batch: int,
    seed: int,
    order_seed: int | None = None,
    start: int = 0,
    device: torch.device | str = "cpu",
    part: tuple[int, int] = (0, 1),
) -> Generator[Batch, None, None]:
    """Endless training batches from step `start`: varied, normalised, on the device.

    `seed` is that of all draws, and of the order unless `order_seed` is given. `part` (rank, ranks)
    takes a contiguous share of every batch, for one of several processes.
    """
    config, images = dataset.config, len(dataset.train)
    check_batch(dataset, batch, part[1])
    read = _from_memory if isinstance(dataset.train, Split) else _from_files
    order_seed = seed if order_seed is None else order_seed
    schedule = _schedule(images, batch, order_seed, start, part, drop_last=config.drop_last)
    for (epoch, step, indices), image, target in read(dataset, schedule, seed, device):
        image = dataset.normalise(image.float())
        if config.erase:
            draws = epoch_draws(seed, epoch, images, augment.ERASE_DRAWS, stream=ERASE)
            image = augment.erase(image, _send(draws[indices], device), rate=config.erase)
        if config.mixup or config.cutmix:
            yield _mix(dataset, image, target, _generator(seed, epoch, stream=MIX, step=step))
        else:
            yield image, target


def evaluation_batches(
    dataset: Dataset,
    split: Images,
    *,
    batch: int = 512,
    device: torch.device | str = "cpu",
    part: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """A split once, in order, unvaried, normalised. `part` (rank, ranks) takes every ranks-th.

    A picture that is skipped as bad is black and has the class number -1.
    """
    rank, ranks = part
    mine = range(rank, len(split), ranks)
    portions = [mine[start : start + batch] for start in range(0, len(mine), batch)]
    if isinstance(split, Split):
        where = split.image.device
        read = (split.take(torch.tensor(indices, device=where)) for indices in portions)
        images = ((part.image, part.target) for part in read)
    else:
        keys = [[(0, index) for index in indices] for indices in portions]
        transform = transforms.evaluation(dataset.config.resize, dataset.size)
        images = _loader(dataset, split, transform, keys, replace=False)
    for image, target in images:
        yield dataset.normalise(_send(image, device).float()), _send(target, device)


Indices = Int[Tensor, " batch"]


class Step(NamedTuple):
    """Which images of the split a step trains on."""

    epoch: int
    step: int
    """Of the epoch."""
    indices: Indices


Read = Iterator[tuple[Step, Tensor, Tensor]]
"""Steps with the images and class numbers that were read for them."""


def _schedule(
    images: int, batch: int, seed: int, start: int, part: tuple[int, int], *, drop_last: bool
) -> Iterator[Step]:
    """The images of this part in every step, without end."""
    steps = steps_per_epoch(images, batch, drop_last=drop_last)
    epoch, first = divmod(start, steps)
    while True:
        order = epoch_order(seed, epoch, images)
        for step in range(first, steps):
            indices = order[step * batch : (step + 1) * batch]
            yield Step(epoch, step, indices[_share(len(indices), *part)])
        epoch, first = epoch + 1, 0


def _share(images: int, rank: int, ranks: int) -> slice:
    """A process's part of a batch: whole pairs of neighbours, which mixup and cutmix mix."""
    start, end = (2 * (images // 2 * place // ranks) for place in (rank, rank + 1))
    return slice(start, images if rank == ranks - 1 else end)


def _from_memory(
    dataset: Dataset, schedule: Iterator[Step], seed: int, device: torch.device | str
) -> Read:
    """Batches of a tensor, cropped, flipped and turned on the device."""
    split, config = dataset.train, dataset.config
    assert isinstance(split, Split)
    affine = {name: getattr(config, name) for name in ("rotate", "scale", "shear", "shift")}
    # Each variation with the stream of its draws and how many it takes.
    variations = []
    if config.crop < 1:
        crop = partial(augment.resized_crop, smallest=config.crop)
        variations.append((crop, CROP, augment.CROP_DRAWS))
    if any(affine.values()):
        variations.append((partial(augment.affine, **affine), AFFINE, augment.AFFINE_DRAWS))
    if config.flip:
        variations.append((partial(augment.flip, rate=config.flip), FLIP, augment.FLIP_DRAWS))
    for step in schedule:
        part = split.take(_send(step.indices, split.image.device))
        image, target = _send(part.image, device).float(), _send(part.target, device)
        for vary, stream, count in variations:
            draws = epoch_draws(seed, step.epoch, len(split), count, stream=stream)
            image = vary(image, _send(draws[step.indices], device))
        yield step, image, target


def _from_files(
    dataset: Dataset, schedule: Iterator[Step], seed: int, device: torch.device | str
) -> Read:
    """Batches of decoded pictures, cropped, flipped and varied by workers."""
    files, config = dataset.train, dataset.config
    assert isinstance(files, Files)
    ahead: deque[Step] = deque()

    def keys() -> Iterator[list[tuple[int, int]]]:
        for step in schedule:
            ahead.append(step)
            seeds = _epoch_seeds(seed, step.epoch, len(files))
            yield [(int(seeds[index]), int(index)) for index in step.indices]

    transform = transforms.training(config, dataset.size)
    for image, target in _loader(dataset, files, transform, keys(), replace=True):
        yield ahead.popleft(), _send(image, device), _send(target, device)


@lru_cache(maxsize=2)
def _epoch_seeds(seed: int, epoch: int, images: int) -> Int[Tensor, " images"]:
    return torch.randint(2**62, (images,), generator=_generator(seed, epoch, stream=FILES))


def _loader(
    dataset: Dataset, files: Files, transform: object, keys: object, *, replace: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and class numbers by keys. Raises BadImage for a bad picture, or lists it."""
    config = dataset.config
    skip = config.on_bad_image == "skip"
    if config.workers:
        transforms.end_workers_at_exit()
    pictures = transforms.Pictures(files, transform, dataset.size, replace=replace and skip)
    loader = DataLoader(
        pictures,
        batch_sampler=keys,  # type: ignore[arg-type]
        num_workers=config.workers,
        collate_fn=transforms.collate,
        # The loader draws a number when it starts; this keeps it off the global generator.
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=transforms.calm,
    )
    for image, target, faults in _alive(loader):
        if faults and not skip:
            raise BadImage(faults[0])
        if replace and (target < 0).any():
            raise BadImage(f"{transforms.MOST_REPLACED} bad pictures in a row: {faults[-1]}")
        dataset.skipped.extend(why for why in faults if why not in dataset.skipped)
        yield image, target


def _alive(loader: DataLoader) -> Iterator[Any]:
    """Its batches. Raises UserError where one of its workers was killed."""
    try:
        yield from loader
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise UserError(
            f"a process that reads pictures has died: {error} Often the memory does not suffice: "
            "go on from the last checkpoint with --resume and fewer --data.workers"
        ) from None


def _mix(dataset: Dataset, image: Image, target: Tensor, generator: torch.Generator) -> Batch:
    """mixup or cutmix of a batch, with one share of Beta(α, α) for all of it."""
    from scipy.special import betaincinv

    config = dataset.config
    which, share, y, x = torch.rand(augment.MIX_DRAWS, generator=generator).tolist()
    cut = bool(config.cutmix) and (not config.mixup or which < 0.5)
    alpha = config.cutmix if cut else config.mixup
    # Filled on the device: a tensor copied from here would wait for it.
    share, y, x = (
        torch.full((), value, dtype=image.dtype, device=image.device)
        for value in (float(betaincinv(alpha, alpha, share)), y, x)
    )
    soft = F.one_hot(target, len(dataset.classes)).to(image.dtype)
    if not cut:
        return augment.mixup(image, soft, share)
    return augment.cutmix(image, soft, share, torch.stack([y, x]))


def _send(value: Tensor, device: torch.device | str) -> Tensor:
    """To the device without waiting for the work that it has in hand."""
    return value.to(device, non_blocking=True)


def _generator(seed: int, epoch: int, *, stream: int, step: int = 0) -> torch.Generator:
    # Small numbers mixed into one 63-bit seed; the factors are large odd primes.
    mixed = ((seed * 1_000_003 + epoch) * 998_244_353 + stream) + step * 2_147_483_647_000_003
    return torch.Generator().manual_seed(mixed % 2**63)
