"""Does the tanh approximation of GELU matter?

Question: on 10,000 images of CIFAR-10, with the same steps and seeds.
Expect: no difference: the functions are less than 0.001 apart (Hendrycks and Gimpel 2016,
    arXiv:1606.08415).
Cost: stands in the index of experiments/README.md.
Run: python -m experiments.ablate activation --run --data-root DIR
"""

from experiments.recipes import CIFAR10_SMALL

BASE = CIFAR10_SMALL
AXES = {"model.mlp": ["gelu_tanh"]}
SEEDS = range(10)
METRIC = "val/accuracy"
EFFECT = 0.01
