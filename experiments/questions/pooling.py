"""Is the mean over patches better than a class token?

Question: on 10,000 images of CIFAR-10, with the same steps and seeds.
Expect: a little better (Beyer et al. 2022, arXiv:2205.01580).
Cost: stands in the index of experiments/README.md.
Run: python -m experiments.ablate pooling --run --data-root DIR
"""

from experiments.recipes import CIFAR10_SMALL

BASE = CIFAR10_SMALL
AXES = {"pool": {"mean": {"model.pool": "mean", "model.class_token": False}}}
SEEDS = range(10)
METRIC = "val/accuracy"
EFFECT = 0.01
