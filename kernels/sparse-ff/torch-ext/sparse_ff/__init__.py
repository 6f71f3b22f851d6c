"""The sparse feed-forward of Scaling Transformers as a compiled op for CPUs and CUDA devices: evaluation and decoding.

Source: Jaszczur et al., "Sparse is Enough in Scaling Transformers", NeurIPS 2021, arXiv 2111.12763, section 3.1. Units
stand in blocks, and a controller of low rank chooses one unit of each block, the winner, for each token:

    h = C_down x        l[k, n] = C_up[k, n] h + c[k, n]        n*(k) = the first largest l[k, n]
    a[k] = g(U[k, n*] x + u[k, n*])                             times softmax(l[k])[n*], if that is asked for
    y = sum_k a[k] D[k, n*] + b

Only the rows of winners are read, and those of D only where a[k] is not 0. There is no gradient, and in forward mode
(`torch.func.jvp`, dual numbers) both functions raise.
"""

from ._ops import ops as ops
from .feed_forward import forward, sparse_feed_forward


__all__ = ["forward", "sparse_feed_forward"]
