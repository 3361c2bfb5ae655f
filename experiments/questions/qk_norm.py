"""Does normalising queries and keys help a small ViT?

Question: on 10,000 images of CIFAR-10, with the same steps and seeds.
Expect: no difference: it keeps very large ones stable (Dehghani et al. 2023, arXiv:2302.05442).
Cost: stands in the index of experiments/README.md.
Run: python -m experiments.ablate qk_norm --run --data-root DIR
"""

from experiments.recipes import CIFAR10_SMALL

BASE = CIFAR10_SMALL
AXES = {"model.qk_norm": [True]}
SEEDS = range(10)
METRIC = "val/accuracy"
EFFECT = 0.01
