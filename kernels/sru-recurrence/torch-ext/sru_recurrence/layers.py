"""Layers that the `kernels` library puts in place of a model's own."""

from torch import Tensor, nn

from . import recurrence


class SruRecurrence(nn.Module):
    """The recurrence as a module without parameters: [`sru_recurrence`], or, where not all states are wanted, with the
    last one alone, `(batch, 1, width)`."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self, u: Tensor, x: Tensor | None = None, weight_c: Tensor | None = None, bias: Tensor | None = None,
        c0: Tensor | None = None, mask: Tensor | None = None, document_start: Tensor | None = None,
        dropout_mask: Tensor | None = None, scale_x: float = 1.0, activation: str = "identity",
        reverse: bool = False, all_states: bool = True,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        arguments = (u, x, weight_c, bias, c0, mask, document_start, dropout_mask, scale_x, activation, reverse)
        h, states = recurrence.sru_recurrence(*arguments)
        return h, states if all_states else states[:, :1] if reverse else states[:, -1:]


__all__ = ["SruRecurrence"]
