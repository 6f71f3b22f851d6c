"""Pretraining objectives, for any encoder that meets the protocol in [`~hf_efficient.objectives.base`].

Importing this package registers the objectives with transformers, so that its Auto classes load checkpoints of a run.
"""

from . import auto


auto.register()
