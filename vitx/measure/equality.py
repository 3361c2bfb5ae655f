"""Do two modules compute the same function? Every parameter is randomised first, in float64.

Default initial values hide bugs (a zero bias can be dropped, a unit gain skipped), and weights that
make attention one-hot hide others; `randomise` does neither.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitx.registry import UserError

TOLERANCE = 1e-10
"""Largest relative difference of outputs and gradients in float64."""

ENTROPY_RANGE = (0.20, 0.98)
"""Mean attention entropy as a share of log n: outside it the check would be blind."""

TIMED_LIMIT = 2.0
"""Largest error of the candidate in the timed dtype, in errors of the reference."""

EXACT = 1e-13
"""Least error in the timed dtype: below it lies what the order of sums does in float64."""

SMALLEST = 1e-5
"""Gradients below this share of the largest are measured against that share: some are zero by
algebra, as of a key's bias, and what is seen of them is the rounding of the others."""

LEAST_VALUES = 1000
"""Output values that the error in the timed dtype is taken over."""
AT_ONCE = 8
"""Images that the float64 side of that error computes at once: of a batch that fits as it is timed,
the activations in float64 need not."""
BATCHED = nn.modules.batchnorm._BatchNorm
"""Modules in which the images of a batch depend on each other."""

Convert = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""From a module's weights to those of another that computes the same; linear, so that it turns the
gradients of the one into those of the other too."""
Keys = Mapping[str, str] | Convert
"""How names of two modules go together: new names where they differ, or a conversion."""

_FUSED_QKV = re.compile(r"(^|[._])(qkv|in_proj)([._]|$)")
_QUERY_KEY = re.compile(r"(^|[._])(q|k|query|key|w_q|w_k|q_proj|k_proj)([._]|$)")


class Unmatched(UserError):
    """The weights of one module can't be put into the other."""


@dataclass(frozen=True)
class Equality:
    """What was compared, the errors, and whether they lie within the tolerance."""

    passed: bool
    reason: str
    output_error: float
    gradient_error: float
    worst_gradient: str
    gradients: int
    entropy: float | None
    """Mean attention entropy of the reference over log n; None if it used no fused attention."""
    parameters_reference: int
    parameters_candidate: int

    def __str__(self) -> str:
        entropy = "not seen" if self.entropy is None else f"{self.entropy:.0%} of log n"
        verdict = "equal" if self.passed else f"NOT EQUAL: {self.reason}"
        return (
            f"{verdict}; float64 outputs differ by {self.output_error:.1e}, {self.gradients} "
            f"gradients by {self.gradient_error:.1e} (relative); attention entropy {entropy}; "
            f"parameters {self.parameters_reference:,} and {self.parameters_candidate:,}"
        )


def equality(
    reference: nn.Module,
    candidate: nn.Module,
    example: Tensor,
    *,
    keys: Keys | None = None,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> Equality:
    """Compare outputs and all parameter gradients of two modules in float64 on `example`.

    Copies in evaluation mode are compared; the originals are untouched. A device without float64
    (MPS) is left out: the copies are then on the CPU. `keys` maps a state-dict name of the
    reference to the candidate's where they differ, or converts one state dict into the other. The
    error of a tensor is
    max|Δ| / max(max|ref|, SMALLEST · the largest max|ref| among all gradients), and an output's
    is max|Δ| / max|ref|. Raises Unmatched when the state dicts can't be matched, and ValueError
    where there is nothing to compare: no image, no parameter, no gradients, no tensor as output.
    """
    if not len(example):
        raise UserError("example holds no image")
    if not torch.is_grad_enabled():
        raise UserError("gradients can't be compared within torch.no_grad or inference_mode")
    device = exact_device(example)
    a, b = (
        deepcopy(model).to(device).double().eval().requires_grad_(True)
        for model in (reference, candidate)
    )
    randomise(a, seed=seed)
    convert = as_conversion(keys)
    copy_weights(a, b, keys)
    image = example.detach().to(device).double()
    _refuse_other_parameters(a, b, convert)
    with _Entropy() as seen:
        out_a, grads_a = _outputs_and_gradients(a, image, seed)
    out_b, grads_b = _outputs_and_gradients(b, image, seed)
    if out_a.shape != out_b.shape:
        raise UserError(f"outputs are {tuple(out_a.shape)} and {tuple(out_b.shape)}")
    entropy = seen.mean()
    output_error = _largest(out_b - out_a) / max(_largest(out_a), 1e-300)
    expected = convert(grads_a)
    floor = SMALLEST * max(map(_largest, expected.values()))
    errors = {
        name: _largest(grads_b[name] - grad) / max(_largest(grad), floor, 1e-300)
        for name, grad in expected.items()
    }
    worst = max(errors, key=lambda name: _nan_first(errors[name]))
    reason = _reason(output_error, errors[worst], worst, entropy, tolerance)
    return Equality(
        passed=not reason,
        reason=reason,
        output_error=output_error,
        gradient_error=errors[worst],
        worst_gradient=worst,
        gradients=len(errors),
        entropy=entropy,
        parameters_reference=sum(p.numel() for p in a.parameters()),
        parameters_candidate=sum(p.numel() for p in b.parameters()),
    )


@torch.no_grad()
def randomise(model: nn.Module, *, seed: int = 0) -> None:
    """Fill every parameter in place so that each one matters and attention stays spread.

    Matrices and kernels N(0, 1/fan_in), query and key rows N(0, 2/fan_in), gains 1 + 0.3 N(0, 1),
    biases, tokens, positions and layer scale 0.3 N(0, 1).
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        leaf = name.rpartition(".")[2]
        if leaf.endswith("weight") and len(shape) >= 2:
            noise /= math.sqrt(math.prod(shape[1:]))
            if _FUSED_QKV.search(name):
                noise[: 2 * shape[0] // 3] *= math.sqrt(2)
            elif _QUERY_KEY.search(name):
                noise *= math.sqrt(2)
        elif leaf == "weight":
            noise = 1 + 0.3 * noise
        else:
            noise *= 0.3
        parameter.copy_(noise)


def as_conversion(keys: Keys | None) -> Convert:
    """The conversion that `keys` stands for."""
    return keys if callable(keys) else partial(_rename, keys or {})


def _rename(keys: Mapping[str, str], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {keys.get(name, name): value for name, value in state.items()}


def copy_weights(reference: nn.Module, candidate: nn.Module, keys: Keys | None) -> None:
    """Load the reference's state dict into the candidate, strictly.

    Raises Unmatched naming what does not match.
    """
    before, after = reference.state_dict(), candidate.state_dict()
    if isinstance(keys, Mapping):
        _check_names(keys, before)
    state = as_conversion(keys)(before)
    lacks = {"candidate": state.keys() - after.keys(), "reference": after.keys() - state.keys()}
    reasons = [
        f"the {side} lacks {', '.join(sorted(names)[:3])}{' …' if len(names) > 3 else ''}"
        for side, names in lacks.items()
        if names
    ]
    if reasons:
        raise Unmatched(f"the state dicts do not match: {'; '.join(reasons)}")
    for name, value in state.items():
        if value.shape != after[name].shape:
            raise Unmatched(
                f"the state dicts do not match: {name} is {tuple(value.shape)} in the reference, "
                f"{tuple(after[name].shape)} in the candidate"
            )
    candidate.load_state_dict(state)


def _check_names(keys: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
    if strangers := sorted(keys.keys() - state.keys()):
        raise UserError(
            f"the state dicts do not match: keys names what the reference has not: {strangers[0]}"
        )
    if len({keys.get(name, name) for name in state}) < len(state):
        raise UserError("keys gives two names of the reference the same name in the candidate")


def exact_device(example: Tensor) -> torch.device:
    """The example's device, or the CPU where that has no float64."""
    return torch.device("cpu") if example.device.type == "mps" else example.device


def _refuse_other_parameters(a: nn.Module, b: nn.Module, convert: Convert) -> None:
    ours = convert({name: value.detach() for name, value in a.named_parameters()})
    odd = sorted(ours.keys() ^ dict(b.named_parameters()).keys())
    if odd:
        raise Unmatched(
            f"{odd[0]} is a parameter of one module and a buffer, or tied to another, in the other"
        )


def timed_error(
    reference: nn.Module,
    model: nn.Module,
    example: Tensor,
    *,
    training: bool,
    run: Callable[[Tensor], Tensor],
    keys: Keys | None = None,
    seed: int = 0,
) -> float:
    """Relative root-mean-square error of `model`, as it is timed, to the reference in float64.

    `run` is the model as the timing calls it, compiled or not. Both get the same randomised
    weights, the model in place, so give a copy of one that is needed later; `keys` are those of
    `equality`. In inference the error is over at least 1,000 output values
    (of further random images where the example gives fewer); in training over all gradients
    together.
    """
    device = exact_device(example)
    exact = deepcopy(reference).requires_grad_(True)
    randomise(exact, seed=seed)
    copy_weights(exact, model.requires_grad_(True), keys)
    exact.to(device).double().train(training)
    model.train(training)
    if training:
        _refuse_randomness(exact, example[:AT_ONCE].to(device).double())
    images = _enough_images(exact, example.to(device), training, seed)
    convert = as_conversion(keys)
    alone = not any(isinstance(module, BATCHED) for module in exact.modules())
    most = AT_ONCE if alone else len(example)
    truth = torch.cat(
        [_values(exact, exact, image.double(), training, seed, convert, most) for image in images]
    )
    values = torch.cat([_values(run, model, image.to(example), training, seed) for image in images])
    difference = values.to(device) - truth
    return max((difference.square().mean() / truth.square().mean()).sqrt().item(), EXACT)


def _refuse_randomness(model: nn.Module, image: Tensor) -> None:
    with torch.no_grad():
        if not torch.equal(model(image), model(image)):
            raise UserError(
                "the model draws random numbers in training, so its error can't be measured; "
                "set its dropout and drop-path rates to 0"
            )


def _enough_images(exact: nn.Module, example: Tensor, training: bool, seed: int) -> list[Tensor]:
    if training:
        return [example]
    with torch.no_grad():
        values = len(example) * exact(example[:1].double()).numel()
    generator = torch.Generator().manual_seed(seed)
    more = [
        torch.randn(example.shape, generator=generator).to(example)
        for _ in range(math.ceil(LEAST_VALUES / values) - 1)
    ]
    return [example, *more]


def _values(
    run: Callable[[Tensor], Tensor],
    model: nn.Module,
    image: Tensor,
    training: bool,
    seed: int,
    convert: Convert = dict,
    most: int | None = None,
) -> Tensor:
    """Outputs, or all gradients after `convert` in the order of their names.

    Of at most so many images at once.
    """
    if not training:
        with torch.inference_mode():
            outputs = torch.cat([run(part) for part in image.split(most or len(image))])
            return rearrange(_exact(outputs), "... -> (...)")
    grads = convert(_outputs_and_gradients(model, image, seed, run, most)[1])
    return torch.cat([rearrange(_exact(grads[name]), "... -> (...)") for name in sorted(grads)])


def _exact(value: Tensor) -> Tensor:
    return value.to(exact_device(value)).double()


def _outputs_and_gradients(
    model: nn.Module,
    image: Tensor,
    seed: int,
    run: Callable[[Tensor], Tensor] | None = None,
    most: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs, and the gradients of a random linear function of them, at most so many at once."""
    names, parameters = list(dict(model.named_parameters())), list(model.parameters())
    if not parameters:
        raise UserError(f"{type(model).__name__} has no parameter")
    cotangents, outputs = torch.empty(0), []
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for part in image.split(most or len(image)):
        out = model(part) if run is None else run(part)
        if not isinstance(out, Tensor) or not out.ndim:
            raise UserError(f"{type(model).__name__} gives no tensor with an output an image")
        if not outputs:
            shape = out.shape if len(part) == len(image) else (len(image), *out.shape[1:])
            generator = torch.Generator().manual_seed(seed + 1)
            cotangents = torch.randn(shape, generator=generator, dtype=torch.float64).to(out)
        start = sum(map(len, outputs))
        cotangent = cotangents[start : start + len(out)]
        grads = torch.autograd.grad(out, parameters, cotangent, allow_unused=True)
        total = [
            before if grad is None else before + grad
            for before, grad in zip(total, grads, strict=True)
        ]
        outputs.append(out.detach())
    return torch.cat(outputs), dict(zip(names, total, strict=True))


def _reason(output: float, gradient: float, worst: str, entropy: float | None, limit: float) -> str:
    # Written with `not <=` so that NaN fails.
    if not output <= limit:
        return f"outputs differ by {output:.1e}, more than {limit:.0e}"
    if not gradient <= limit:
        return f"the gradient of {worst} differs by {gradient:.1e}, more than {limit:.0e}"
    low, high = ENTROPY_RANGE
    if entropy is not None and not low <= entropy <= high:
        return f"attention entropy {entropy:.0%} of log n is outside {low:.0%} to {high:.0%}"
    return ""


def _largest(value: Tensor) -> float:
    return value.abs().max().item() if value.numel() else 0.0


def _nan_first(value: float) -> float:
    return math.inf if math.isnan(value) else value


def largest(errors: Iterable[float]) -> float:
    """The largest; one that is undefined counts as infinite, where `max` would pass it over."""
    return max(map(_nan_first, errors))


class _Entropy(TorchFunctionMode):
    """Records the entropy of every fused attention call, as a share of the log of its keys."""

    def __init__(self):
        super().__init__()
        self.shares: list[float] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            with torch.no_grad():
                self._record(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _record(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
                enable_gqa=False) -> None:  # fmt: skip
        # Of a masked or grouped call the plain entropy would say nothing.
        if attn_mask is not None or is_causal or enable_gqa or key.shape[-2] == 1:
            return
        scores = query @ key.mT * (scale or query.shape[-1] ** -0.5)
        log = scores.log_softmax(dim=-1)
        entropy = -(log.exp() * log).sum(dim=-1).mean().item()
        self.shares.append(entropy / math.log(key.shape[-2]))

    def mean(self) -> float | None:
        return sum(self.shares) / len(self.shares) if self.shares else None
