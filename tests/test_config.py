"""Configurations: every wrong value is one sentence that names field, value, rule, choice."""

import pytest

from experiments.recipes import DIGITS
from vitx.data.config import DataConfig
from vitx.model.config import SIZES, ModelConfig, size
from vitx.model.cost import cost, training_macs
from vitx.model.functional.attention import ATTENTION
from vitx.settings import delta, flat, from_flat, nearest_divisors, override
from vitx.training.config import OptimConfig, TrainConfig, identity
from vitx.training.prepare import prepare

pytestmark = pytest.mark.usefixtures("unchecked")

WRONG = [
    ({"patch": 15}, r"model\.patch = 15 does not divide the image height 224; .*14 or 16"),
    ({"image": (224, 230)}, r"model\.patch = 16 does not divide the image width 230; .* 10 or 23"),
    ({"image": (1, 2, 3)}, r"model\.image = \(1, 2, 3\) must be one number or height and width"),
    ({"image": 0}, r"model\.image = 0 must be a whole number, at least 1"),
    ({"heads": 5}, r"model\.heads = 5 does not divide model\.width = 192; .*4 or 6"),
    ({"depth": 0}, r"model\.depth = 0 must be a whole number, at least 1"),
    ({"depth": 2.0}, r"model\.depth = 2\.0 must be a whole number"),
    ({"classes": -1}, r"model\.classes = -1 must be a whole number, at least 0"),
    ({"drop": 1.0}, r"model\.drop = 1\.0 must lie in \[0, 1\)"),
    ({"drop_path": -0.1}, r"model\.drop_path = -0\.1 must lie in \[0, 1\)"),
    ({"layer_scale": -1.0}, r"model\.layer_scale = -1\.0 must be 0 \(none\) or positive"),
    ({"mlp_ratio": 0.001}, r"model\.mlp_ratio = 0\.001 must give the MLP at least one hidden"),
    ({"image": 224.0}, r"model\.image = 224\.0 must be a whole number"),
    ({"drop": "0.1"}, r"model\.drop = '0\.1' must be a finite number"),
    ({"class_token": 1}, r"model\.class_token = 1 must be True or False"),
    ({"mlp_ratio": float("inf")}, r"model\.mlp_ratio = inf must be a finite number"),
    ({"mlp_ratio": float("nan")}, r"model\.mlp_ratio = nan must be a finite number"),
    ({"position_tokens": "patch"}, r"model\.position_tokens = 'patch' .*did you mean 'patches'"),
    ({"qkv_bias": "q"}, r"model\.qkv_bias = 'q' is not known"),
    ({"class_token": False}, r"model\.pool = 'cls' reads the class token.*choose .*'mean'"),
    ({"position": "sincos2d", "width": 198, "heads": 3}, r"needs a model\.width that 4 divides"),
    ({"attention": "spda"}, r"model\.attention = 'spda' is not known; did you mean 'sdpa'"),
    ({"norm": "layernorm(epsilon=1)"}, r"layernorm has no knob 'epsilon'; did you mean 'eps'"),
    ({"norm": "layernorm(eps='a')"}, r"eps must be float, not 'a'"),
    ({"norm": "layernorm(1e-5)"}, r"can't be read; write a name or a call with keywords"),
    ({"norm": "layernorm(eps=x)"}, r"a knob must be a plain value"),
    ({"norm": "layernorm("}, r"can't be read"),
    ({"attention": "sdpa(mask=1)"}, r"sdpa has no knob 'mask'; it has none"),
    ({"attention": "sdpa(drop=0.5)"}, r"sdpa has no knob 'drop'"),
    ({"position": None}, r"model\.position = None is neither a name nor a callable"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_value_is_refused_with_field_value_rule_and_choice(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        ModelConfig(**fields)
    assert "\n" not in str(caught.value)


def digits(**changes):
    return override(DIGITS, **changes)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (DataConfig, {"name": "digit"}, r"data\.name = 'digit' .*did you mean 'digits'"),
        (
            DataConfig,
            {"rotate": 400.0},
            r"data\.rotate = 400\.0 must lie between 0 and 180 degrees",
        ),
        (DataConfig, {"crop": 0.0}, r"data\.crop = 0\.0 must lie in \(0, 1\]"),
        (DataConfig, {"flip": 1.5}, r"data\.flip = 1\.5 must lie in \[0, 1\]"),
        (DataConfig, {"shift": 1.0}, r"data\.shift = 1\.0 must lie in \[0, 1\)"),
        (DataConfig, {"mixup": -1.0}, r"data\.mixup = -1\.0 must be 0 or positive"),
        (
            DataConfig,
            {"split_seed": -1},
            r"data\.split_seed = -1 must be a whole number, at least 0",
        ),
        (
            DataConfig,
            {"split_seed": 2**32},
            r"data\.split_seed = 4294967296 must be less than 2\*\*32",
        ),
        (
            DataConfig,
            {"resize": "crops"},
            r"data\.resize = 'crops' is not known; did you mean 'crop'",
        ),
        (DataConfig, {"workers": True}, r"data\.workers = True must be a whole number, at least 0"),
        (DataConfig, {"drop_last": 0}, r"data\.drop_last = 0 must be True or False"),
        (OptimConfig, {"lr": 0.0}, r"optim\.lr = 0\.0 must be positive"),
        (OptimConfig, {"lr": float("nan")}, r"optim\.lr = nan must be a finite number"),
        (OptimConfig, {"beta2": 1.0}, r"optim\.beta2 = 1\.0 must lie in"),
        (OptimConfig, {"weight_decay": -1.0}, r"optim\.weight_decay = -1\.0 must be 0 or"),
        (digits, {"steps": 0}, r"steps = 0 must be a whole number, at least 1"),
        (digits, {"seed": -1}, r"seed = -1 must be a whole number, at least 0"),
        (digits, {"batch": 2000}, r"batch = 2000 is larger than the training split of 1257"),
        (digits, {"model.classes": 5}, r"model\.classes = 5 does not fit the data set digits"),
        (digits, {"model.image": 16}, r"model\.image = \(16, 16\) does not fit .* \(8, 8\)"),
        (digits, {"model.channels": 3}, r"model\.channels = 3 does not fit .* which has 1"),
    ],
)
def test_training_settings_are_checked_too(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        kind(**fields)


def test_sizes_are_named_and_wrong_ones_refused():
    assert size("S/16").width == 384
    assert size("Nano/4", image=32, classes=10).grid == (8, 8)
    with pytest.raises(ValueError, match=r"size = 'Tii/16' is not known; did you mean 'Ti'"):
        size("Tii/16")
    with pytest.raises(ValueError, match=r"size = 'Ti' needs a patch size"):
        size("Ti")
    with pytest.raises(ValueError, match=r"ModelConfig has no field 'dept'; did you mean 'depth'"):
        size("Ti/16", dept=3)


def test_override_changes_nested_fields_and_refuses_unknown_ones():
    config = override(DIGITS, **{"model.depth": 6, "optim.lr": 0.1, "steps": 7})
    assert (config.model.depth, config.optim.lr, config.steps) == (6, 0.1, 7)
    with pytest.raises(ValueError, match="ModelConfig has no field 'dep'; did you mean 'depth'"):
        override(DIGITS, **{"model.dep": 6})
    with pytest.raises(ValueError, match="TrainConfig has no part 'modle'; did you mean 'model'"):
        override(DIGITS, **{"modle.depth": 6})


def sdpa(q, k, v, *, mask=None, drop=0.0):
    """One of our own, under a name that the registry has too."""
    return v


def test_a_callable_of_ones_own_is_recorded_with_its_module():
    own = ModelConfig(attention=sdpa)
    assert delta(own, ModelConfig()) == {"attention": f"{__name__}.sdpa"}
    assert identity(override(DIGITS, **{"model.attention": sdpa})) != identity(DIGITS)
    with pytest.raises(ValueError, match="can't be read; write a name"):
        from_flat(ModelConfig, flat(own))
    assert flat(ModelConfig(attention=ATTENTION["sdpa"])) == flat(ModelConfig())


def test_a_callable_without_a_name_of_its_own_is_refused():
    """Before it is trained: what is made in a function may share its name with others."""

    def inner(q, k, v, *, mask=None, drop=0.0):
        return v

    for own in ({"attention": inner}, {"mlp": lambda x: x}):
        with pytest.raises(ValueError, match="no name of its own to be recorded by"):
            flat(ModelConfig(**own))
    with pytest.raises(ValueError, match="no name of its own to be recorded by"):
        prepare(override(DIGITS, **{"model.attention": inner}))


@pytest.mark.parametrize(
    "name", ["dep", "model.dep", "modle.depth", "steps.x", "model", "model.depth.x"]
)
def test_a_record_with_an_unknown_field_is_refused(name):
    with pytest.raises(ValueError, match=f"the configuration has an unknown {name}"):
        from_flat(TrainConfig, flat(DIGITS) | {name: 3})


def test_delta_names_what_differs_and_flat_is_plain():
    base = DIGITS
    assert delta(base, base) == {}
    assert delta(override(base, **{"model.depth": 6}), base) == {"model.depth": 6}
    assert all(isinstance(v, int | float | str | list | bool) for v in flat(base).values())


def test_the_released_defaults_have_not_moved():
    """Names and hashes of runs are made from differences to these values: never change one."""
    assert flat(ModelConfig()) == {
        "image": [224, 224], "patch": [16, 16], "channels": 3, "classes": 1000, "width": 192,
        "depth": 12, "heads": 3, "mlp_ratio": 4.0, "class_token": True, "registers": 0,
        "patchify": "conv", "position": "learned", "position_tokens": "all", "attention": "sdpa",
        "qkv_bias": "qkv", "qk_norm": False, "norm": "layernorm",
        "mlp": "gelu", "placement": "pre", "pool": "cls",
        "layer_scale": 0.0, "final_norm": True, "fc_norm": False, "drop": 0.0,
        "attention_drop": 0.0, "position_drop": 0.0, "head_drop": 0.0,
        "drop_path": 0.0, "patch_drop": 0.0,
        "init": "timm",
    }  # fmt: skip


def plain_macs(c):
    """Closed form of a plain ViT that reads the class token only.

    A block of n tokens and width d: 3nd² (qkv) + nd² (proj) + 2ndf (MLP) + 2n²d (attention).
    """
    d, f, n = c.width, c.hidden, c.prefix + c.grid[0] * c.grid[1]
    (p, q), patches = c.patch_size, c.grid[0] * c.grid[1]
    embed = patches * d * c.channels * p * q
    block = n * (4 * d * d + 2 * d * f) + 2 * n * n * d
    last = (2 * n * d * d) + (2 * d * d + 2 * d * f) + 2 * n * d
    return embed + (c.depth - 1) * block + last + d * c.classes


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("patch", [8, 14, 16, 32])
def test_counted_macs_equal_the_closed_form(name, patch):
    config = size(f"{name}/{patch}", image=224)
    assert cost(config).macs == plain_macs(config)


def test_a_training_step_has_two_products_for_each_of_the_forward_pass():
    c = size("Pico/8", image=64)
    embed = 64 * c.width * 3 * 8 * 8  # its input, the image, gets no gradient
    assert training_macs(c) == 3 * cost(c).macs - embed


def test_patch_drop_makes_training_cheaper_and_not_the_forward_pass():
    c = size("Pico/8", image=64, pool="mean", class_token=False)
    half = override(c, patch_drop=0.5)
    assert cost(half).macs == cost(c).macs
    dropped = 2 * 32 * c.width * 3 * 8 * 8  # embedded all the same, and the kernel's gradient
    assert training_macs(half) == training_macs(override(c, image=(64, 32))) + dropped


@pytest.mark.parametrize(
    ("name", "parameters"), [("Ti", 5_717_416), ("S", 22_050_664), ("B", 86_567_656)]
)
def test_named_sizes_have_the_published_parameters(name, parameters):
    assert cost(size(f"{name}/16")).parameters == parameters


@pytest.mark.parametrize(("name", "gflop"), [("tiny", 2.507), ("small", 9.198), ("base", 35.128)])
def test_timm_counts_match_the_reference_values(name, gflop):
    import timm
    import torch

    from vitx.model.cost import forward_macs

    with torch.device("meta"):
        model = timm.create_model(f"vit_{name}_patch16_224")
    image = torch.empty(1, 3, 224, 224, device="meta")
    assert 2 * forward_macs(model, image) / 1e9 == pytest.approx(gflop, abs=0.0006)


def test_small_sizes_lie_between_0_1_and_4_million_parameters():
    for name, pixels in (("Pico", 8), ("Nano", 28), ("Micro", 32)):
        parameters = cost(size(f"{name}/4", image=pixels, classes=10)).parameters
        assert 1e5 <= parameters <= 4.1e6


@pytest.mark.parametrize(
    ("number", "near", "words"),
    [(48, 5, "4 or 6"), (48, 1, "2"), (48, 48, "24"), (7, 3, "1 or 7"), (12, 100, "12"),
     (10**20 - 1, 7, "3 or 9"), (48, 10**20, "48")],
)  # fmt: skip
def test_the_nearest_divisors_of_any_number_are_found_at_once(number, near, words):
    assert nearest_divisors(number, near) == words
