"""Trainers with whole checkpoints and exact resuming, and what the training scripts share."""

from .distillation_trainer import DistillationTrainer
from .segment_trainer import SegmentTrainer, evaluate_segments
from .trainer import EfficientTrainer


__all__ = ["DistillationTrainer", "EfficientTrainer", "SegmentTrainer", "evaluate_segments"]
