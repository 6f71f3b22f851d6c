"""LoRA on all linear layers, trained by several processes: every adapter gets a gradient in every process."""

import pytest
from safetensors.torch import load_file

from tests.helpers.comparison import assert_gradients_close
from tests.helpers.processes import run_distributed
from tests.models import adapter_worker


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(tmp_path):
    pytest.importorskip("peft")
    run_distributed(adapter_worker, tmp_path)
    for case in adapter_worker.CASES:
        gradients = load_file(tmp_path / f"{case}.safetensors")
        assert any("lora_A" in name for name in gradients)
        assert_gradients_close(gradients, adapter_worker.step(case), 1e-12)
