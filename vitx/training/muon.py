"""Muon: momentum whose matrices are made orthogonal before they are added to the weights."""

from collections.abc import Iterable
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

ITERATION = (3.4445, -4.7750, 2.0315)
"""Coefficients of Jordan et al. 2024: singular values come out between about 0.7 and 1.2."""
ITERATIONS = 5


def orthogonal(matrix: Float[Tensor, "k m n"]) -> Float[Tensor, "k m n"]:
    """About U·Vᵀ of every singular value decomposition U·S·Vᵀ, by a Newton-Schulz iteration.

    In bfloat16 on a GPU, as published; on a CPU in the matrix's own dtype, which is faster there.
    """
    a, b, c = ITERATION
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x.to(torch.bfloat16 if x.is_cuda else x.dtype)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal matrix by matrix, and weight decay as AdamW's.

    Jordan et al. 2024, kellerjordan.github.io/posts/muon. The change has the size of AdamW's (Liu
    et al. 2025, arXiv:2502.16982, eq. 4), so that one learning rate serves both. Kernels count as
    matrices (out, in·height·width); the rows of a group's parameters are `parts` equal matrices,
    as 3 for query, key and value. Beside `torch.optim.Muon`: all matrices of a shape at once, in
    float32 on a CPU, and the flag of fused optimizers that makes a step change nothing.
    """

    _step_supports_amp_scaling = True
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        parts: int = 1,
    ):
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": parts},
        )

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step, or none if `found_inf` holds 1.0."""
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for parameters in shapes.values():
                self._change(parameters, group)

    def _change(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Change parameters of one shape."""
        gradients = torch.stack([p.grad for p in parameters])  # type: ignore[misc]
        momenta = [self._momentum(p) for p in parameters]
        new = torch.stack(momenta).lerp(gradients, 1 - group["momentum"])
        matrix = rearrange(
            gradients.lerp(new, group["momentum"]).flatten(2),
            "k (parts m) n -> (k parts) m n",
            parts=group["parts"],
        )
        change = rearrange(
            orthogonal(matrix), "(k parts) m n -> k (parts m) n", parts=group["parts"]
        )
        size = 0.2 * max(matrix.shape[-2:]) ** 0.5
        for p, momentum, latest, direction in zip(parameters, momenta, new, change, strict=True):
            after = p * (1 - group["lr"] * group["weight_decay"])
            after -= group["lr"] * size * direction.view_as(p)  # a kernel again
            for value, new_value in ((p, after), (momentum, latest)):
                if self.found_inf is not None:
                    new_value = torch.where(self.found_inf.bool(), value, new_value)
                value.copy_(new_value)

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]
