"""From the encoder's tokens to one vector an image."""

from einops import reduce

from vitx.axes import Pooled, Tokens
from vitx.registry import table


def cls(tokens: Tokens, *, prefix: int) -> Pooled:
    """The class token, which stands first."""
    return tokens[:, 0]


def mean(tokens: Tokens, *, prefix: int) -> Pooled:
    """The mean over patch tokens; class token and registers are left out."""
    return reduce(tokens[:, prefix:], "b n d -> b d", "mean")


POOL = table("model.pool", cls, mean, given=("prefix",))

READS = {cls: 1}
"""How many leading tokens a pool reads; one that is not listed reads all of them."""
