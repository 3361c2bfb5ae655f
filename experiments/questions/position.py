"""What do learned positions gain over fixed ones, and over none?

Question: on 10,000 images of CIFAR-10, with the same steps and seeds.
Expect: none is worse, by 3 points on 5-shot ImageNet (Dosovitskiy et al. 2021, arXiv:2010.11929,
    table 8); fixed ones are as good (Beyer et al. 2022, arXiv:2205.01580).
Cost: stands in the index of experiments/README.md.
Run: python -m experiments.ablate position --run --data-root DIR
"""

from experiments.recipes import CIFAR10_SMALL

BASE = CIFAR10_SMALL
AXES = {"model.position": ["sincos2d", "none"]}
SEEDS = range(10)
METRIC = "val/accuracy"
EFFECT = 0.01
