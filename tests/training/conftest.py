"""What several tests of fine-tuning share."""

import pytest


@pytest.fixture(scope="module")
def own_caches(tmp_path_factory):
    """The caches of `datasets` and `evaluate` in folders of the test run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path_factory.mktemp("metrics"))
        yield


@pytest.fixture(scope="module")
def topic_encoder(tmp_path_factory):
    """An encoder whose tokenizer knows the words of `finetuning_runs`."""
    from tests.training.finetuning_runs import save_tiny_encoder

    return save_tiny_encoder(tmp_path_factory.mktemp("model"))
