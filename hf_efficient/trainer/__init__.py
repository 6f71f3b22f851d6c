"""Trainers with whole checkpoints and exact resuming, and what the training scripts share."""

from .distillation_trainer import DistillationTrainer
from .segment_trainer import SegmentTrainer, evaluate_segments
from .seq2seq_trainer import EfficientSeq2SeqTrainer
from .trainer import EfficientTrainer


__all__ = ["DistillationTrainer", "EfficientSeq2SeqTrainer", "EfficientTrainer", "SegmentTrainer", "evaluate_segments"]
