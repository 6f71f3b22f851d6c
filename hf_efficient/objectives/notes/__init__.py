"""
Notes on rare words (TNF), an addition to any pretraining objective.

```python
notes = NoteDictionary(keys, encoder.config.hidden_size)
trainer = EfficientTrainer(
    objective, data_collator=RareWordCollator(collator, keys), callbacks=[attach(objective, notes)], ...
)
```

Source: Wu et al., "Taking Notes on the Fly Helps Language Pre-training", ICLR 2021, arXiv 2008.01466.
"""

from .attach import NoteUpdateCallback, attach, flatten_spans, note_insertion_point
from .collator import RareWordCollator, SpanFinder
from .dictionary import NoteDictionary
from .updates import NoteSettings


__all__ = [
    "NoteDictionary",
    "NoteSettings",
    "NoteUpdateCallback",
    "RareWordCollator",
    "SpanFinder",
    "attach",
    "flatten_spans",
    "note_insertion_point",
]
