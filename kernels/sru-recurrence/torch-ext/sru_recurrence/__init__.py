"""SRU's elementwise recurrence as compiled ops for CPUs and CUDA devices.

Sources: Lei et al., "Simple Recurrent Units for Highly Parallelizable Recurrence", EMNLP 2018, arXiv 1709.02755; Lei,
"When Attention Meets Fast Recurrence" (SRU++), EMNLP 2021, arXiv 2102.12459, section 2. In the order of time,

    f_t = sigmoid(u1_t + v_f c_{t-1} + b_f)
    r_t = sigmoid(u2_t + v_r c_{t-1} + b_r)
    c_t = u0_t + (c_{t-1} - u0_t) f_t
    h_t = x'_t + (g(c_t) - x'_t) m r_t

`sru_recurrence` is differentiable, and torch compiles and exports it as one node. `forward` and `backward` are the ops
beneath it. `forward_out` and `backward_out` write to tensors that the caller has, which must overlap nothing that is
read. `forward_last` gives h and the state after the last step, `(batch, width)`, without room for the states between;
it has no gradient. None has a derivative in forward mode (`torch.func.jvp`, dual numbers): there they raise.
"""

from . import layers
from ._ops import ops
from .recurrence import refuse_forward_mode, sru_recurrence


forward = refuse_forward_mode(ops.forward.default)
forward_last = refuse_forward_mode(ops.forward_last.default)
forward_out = refuse_forward_mode(ops.forward_out.default)
backward = refuse_forward_mode(ops.backward.default)
backward_out = refuse_forward_mode(ops.backward_out.default)

__all__ = ["backward", "backward_out", "forward", "forward_last", "forward_out", "layers", "sru_recurrence"]
