"""What a number depends on besides its configuration: commit, versions, machine, settings."""

import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vitx.training.config import RECIPE_VERSION

CODE = ("vitx", "experiments", "benchmarks", ":!benchmarks/results")
"""What makes results, in git's words: with a change or a new file there, a run is dirty."""
PACKAGES = ("torch", "torchvision", "timm", "einops", "numpy", "scikit-learn", "wandb",
            "transformers", "vit-pytorch")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What a number depends on besides its configuration. Empty or None: not known."""

    time: str
    """UTC, at the start."""
    command: str = ""
    commit: str | None
    version: str = ""
    """What decides which values a configuration trains to, as `version` says."""
    dirty: bool
    """Whether code was not committed, or lies in no checkout."""
    python: str
    versions: dict[str, str | None]
    """Of packages, by their names."""
    cuda: str | None = None
    cudnn: int | None = None
    gpu: str | None = None
    cpu: str
    cpu_id: str = ""
    """Family, model and stepping."""
    cores: int | None = None
    affinity: int | None = None
    """Cores that this process may use."""
    threads: int | None = None
    matmul_precision: str = ""
    system: str = ""
    load: float | None = None
    before: tuple[dict[str, Any], ...] = ()
    """Where a run was at work before it was resumed."""


def environment() -> Environment:
    """The environment of this process, now."""
    cuda = torch.cuda.is_available()
    return Environment(
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        command=" ".join(["python", *_command()]),
        commit=git("rev-parse", "HEAD"),
        version=version(),
        dirty=git("status", "--porcelain", "--untracked-files=all", "--", *CODE) != "",
        python=platform.python_version(),
        versions={name: _version(name) for name in PACKAGES},
        cuda=torch.version.cuda if cuda else None,
        cudnn=torch.backends.cudnn.version() if cuda else None,
        gpu=torch.cuda.get_device_name() if cuda else None,
        cpu=_cpu("model name") or platform.processor(),
        cpu_id="/".join(_cpu(name) for name in ("cpu family", "model", "stepping")),
        cores=os.cpu_count(),
        affinity=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        threads=torch.get_num_threads(),
        matmul_precision=_matmul_precision(),
        system=f"{platform.system()} {platform.machine()}",
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


def _matmul_precision() -> str:
    """The precision of float32 products, by whichever of PyTorch's two interfaces it was set."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the older one can't tell what the newer one set
        cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        return f"cuda {cuda.fp32_precision}, cpu {cpu.fp32_precision}"


def _command() -> list[str]:
    """The command line as a person types it, without the folders of this machine."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec else None
    words = [re.sub(r"(^|=)/\S*/", r"\1", word) for word in sys.argv[1:]]
    return ["-m", module, *words] if module else [Path(sys.argv[0]).name, *words]


def git(*words: str) -> str | None:
    """The output of git in the checkout that this package was imported from; None outside of one.

    An installed package may lie in some other project's checkout, which is not asked.
    """
    folder = Path(__file__).resolve().parents[2]
    top = _git(folder, "rev-parse", "--show-toplevel")
    return _git(folder, *words) if top and Path(top).resolve() == folder else None


def _git(folder: Path, *words: str) -> str | None:
    # A hook of git sets variables that would name another repository.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), *words]
    how = {"capture_output": True, "encoding": "utf8", "errors": "replace", "env": clean}
    try:
        done = subprocess.run(command, **how)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def version() -> str:
    """What decides which values a configuration trains to, beside the machine."""
    return f"recipe {RECIPE_VERSION}, torch {_version('torch')}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu(field: str) -> str:
    """A field of the first core in /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    pairs = (line.partition(":")[::2] for line in lines)
    return next((value.strip() for name, value in pairs if name.strip() == field), "")
