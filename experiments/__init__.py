"""Training programs and recipes; run from the checkout with `python -m experiments.train`."""
