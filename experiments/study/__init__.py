"""How an answer is made: questions, runs, workers, sweeps, results and their tables."""
