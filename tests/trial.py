"""A trial that trains nothing: it leaves the files of a run in a moment, as a sweep's program does.

`python tests/trial.py [--wait=SECONDS] [--x=NUMBER] [--bad=True] [--final=WORD]`: loss x²,
x² + 1 at first.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

given = dict(word.removeprefix("--").split("=") for word in sys.argv[1:])
x, wait = float(given.get("x", 0)), float(given.get("wait", 0))
group, name = os.environ["WANDB_RUN_GROUP"], os.environ["WANDB_RUN_ID"]
folder = Path(os.environ["VITX_OUT"], group, f"x={x}-{name}")
folder.mkdir(parents=True)
if given.get("bad") == "True":
    sys.exit("the trial went wrong")
with (folder / "metrics.jsonl").open("w") as file:
    for step in range(1, 9):
        time.sleep(wait / 8)
        file.write(json.dumps({"step": step, "loss": x**2 + (8 - step) / 7}) + "\n")
        file.flush()
final = {"undefined": float("nan"), "word": "word"}.get(given.get("final", ""), x**2)
(folder / "summary.json").write_text(json.dumps({"loss": final}))
if given.get("final") == "none":
    shutil.rmtree(folder)
with Path(os.environ["VITX_OUT"], "finished").open("a") as file:
    file.write(f"{x}\n")
