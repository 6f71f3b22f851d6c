"""One of several processes that pretrain on a stream, as test_streaming.py starts them: leaves the rows that it saw."""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from hf_efficient.objectives.masking import MaskingCollator
from hf_efficient.utils.process import settle_process_group
from tests.training import pretraining_runs


def main():
    folder, *argv = sys.argv[1:]
    seen = []
    collate = MaskingCollator.__call__

    def recording(self, features):
        if "--seed" not in argv or self.seed == 0:  # not those of the evaluation
            seen.extend(list(map(int, feature["input_ids"])) for feature in features)
        return collate(self, features)

    MaskingCollator.__call__ = recording
    trainer = pretraining_runs.run_here(argv)
    found = {"rows": seen, "steps": trainer.state.global_step}
    Path(folder, f"rows-{dist.get_rank()}.json").write_text(json.dumps(found))
    settle_process_group()
    dist.destroy_process_group()
