"""Whether torch.compile can work on this machine."""

import shutil

import torch

from vitx.registry import UserError


def cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile finds on this machine for the CPU, or None."""
    from torch._inductor import config

    paths = (shutil.which(name) for name in config.cpp.cxx if name)
    return next(filter(None, paths), None)


def needs_compiler(device: torch.device | str) -> None:
    """ValueError if compiling for the device takes a C++ compiler and none is found."""
    if torch.device(device).type == "cpu" and not cpp_compiler():
        raise UserError("torch.compile needs a C++ compiler on the CPU, and none was found")
