"""Can keys be weighed each by itself, without competing in a softmax?

Question: on 10,000 images of CIFAR-10, with the same steps and seeds.
Expect: as good (Ramapuram et al. 2024, arXiv:2409.04431).
Cost: stands in the index of experiments/README.md.
Run: python -m experiments.ablate sigmoid_attention --run --data-root DIR
"""

from experiments.recipes import CIFAR10_SMALL

BASE = CIFAR10_SMALL
AXES = {"model.attention": ["sigmoid"]}
SEEDS = range(10)
METRIC = "val/accuracy"
EFFECT = 0.01
