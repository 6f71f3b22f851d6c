"""Fine-tuning: weighted losses, early stopping, heads for numbers, and what models read of words."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerControl,
    TrainerState,
)

from hf_efficient import ScalingTransformerConfig, ScalingTransformerForCausalLM, TupeConfig, TupeModel
from hf_efficient.data.task_labels import CLASSIFICATION, MULTI_LABEL, REGRESSION, TOKEN_CLASSIFICATION
from hf_efficient.trainer.finetuning import FinetuningTask, ResumableEarlyStopping, WeightedLoss
from hf_efficient.trainer.task_encoding import encode
from hf_efficient.trainer.task_model import label_scale, load_model, output_layer, restore_scale
from tests.training.tiny_glue import GOOD, make_tokenizer, save_encoder


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def task(kind, names, columns=("text",), **options):
    return FinetuningTask("toy", kind, columns, names, (), **options)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer([" ".join(GOOD), "the film is", "unlovely"])


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, tokenizer):
    folder = str(tmp_path_factory.mktemp("model"))
    save_encoder(folder, tokenizer)
    return folder


def test_weighted_loss_of_classes_is_that_of_torch():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3), torch.tensor([0, 2, 2, 1, 0])
    weights = (0.5, 2.0, 1.0)
    loss = WeightedLoss(CLASSIFICATION, weights)({"logits": logits}, labels)
    own = torch.nn.functional.cross_entropy(logits, labels, weight=torch.tensor(weights), reduction="none")
    torch.testing.assert_close(loss, own.mean())
    parts = [
        WeightedLoss(CLASSIFICATION, weights)({"logits": logits[i]}, labels[i], 5) for i in (slice(2), slice(2, 5))
    ]
    torch.testing.assert_close(sum(parts), loss)


def test_weighted_loss_of_tokens_leaves_out_what_has_no_label():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4), torch.tensor([[1, -100, 3], [-100, -100, 0]])
    loss = WeightedLoss(TOKEN_CLASSIFICATION, (1.0,) * 4)({"logits": logits}, labels)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def test_weighted_loss_of_several_labels_weighs_the_rows_that_have_them():
    logits, labels = torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    loss = WeightedLoss(MULTI_LABEL, (3.0, 1.0))({"logits": logits}, labels)
    assert float(loss) == pytest.approx(np.log(2) * (3 + 1 + 1 + 1) / 4)


def test_a_run_that_had_stopped_stops_when_it_is_resumed(tmp_path):
    from transformers import TrainingArguments

    args = TrainingArguments(str(tmp_path), eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True)
    for counter, stops in ((1, False), (2, True)):
        callback = ResumableEarlyStopping(2)
        callback.early_stopping_patience_counter = counter
        control = TrainerControl()
        callback.on_train_begin(args, TrainerState(), control)
        assert control.should_training_stop is stops


@pytest.mark.parametrize(("step", "said"), [(4, False), (3, True)], ids=["to-the-end", "early"])
def test_only_a_run_that_stops_early_says_that_it_stopped(step, said, tmp_path, caplog):
    from transformers import TrainingArguments

    args = TrainingArguments(str(tmp_path), metric_for_best_model="eval_f1")
    state = TrainerState(global_step=step, max_steps=4, best_global_step=2, best_metric=0.5)
    with caplog.at_level("INFO"):
        ResumableEarlyStopping(2).on_train_end(args, state, TrainerControl())
    stopped = ["Stopped after 3 of 4 steps."] if said else []
    assert [record.message for record in caplog.records] == [
        *stopped,
        "The model kept is that of step 2, with eval_f1 0.5.",
    ]


def save_tupe(folder, tokenizer):
    TupeModel(TupeConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(folder)


def save_sparse_decoder(folder, tokenizer):
    """A language model, whose head has no bias."""
    ScalingTransformerForCausalLM(ScalingTransformerConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(folder)


@pytest.mark.parametrize("save", [save_encoder, save_tupe, save_sparse_decoder])
def test_a_head_for_numbers_gets_their_scale(save, tokenizer, tmp_path):
    torch.manual_seed(2)
    save(tmp_path / "model", tokenizer)
    tokenizer.save_pretrained(tmp_path / "model")
    network, processor = load_model(*[str(tmp_path / "model")] * 2, task(REGRESSION, ("label",), scale=None))
    network.eval()
    assert output_layer(network).out_features == 1
    scale = label_scale(network, [10.0, 30.0])
    has_bias = output_layer(network).bias is not None
    assert scale == pytest.approx((20.0, 10.0) if has_bias else (0.0, 500**0.5))
    inputs = processor(["the film is lovely", "fine"], padding=True, return_tensors="pt")
    with torch.no_grad():
        before = network(**inputs).logits
        restore_scale(network, scale)
        torch.testing.assert_close(network(**inputs).logits, before * scale[1] + scale[0])
    assert label_scale(network, [7.0, 7.0])[1] > 0


def test_a_word_is_labelled_at_its_first_piece(tokenizer):
    rows = {"tokens": [["lovelyly", "film"], ["is"]], "label": [[1, 2], [0]]}
    encoded = encode(rows, task(TOKEN_CLASSIFICATION, ("O", "B-X", "I-X"), ("tokens",)), tokenizer, 20)
    for ids, labels, words in zip(encoded["input_ids"], encoded["labels"], encoded["words"], strict=True):
        pieces = tokenizer.convert_ids_to_tokens(ids)
        assert [word >= 0 for word in words] == [not piece.startswith(("##", "[")) for piece in pieces]
        assert [label for label in labels if label != -100] in ([1, 2], [0])
    assert len(encoded["input_ids"][0]) > 4  # a word of several pieces is there


def test_words_that_are_cut_off_have_no_piece(tokenizer):
    rows = {"tokens": [["the", "film", "is"]], "label": [[0, 1, 2]]}
    encoded = encode(rows, task(TOKEN_CLASSIFICATION, ("a", "b", "c"), ("tokens",)), tokenizer, 4)
    assert encoded["labels"] == [[-100, 0, 1, -100]]
    assert encoded["words"] == [[-1, 0, 1, -1]]


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_tokenizers_of_bytes_read_words_as_in_a_text(trim_offsets):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, "Ġa"])}, [("Ġ", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim_offsets)
    backend.decoder = decoders.ByteLevel()
    processor = PreTrainedTokenizerFast(tokenizer_object=backend)
    rows = {"tokens": [["é", "a", "ab"]], "label": [[1, 2, 3]]}
    encoded = encode(rows, task(TOKEN_CLASSIFICATION, tuple("abcd"), ("tokens",)), processor, 20)
    assert encoded["input_ids"] == processor(["é a ab"])["input_ids"]
    assert [label for label in encoded["labels"][0] if label != -100] == [1, 2, 3]


def test_a_model_without_a_head_for_tokens_is_refused(tokenizer, tmp_path):
    save_sparse_decoder(tmp_path, tokenizer)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"have no head for token_classification\. Choose") as error:
        load_model(str(tmp_path), str(tmp_path), task(TOKEN_CLASSIFICATION, ("O", "B-X")))
    assert len(str(error.value)) < 300


def test_the_head_of_another_task_is_replaced(model_dir, tokenizer, tmp_path):
    other = BertForSequenceClassification.from_pretrained(model_dir, num_labels=5)
    other.save_pretrained(tmp_path)
    network, _ = load_model(str(tmp_path), model_dir, task(CLASSIFICATION, ("a", "b", "c")))
    assert network.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert network.config.label2id == {"a": 0, "b": 1, "c": 2}
    assert network.classifier.out_features == 3
