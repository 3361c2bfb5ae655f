"""From the encoder's tokens to one vector per image."""

from einops import rearrange, reduce  # pyright: ignore[reportUnknownVariableType]

from vitx.model.axes import Mask, Pooled, Tokens
from vitx.registry import Registry


def cls(tokens: Tokens, *, prefix: int, mask: Mask | None = None) -> Pooled:
    """The class token, which stands first."""
    return tokens[:, 0]


def mean(tokens: Tokens, *, prefix: int, mask: Mask | None = None) -> Pooled:
    """The mean over visible patch tokens, or zeros if none is; prefix tokens are left out."""
    patches = tokens[:, prefix:]
    if mask is None:
        return reduce(patches, "b n d -> b d", "mean")
    visible = rearrange(mask[:, prefix:], "b n -> b n 1").to(tokens.dtype)
    return (patches * visible).sum(dim=1) / visible.sum(dim=1).clamp(min=1)


POOL = Registry("model.pool", cls, mean, given=("prefix", "mask"))

READS = {cls: 1}
"""How many leading tokens a pool reads; one that is not listed reads all of them."""
