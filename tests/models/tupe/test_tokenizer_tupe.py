"""BERT's own vocabulary serves a TUPE model, and is found again beside it."""

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertTokenizer, pipeline

from hf_efficient import TupeConfig, TupeForMaskedLM


@pytest.mark.data
def test_berts_vocabulary_works(data_dir, tmp_path):
    tokenizer = BertTokenizer(vocab=str(data_dir / "vocab" / "bert-base-uncased-vocab.txt"))
    config = TupeConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
        mask_token_id=tokenizer.mask_token_id,
    )
    model = TupeForMaskedLM(config).eval()
    batch = tokenizer(["an efficient encoder", "it runs"], padding=True, return_tensors="pt")
    assert batch["input_ids"][0].tolist() == [101, 2019, 8114, 4372, 16044, 2099, 102]
    with torch.no_grad():
        logits = model(**batch).logits  # token_type_ids and all
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("an efficient encoder")["input_ids"] == batch["input_ids"][0].tolist()
    with torch.no_grad():
        assert torch.equal(AutoModelForMaskedLM.from_pretrained(tmp_path).eval()(**batch).logits, logits)
    answers = pipeline("fill-mask", model=str(tmp_path))("it [MASK] well")
    assert len(answers) == 5
