"""Do registers change what a small ViT reaches?

Question: on 10,000 images of CIFAR-10, with the same steps and seeds.
Expect: no difference in classification (Darcet et al. 2024, arXiv:2309.16588, table 2).
Cost: stands in the index of experiments/README.md.
Run: python -m experiments.ablate registers --run --data-root DIR
"""

from experiments.recipes import CIFAR10_SMALL

BASE = CIFAR10_SMALL
AXES = {"model.registers": [1, 4]}
SEEDS = range(10)
METRIC = "val/accuracy"
EFFECT = 0.01
