"""Which implementation runs, who decides it, and what is said when the one asked for is missing."""

import importlib.util
import logging
import sys
import threading
import types

import pytest
import torch

from hf_efficient.ops import backend, kernel_loader, position_bias
from hf_efficient.ops.backend import BackendUnavailableError, last_backend, register_op, select, use_backend


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def make_op(monkeypatch):
    """`make_op(**loaders)` registers the op "test_op" for one test; its loaders are counted in `calls`."""
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(backend, "_ops", dict(backend._ops))

    def make(**loaders):
        calls = []

        def counted(name, loader):
            def load():
                calls.append(name)
                return loader()

            return load

        backend._ops.pop("test_op", None)
        register_op("test_op", reference, {name: counted(name, loader) for name, loader in loaders.items()})
        return calls

    return make


def reference():
    return "in torch"


def kernel():
    return "compiled"


def missing():
    raise ImportError("libnothing.so is not built")


def test_auto_takes_the_kernel_of_the_device(make_op):
    calls = make_op(cpu=lambda: kernel)
    assert last_backend("test_op") is None
    assert not calls  # nothing is loaded before it is wanted
    assert select("test_op", CPU) is kernel
    assert last_backend("test_op") == "cpu"
    assert select("test_op", CUDA) is reference
    assert last_backend("test_op") == "reference"
    assert select("test_op", CPU) is kernel
    assert calls == ["cpu"]


def test_context_beats_environment_beats_auto(make_op, monkeypatch):
    make_op(cpu=lambda: kernel)
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "reference")
    assert select("test_op", CPU) is reference
    with use_backend("cpu"):
        assert select("test_op", CPU) is kernel
        with use_backend("reference"):
            assert select("test_op", CPU) is reference
            with use_backend("auto"):
                assert select("test_op", CPU) is kernel
        assert select("test_op", CPU) is kernel
    with pytest.raises(RuntimeError, match="left by an error"), use_backend("cpu"):
        raise RuntimeError("left by an error")
    assert select("test_op", CPU) is reference


def test_a_choice_is_not_seen_by_other_threads(make_op):
    make_op(cpu=lambda: kernel)
    seen = {}
    inside, done = threading.Event(), threading.Event()

    def worker():
        with use_backend("reference"):
            inside.set()
            done.wait(10)
            seen["worker"] = select("test_op", CPU)

    thread = threading.Thread(target=worker)
    thread.start()
    assert inside.wait(10)
    seen["main"] = select("test_op", CPU)
    done.set()
    thread.join()
    assert seen == {"main": kernel, "worker": reference}


def test_unknown_names_are_refused(make_op, monkeypatch):
    make_op()
    with (
        pytest.raises(ValueError, match=r"use_backend's argument is 'gpu'.*auto, reference, cpu, cuda"),
        use_backend("gpu"),
    ):
        pass
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "triton")
    with pytest.raises(ValueError, match=r"HF_EFFICIENT_BACKEND is 'triton'.*auto, reference, cpu, cuda"):
        select("test_op", CPU)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_a_missing_backend_asked_for_by_name_raises(make_op, name):
    make_op()
    with use_backend(name), pytest.raises(BackendUnavailableError, match=f"no '{name}' kernel.*Use backend 'auto'"):
        select("test_op", CPU)
    make_op(**{name: missing})
    with use_backend(name), pytest.raises(BackendUnavailableError, match=r"libnothing.so.*python kernels/build.py"):
        select("test_op", CPU)
    assert last_backend("test_op") is None


def test_a_backend_of_another_device_is_refused(make_op):
    make_op(cuda=lambda: kernel)
    with use_backend("cuda"), pytest.raises(BackendUnavailableError, match="by 'cuda', but its tensors are on cpu"):
        select("test_op", CPU)
    with use_backend("cuda"):
        assert select("test_op", torch.device("meta")) is kernel


def test_the_first_registration_stays(make_op):
    make_op()
    register_op("test_op", kernel)
    assert select("test_op", CPU) is reference


def test_the_op_that_exists_has_no_kernel_and_says_so():
    query = torch.zeros(1, 2, 3)
    with use_backend("cpu"), pytest.raises(BackendUnavailableError, match="'untied_position_bias' has no 'cpu' kernel"):
        position_bias.untied_position_bias(query, query, scale=1.0)


def test_fallback_is_said_once_and_the_loader_is_not_tried_again(make_op, caplog):
    calls = make_op(cpu=missing)
    with caplog.at_level(logging.WARNING, logger=backend.__name__):
        for _ in range(3):
            assert select("test_op", CPU) is reference
            assert last_backend("test_op") == "reference"
    (record,) = caplog.records
    assert "libnothing.so is not built" in record.getMessage()
    assert "python kernels/build.py" in record.getMessage()
    with use_backend("cpu"), pytest.raises(BackendUnavailableError):
        select("test_op", CPU)
    assert calls == ["cpu"]


def test_an_op_without_kernels_falls_back_in_silence(make_op, caplog):
    make_op()
    with caplog.at_level(logging.DEBUG):
        assert select("test_op", CPU) is reference
    assert not caplog.records


def test_a_bug_in_a_loader_is_not_taken_for_a_missing_kernel(make_op):
    def broken():
        raise ZeroDivisionError

    make_op(cpu=broken)
    with pytest.raises(ZeroDivisionError):
        select("test_op", CPU)


def test_the_same_code_under_another_name_shares_the_op(monkeypatch):
    """As when a checkpoint with its own copy of the code is loaded beside the installed package."""
    package = "remote_copy_of_ops"
    monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    for module in (kernel_loader, backend, position_bias):
        name = f"{package}.{module.__name__.rpartition('.')[2]}"
        spec = importlib.util.spec_from_file_location(name, module.__file__)
        copy = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, copy)
        spec.loader.exec_module(copy)
    assert copy.untied_position_bias is not position_bias.untied_position_bias
    query, key = torch.randn(2, 3, 7, 5, requires_grad=True)
    for function in (position_bias.untied_position_bias, copy.untied_position_bias):
        with use_backend("reference"):
            bias = function(query, key, scale=0.3)
        (gradient,) = torch.autograd.grad(bias.square().sum(), query)
        assert torch.allclose(bias, 0.3 * query @ key.mT, atol=1e-6)
        assert torch.allclose(gradient, 0.6 * bias @ key, atol=1e-5)
    # The choice and the record are the process's
    other = sys.modules[f"{package}.backend"]
    with other.use_backend("cuda"):
        assert backend.requested_backend() == "cuda"
    with use_backend("reference"):
        position_bias.untied_position_bias(query, key, scale=0.3)
    assert other.last_backend("untied_position_bias") == last_backend("untied_position_bias") == "reference"
