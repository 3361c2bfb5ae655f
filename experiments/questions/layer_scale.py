"""Does layer scale help a shallow ViT?

Question: on 10,000 images of CIFAR-10, with the same steps and seeds.
Expect: no difference: it is meant for deep ones (Touvron et al. 2021, arXiv:2103.17239).
Cost: stands in the index of experiments/README.md.
Run: python -m experiments.ablate layer_scale --run --data-root DIR
"""

from experiments.recipes import CIFAR10_SMALL

BASE = CIFAR10_SMALL
AXES = {"model.layer_scale": [0.1, 1e-4]}
SEEDS = range(10)
METRIC = "val/accuracy"
EFFECT = 0.01
