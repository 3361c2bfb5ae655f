"""Recipes: named training configurations, each with its question, expectation, cost and command."""

from vitx.config import DataConfig, ModelConfig, OptimConfig, TrainConfig

DIGITS = TrainConfig(
    # Question: how well does a small ViT read 8×8 scans of digits, trained from scratch?
    # Expect: about 99 % test accuracy, at or above an RBF support vector machine on raw pixels.
    # Cost: seconds a seed stand in the accuracy table of benchmarks/README.md.
    # Run: python -m experiments.train digits
    # Patch, learning rate, weight decay, batch and steps were chosen on the validation split with
    # seeds 100 to 501, which no reported result uses.
    model=ModelConfig(
        image=8,
        patch=(4, 2),
        channels=1,
        classes=10,
        width=48,
        depth=3,
        heads=3,
        patchify="unfold",
        init="xavier",
    ),
    data=DataConfig(name="digits", rotate=10.0, scale=0.1, shear=0.1, shift=0.06),
    optim=OptimConfig(lr=4e-3, weight_decay=0.3, warmup_steps=100),
    steps=1300,
    batch=128,
    eval_every=50,
)

RECIPES = {"digits": DIGITS}
