"""Calls the CUDA form's columns on the host, as the binding calls them on a GPU."""

import ctypes
from pathlib import Path

import torch
from kernel_testing.guarded_memory import GuardedTensor

from tests.ops.host_emulation import DTYPES, TensorView, compile_for_host


KERNEL = Path(__file__).resolve().parents[2] / "kernels" / "sru-recurrence"
GRADIENTS = ("u", "x", "weight_c", "bias", "c0")


class BoolView(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("batch_stride", ctypes.c_int64), ("step_stride", ctypes.c_int64)]


class SruParams(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "length", "width", "parts")),
        *((name, TensorView) for name in ("u", "x", "h", "states")),
        *((name, ctypes.c_void_p) for name in ("weight_c", "bias", "c0", "dropout")),
        *((name, BoolView) for name in ("mask", "document_start")),
        ("scale_x", ctypes.c_double),
        ("tanh", ctypes.c_bool),
        ("reverse", ctypes.c_bool),
    ]


class SruBackwardParams(SruParams):
    _fields_ = [
        *((name, TensorView) for name in ("grad_h", "grad_states", "grad_u", "grad_x")),
        *((name, ctypes.c_void_p) for name in ("grad_weight_c", "grad_bias", "grad_c0", "partial")),
    ]


def compile_emulation(folder, *flags):
    """The columns of the CUDA form, compiled for the host."""
    functions = compile_for_host(Path(__file__).with_name("sru_cuda_emulation.cpp"), KERNEL, folder, *flags)
    functions.sizes_of_params.restype = ctypes.c_int64
    for name in ("last_kernel", "all_kernels"):
        getattr(functions, name).restype = ctypes.c_char_p
    assert functions.sizes_of_params() == ctypes.sizeof(SruParams) * 1000 + ctypes.sizeof(SruBackwardParams)
    return functions


def view_of(tensor) -> TensorView:
    strides = (*tensor.stride()[:-1], 0)[:3]
    return TensorView(tensor.data_ptr(), *strides, DTYPES[tensor.dtype])


class Emulated:
    """A call as the binding makes it, but run on the host."""

    def __init__(self, functions, inputs, options, enough, misaligned):
        self.functions, self.inputs, self.options = functions, inputs, options
        self.enough, self.misaligned, self.kept = enough, misaligned, []
        u = inputs["u"]
        self.batch, self.length, self.parts, self.width = u.shape
        self.state_type = torch.promote_types(u.dtype, torch.float32)

    def place(self, shape, dtype, values=None) -> GuardedTensor:
        self.kept.append(GuardedTensor(shape, dtype, self.misaligned, values))
        return self.kept[-1]

    def given(self, values) -> TensorView:
        return TensorView() if values is None else view_of(self.place(values.shape, values.dtype, values).tensor)

    def parameter(self, name):
        values = self.inputs.get(name)
        return None if values is None else self.place(values.shape, self.state_type, values).tensor.data_ptr()

    def flags(self, name) -> BoolView:
        values = self.inputs.get(name)
        return BoolView() if values is None else BoolView(values.data_ptr(), *values.stride())

    def fill(self, params) -> None:
        params.batch, params.length, params.width, params.parts = self.batch, self.length, self.width, self.parts
        params.u, params.x = self.given(self.inputs["u"]), self.given(self.inputs.get("x"))
        params.weight_c, params.bias, params.c0 = map(self.parameter, ("weight_c", "bias", "c0"))
        params.dropout = self.parameter("dropout_mask")
        params.mask, params.document_start = self.flags("mask"), self.flags("document_start")
        params.scale_x = self.options["scale_x"]
        params.tanh, params.reverse = self.options["activation"] == "tanh", self.options["reverse"]

    def forward(self, h_type):
        return self._forward(h_type, (self.batch, self.length + 1, self.width), lambda states: states)

    def forward_last(self, h_type):
        """One row for all states, as the public `forward_last` gives it."""
        expanded = (self.batch, self.length + 1, self.width)
        return self._forward(h_type, (self.batch, self.width), lambda last: last.unsqueeze(1).expand(expanded))

    def _forward(self, h_type, states_shape, as_states):
        params = SruParams()
        self.fill(params)
        h = self.place((self.batch, self.length, self.width), h_type)
        states = self.place(states_shape, self.state_type)
        params.h, params.states = view_of(h.tensor), view_of(as_states(states.tensor))
        self.functions.emulate_forward(ctypes.byref(params), ctypes.c_int64(self.enough))
        self.kernel = self.functions.last_kernel().decode()
        h.check("h")
        states.check("states")
        return h.tensor, states.tensor

    def backward(self, states, grad_h, grad_states):
        params = SruBackwardParams()
        self.fill(params)
        params.states, params.grad_h, params.grad_states = map(self.given, (states, grad_h, grad_states))
        results = {
            name: self.place(values.shape, values.dtype if name in ("u", "x") else self.state_type)
            for name in GRADIENTS
            if (values := self.inputs.get(name)) is not None
        }
        params.grad_u = view_of(results["u"].tensor)
        if "x" in results:
            params.grad_x = view_of(results["x"].tensor)
        for name in ("weight_c", "bias", "c0"):
            if name in results:
                setattr(params, f"grad_{name}", results[name].tensor.data_ptr())
        params.partial = self.place((self.batch, 4, self.width), self.state_type).tensor.data_ptr()
        self.functions.emulate_backward(ctypes.byref(params), ctypes.c_int64(self.enough))
        self.kernel = self.functions.last_kernel().decode()
        for name, result in results.items():
            result.check(f"gradient of {name}")
        return {name: result.tensor for name, result in results.items()}
