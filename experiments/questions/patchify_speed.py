"""Is the patch embedding faster as a convolution or as patches and one matrix product?

Question: the same function, timed in a training step; nothing is trained.
Expect: it depends on the device; the two are checked equal in the tests.
Cost: stands in the index of experiments/README.md.
Run: python -m experiments.ablate patchify_speed --run
"""

from experiments.recipes import CIFAR10_SMALL

BASE = CIFAR10_SMALL
AXES = {"model.patchify": ["unfold"]}
METRIC = "images_per_s"
