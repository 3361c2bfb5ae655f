"""vitx against timm: equality, speed, accuracy, report. `python -m benchmarks` runs it all."""
