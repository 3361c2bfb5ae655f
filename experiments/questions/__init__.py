"""Questions, one a file: a baseline, what is varied, how the answer is judged."""
