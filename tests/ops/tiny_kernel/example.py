"""What the builder runs after a build."""

import torch


def run(kernel, device):
    torch.testing.assert_close(kernel.scale_(torch.ones(5, device=device)), torch.full((5,), 3.0, device=device))
