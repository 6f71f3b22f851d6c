"""Parts of the GPU agenda, and what only they use."""
