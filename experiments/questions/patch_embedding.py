"""Does a convolutional stem beat one linear map a patch?

Question: on 10,000 images of CIFAR-10, with the same steps and seeds.
Expect: better: about 1 to 2 points on ImageNet (Xiao et al. 2021, arXiv:2106.14881).
Cost: stands in the index of experiments/README.md.
Run: python -m experiments.ablate patch_embedding --run --data-root DIR
"""

from experiments.recipes import CIFAR10_SMALL

BASE = CIFAR10_SMALL
AXES = {"model.patchify": ["stem"]}
SEEDS = range(10)
METRIC = "val/accuracy"
EFFECT = 0.01
