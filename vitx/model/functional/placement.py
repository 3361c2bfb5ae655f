"""Where a residual branch is normalised. A branch may return fewer tokens than it reads."""

from collections.abc import Callable
from typing import Any

from vitx.model.axes import Read, Tokens
from vitx.registry import Registry

Branch = Callable[..., Read]


def pre(tokens: Tokens, norm: Branch, branch: Branch, **how: Any) -> Read:
    """x + f(norm(x)) (Dosovitskiy et al. 2021, arXiv:2010.11929, eq. 2)."""
    update = branch(norm(tokens), **how)
    return tokens[:, : update.shape[1]] + update


def post(tokens: Tokens, norm: Branch, branch: Branch, **how: Any) -> Read:
    """norm(x + f(x)) (Vaswani et al. 2017, arXiv:1706.03762, section 3.1)."""
    update = branch(tokens, **how)
    return norm(tokens[:, : update.shape[1]] + update)


PLACEMENT = Registry("model.placement", pre, post)
