"""Axis names and shape aliases: one letter or word means one thing in every annotation and pattern.

| axis    | meaning                        | axis         | meaning                              |
|---------|--------------------------------|--------------|--------------------------------------|
| b       | batch                          | d            | model width                          |
| c       | pixel channels                 | heads, e     | heads, width of a head (d = heads·e) |
| h w     | image height, width in pixels  | i j          | query, key position                  |
| y x     | row, column of the patch grid  | f            | hidden width of the MLP              |
| p q     | patch height, width in pixels  | classes      | classes                              |
| n       | tokens, n = r + y·x            | r            | prefix tokens (class, registers)     |
| s       | seeds                          | three, two   | stacked projections                  |
"""

from collections.abc import Callable

from jaxtyping import Bool, Float, Int
from torch import Tensor

Image = Float[Tensor, "b c h w"]
Kernel = Float[Tensor, "d c p q"]
Tokens = Float[Tensor, "b n d"]
Read = Float[Tensor, "b read d"]
Pooled = Float[Tensor, "b d"]
Heads = Float[Tensor, "b heads n e"]
Queries = Float[Tensor, "b heads i e"]
Keys = Float[Tensor, "b heads j e"]
Weights = Float[Tensor, "b heads i j"]
Mask = Bool[Tensor, "b j"]
Logits = Float[Tensor, "b classes"]
Target = Int[Tensor, " b"]
Probabilities = Float[Tensor, "b classes"]

Function = Callable[..., Tensor]
"""A variant that a slot takes: tensors first, knobs by keyword."""
