"""Mathematics on tensors. Imports torch only; see `backend.py` for how an implementation is chosen."""
