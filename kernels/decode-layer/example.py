"""A small example of the ops, against plain products; `kernels/build.py` runs it on what it has built."""

import torch


def run(kernel, device):
    """
    Multiply a few tokens and many on `device`.

    Args:
        kernel (`ModuleType`): the loaded package.
        device (`torch.device`): where.

    Raises:
        AssertionError: if results are not those of plain products.
    """
    torch.manual_seed(0)
    for tokens in (1, 20):
        x, weight, bias = torch.randn(tokens, 37), torch.randn(5, 37), torch.randn(5)
        expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        torch.testing.assert_close(kernel.linear(x, weight, None, bias).double(), expected, rtol=1e-4, atol=1e-4)
