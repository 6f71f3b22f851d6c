"""Calls the CUDA form's columns on the host, as the binding calls them on a GPU."""

import ctypes

import torch


KINDS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
GRADIENTS = ("u", "x", "weight_c", "bias", "c0")
# Entries beside each tensor, in whatever dtype a multiple of the 16 bytes that the widest access has.
GUARD = 16


class Rows(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("step_stride", ctypes.c_int64),
        ("part_stride", ctypes.c_int64),
        ("kind", ctypes.c_int32),
    ]


class Flags(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("batch_stride", ctypes.c_int64), ("step_stride", ctypes.c_int64)]


class Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "length", "width", "parts")),
        *((name, Rows) for name in ("u", "x", "h", "states")),
        *((name, ctypes.c_void_p) for name in ("weight_c", "bias", "c0", "dropout")),
        *((name, Flags) for name in ("mask", "document_start")),
        ("scale_x", ctypes.c_double),
        ("tanh", ctypes.c_bool),
        ("reverse", ctypes.c_bool),
    ]


class BackwardProblem(Problem):
    _fields_ = [
        *((name, Rows) for name in ("grad_h", "grad_states", "grad_u", "grad_x")),
        *((name, ctypes.c_void_p) for name in ("grad_weight_c", "grad_bias", "grad_c0", "partial")),
    ]


class Placed:
    """A tensor inside memory that is full of NaN, which shows what is written beside it."""

    def __init__(self, shape, dtype, misaligned, values=None):
        size = torch.Size(shape).numel()
        first = GUARD + (1 if misaligned else 0)
        self.memory = torch.full((size + 2 * GUARD,), float("nan"), dtype=dtype)
        self.inside = slice(first, first + size)
        self.tensor = self.memory[self.inside].view(shape)
        if values is not None:
            self.tensor.copy_(values)

    def rows(self) -> Rows:
        strides = (*self.tensor.stride()[:-1], 0)[:3]
        return Rows(self.tensor.data_ptr(), *strides, KINDS[self.tensor.dtype])

    def check(self, name: str) -> None:
        outside = self.memory.clone()
        outside[self.inside] = float("nan")
        assert outside.isnan().all(), f"{name}: written outside"


class Emulated:
    """A call as the binding makes it, but run on the host."""

    def __init__(self, functions, inputs, options, enough, misaligned):
        self.functions, self.inputs, self.options = functions, inputs, options
        self.enough, self.misaligned, self.kept = enough, misaligned, []
        u = inputs["u"]
        self.batch, self.length, self.parts, self.width = u.shape
        self.state_type = torch.promote_types(u.dtype, torch.float32)

    def place(self, shape, dtype, values=None) -> Placed:
        self.kept.append(Placed(shape, dtype, self.misaligned, values))
        return self.kept[-1]

    def given(self, values) -> Rows:
        return Rows() if values is None else self.place(values.shape, values.dtype, values).rows()

    def parameter(self, name):
        values = self.inputs.get(name)
        return None if values is None else self.place(values.shape, self.state_type, values).tensor.data_ptr()

    def flags(self, name) -> Flags:
        values = self.inputs.get(name)
        return Flags() if values is None else Flags(values.data_ptr(), *values.stride())

    def fill(self, problem) -> None:
        problem.batch, problem.length, problem.width, problem.parts = self.batch, self.length, self.width, self.parts
        problem.u, problem.x = self.given(self.inputs["u"]), self.given(self.inputs.get("x"))
        problem.weight_c, problem.bias, problem.c0 = map(self.parameter, ("weight_c", "bias", "c0"))
        problem.dropout = self.parameter("dropout_mask")
        problem.mask, problem.document_start = self.flags("mask"), self.flags("document_start")
        problem.scale_x = self.options["scale_x"]
        problem.tanh, problem.reverse = self.options["activation"] == "tanh", self.options["reverse"]

    def forward(self, h_type):
        problem = Problem()
        self.fill(problem)
        h = self.place((self.batch, self.length, self.width), h_type)
        states = self.place((self.batch, self.length + 1, self.width), self.state_type)
        problem.h, problem.states = h.rows(), states.rows()
        self.units = self.functions.emulate_forward(ctypes.byref(problem), ctypes.c_int64(self.enough))
        h.check("h")
        states.check("states")
        return h.tensor, states.tensor

    def backward(self, states, grad_h, grad_states):
        problem = BackwardProblem()
        self.fill(problem)
        problem.states, problem.grad_h, problem.grad_states = map(self.given, (states, grad_h, grad_states))
        results = {
            name: self.place(values.shape, values.dtype if name in ("u", "x") else self.state_type)
            for name in GRADIENTS
            if (values := self.inputs.get(name)) is not None
        }
        problem.grad_u = results["u"].rows()
        if "x" in results:
            problem.grad_x = results["x"].rows()
        for name in ("weight_c", "bias", "c0"):
            if name in results:
                setattr(problem, f"grad_{name}", results[name].tensor.data_ptr())
        problem.partial = self.place((self.batch, 4, self.width), self.state_type).tensor.data_ptr()
        self.units = self.functions.emulate_backward(ctypes.byref(problem), ctypes.c_int64(self.enough))
        for name, result in results.items():
            result.check(f"gradient of {name}")
        return {name: result.tensor for name, result in results.items()}
