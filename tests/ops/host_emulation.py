"""What emulations of CUDA forms on the host share: their compilation, and tensors as their parameters hold them."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch


SHARED = Path(__file__).resolve().parents[2] / "kernels" / "include"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class TensorView(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("step_stride", ctypes.c_int64),
        ("part_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    ]


def compile_for_host(source, kernel, folder, *flags):
    """`source`, which includes headers of a kernel's folder, as a library for ctypes."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    library = folder / "emulation.so"
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    common = ["-std=c++17", "-fPIC", "-shared", *warnings, f"-I{kernel}", f"-I{SHARED}"]
    done = subprocess.run([compiler, *common, *flags, str(source), "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))
