"""What does leaving out half of the patches in training cost, and save?

Question: on 45,000 images of CIFAR-10, with the same steps and seeds.
Expect: little lost for half the work (Liu et al. 2022, arXiv:2208.07220).
Cost: stands in the index of experiments/README.md; 16 runs of 1,600 steps.
Run: python -m experiments.ablate patch_drop --run --data-root DIR
"""

from experiments.recipes import CIFAR10
from vitx.settings import override

BASE = override(CIFAR10, steps=1_600, **{"model.patch_drop": 0.0})
AXES = {"model.patch_drop": [0.5]}
METRIC = "val/accuracy"
EFFECT = 0.01
