"""Trainers with whole checkpoints and exact resuming, and what the training scripts share."""

from .segment_trainer import SegmentTrainer, evaluate_segments
from .trainer import EfficientTrainer


__all__ = ["EfficientTrainer", "SegmentTrainer", "evaluate_segments"]
