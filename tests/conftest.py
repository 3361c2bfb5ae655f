"""Fixtures that several files use: the device, runtime shape checks off for compiled code."""

import os
import time

import jaxtyping
import pytest
import torch

os.environ.setdefault("WANDB_MODE", "offline")
torch.set_num_threads(1)  # the tests' tensors are small: a second thread only adds waiting


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device of the tests, such as cuda")


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    """The device that tests put their tensors on."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def unchecked():
    """A test without run-time shape and type checks, as users run the package."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def compiled(unchecked):
    """A test that compiles: shape checks and torch.compile do not mix."""
    from vitx.model.compiler import cpp_compiler

    if cpp_compiler() is None:
        pytest.skip("torch.compile needs a C++ compiler on the CPU, and none was found")
    torch.compiler.reset()
    yield
    torch.compiler.set_stance("default")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def record():
    """Adds a result of counts to those of the campaign."""
    from experiments.study.kinds import Fault
    from experiments.study.pages import ROOT
    from experiments.study.results import Results

    results = None

    def add(fault: str, **counts: int) -> None:
        nonlocal results
        folder = ROOT / "runs" / "campaign" / time.strftime("%Y%m%d-%H%M%S-campaign")
        results = results or Results(folder)
        results.add(Fault, fault=fault, **counts)

    return add
