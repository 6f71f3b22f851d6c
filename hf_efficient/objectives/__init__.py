"""What is learned in pretraining; encoders are known by the protocol of a base model only. Once this is imported,
checkpoints of a run load with transformers' Auto classes."""

from . import auto


auto.register()
