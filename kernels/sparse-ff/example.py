"""A small example of the op, against a plain loop; `kernels/build.py` runs it on what it has built."""

import torch


def run(kernel, device):
    """
    Run a few tokens and many on `device`.

    Args:
        kernel (`ModuleType`): the loaded package.
        device (`torch.device`): where.

    Raises:
        AssertionError: if results or winners are not those of the loop.
    """
    torch.manual_seed(0)
    weights = make_weights(37, 3, 5, 4, device)
    for tokens in (1, 20):
        x = torch.randn(tokens, 37, device=device)
        y, winners = kernel.sparse_feed_forward(x, *weights)
        expected, chosen = plain_loop(x, *weights)
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(winners, chosen)


def make_weights(width, blocks, units, rank, device="cpu"):
    """Random weights in the order of the op's arguments, from `controller_down` to `inner_bias`."""
    shapes = [(rank, width), (blocks, units, rank), (blocks, units), (blocks, units, width), (blocks, units, width)]
    shapes += [(width,), (blocks, units)]
    return [torch.randn(*shape, device=device) for shape in shapes]


def plain_loop(
    x, controller_down, controller_up, controller_bias, up, down, bias=None, inner_bias=None, activation="relu",
    multiply_by_controller=False,
):  # fmt: skip
    """The feed-forward token by token and block by block, in float64."""
    apply = {
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_new": lambda sums: torch.nn.functional.gelu(sums, approximate="tanh"),
        "silu": torch.nn.functional.silu,
    }[activation]
    winners = torch.empty(x.shape[0], up.shape[0], dtype=torch.int32, device=x.device)
    y = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for token, row in enumerate(x.double()):
        h = controller_down.double() @ row
        for block in range(up.shape[0]):
            logits = controller_up[block].double() @ h + controller_bias[block].double()
            winner = int(logits.argmax())
            value = up[block, winner].double() @ row
            if inner_bias is not None:
                value = value + inner_bias[block, winner].double()
            value = apply(value)
            if multiply_by_controller:
                value = value * torch.softmax(logits, 0)[winner]
            winners[token, block] = winner
            if value != 0:  # else the row is not read
                y[token] += value * down[block, winner].double()
        if bias is not None:
            y[token] += bias.double()
    return y, winners
