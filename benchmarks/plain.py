"""The from-scratch CIFAR-10 project in plain PyTorch, as its code computes: model, data and step.

It is what `scratch-cifar10` is timed against, and what its weights are read from and written to.
Names of modules are that project's (tintn/vision-transformer-from-scratch), by which its files of
weights are recognised; einops is left out on purpose.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

WIDTH, DEPTH, HEADS, HIDDEN, PATCH, IMAGE = 48, 4, 4, 192, 4, 32


class Gelu(nn.Module):
    """The tanh form of GELU, written out."""

    def forward(self, x: Tensor) -> Tensor:
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
        return 0.5 * x * (1.0 + torch.tanh(inner))


class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        self.projection = nn.Conv2d(3, WIDTH, kernel_size=PATCH, stride=PATCH)

    def forward(self, image: Tensor) -> Tensor:
        return self.projection(image).flatten(2).transpose(1, 2)


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embeddings = Patches()
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.position_embeddings = nn.Parameter(torch.randn(1, (IMAGE // PATCH) ** 2 + 1, WIDTH))

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch_embeddings(image)
        x = torch.cat((self.cls_token.expand(x.size(0), -1, -1), x), dim=1)
        return x + self.position_embeddings


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.size(-1))
    return torch.matmul(scores.softmax(dim=-1), value)


class MergedAttention(nn.Module):
    """All heads from one projection."""

    def __init__(self, *, bias: bool = True):
        super().__init__()
        self.qkv_projection = nn.Linear(WIDTH, 3 * WIDTH, bias=bias)
        self.output_projection = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        images, tokens, _ = x.size()
        parts = torch.chunk(self.qkv_projection(x), 3, dim=-1)
        query, key, value = (
            part.view(images, tokens, HEADS, WIDTH // HEADS).transpose(1, 2) for part in parts
        )
        mixed = attend(query, key, value).transpose(1, 2).contiguous()
        return self.output_projection(mixed.view(images, tokens, WIDTH))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense_1 = nn.Linear(WIDTH, HIDDEN)
        self.activation = Gelu()
        self.dense_2 = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_2(self.activation(self.dense_1(x)))


class Block(nn.Module):
    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention
        self.layernorm_1 = nn.LayerNorm(WIDTH)
        self.mlp = Mlp()
        self.layernorm_2 = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm_1(x))
        return x + self.mlp(self.layernorm_2(x))


class Encoder(nn.Module):
    def __init__(self, attention: Callable[[], nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(Block(attention()) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class PlainVit(nn.Module):
    """The project's classifier; `attention` makes the attention of a block."""

    def __init__(self, attention: Callable[[], nn.Module] = MergedAttention):
        super().__init__()
        self.embedding = Embedding()
        self.encoder = Encoder(attention)
        self.classifier = nn.Linear(WIDTH, 10)
        self.apply(draw)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.encoder(self.embedding(image))[:, 0, :])


@torch.no_grad()
def draw(module: nn.Module) -> None:
    """The project's initial values."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Embedding):
        nn.init.trunc_normal_(module.cls_token, std=0.02)
        nn.init.trunc_normal_(module.position_embeddings, std=0.02)


class Pictures(Dataset):
    """Pictures that are turned into tensors one by one, as torchvision's data set is; `varied` for
    training."""

    def __init__(self, image: Tensor, target: Tensor, *, varied: bool):
        from torchvision import transforms

        self.pixels = image.permute(0, 2, 3, 1).contiguous().numpy()
        self.target = target.tolist()
        variations = [
            transforms.RandomHorizontalFlip(p=0.5),
            transforms.RandomResizedCrop(
                (IMAGE, IMAGE), scale=(0.8, 1.0), ratio=(3 / 4, 4 / 3), antialias=False
            ),
        ]
        self.transform: Callable[[Any], Tensor] = transforms.Compose(
            [
                transforms.ToTensor(),
                *(variations if varied else []),
                transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
            ]
        )

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.pixels[index])), self.target[index]


def batches(
    image: Tensor, target: Tensor, *, batch: int, workers: int = 0, varied: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of batches, shuffled and varied for training."""
    pictures = Pictures(image, target, varied=varied)
    return iter(DataLoader(pictures, batch_size=batch, shuffle=varied, num_workers=workers))


@torch.no_grad()
def accuracy(model: nn.Module, stream: Iterator[tuple[Tensor, Tensor]]) -> float:
    """The project's reading of its curve: share of images that are classified as they should be."""
    model.eval()
    hits = images = 0
    for image, target in stream:
        hits += (model(image).argmax(dim=1) == target).sum().item()
        images += len(target)
    model.train()
    return hits / images


def make_step(model: nn.Module) -> Callable[[Tensor, Tensor], float]:
    """The project's training step: AdamW, learning rate and weight decay 0.01, the loss read."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)

    def step(image: Tensor, target: Tensor) -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(image), target)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
