"""Is normalising after the residual addition worse than before the branch?

Question: on 10,000 images of CIFAR-10, with the same steps and seeds.
Expect: worse without a long warm-up (Xiong et al. 2020, arXiv:2002.04745); the from-scratch
    Places365 notebook normalises after.
Cost: stands in the index of experiments/README.md.
Run: python -m experiments.ablate norm_placement --run --data-root DIR
"""

from experiments.recipes import CIFAR10_SMALL

BASE = CIFAR10_SMALL
AXES = {"model.placement": ["post"]}
SEEDS = range(10)
METRIC = "val/accuracy"
EFFECT = 0.01
