"""An adaptive vocabulary that grows and shrinks at the end of its last cluster, the rarest words."""

import pytest
import torch

from hf_efficient.models.srupp.modeling_srupp import SruppForCausalLM, SruppForSequenceClassification
from tests.helpers.comparison import assert_close, assert_equal


FIELDS = {"adaptive_cutoffs": [5, 20, 33], "adaptive_embedding_size": 16, "adaptive_divisor": 2}  # of 41 ids
TIES = {"tables": {}, "tables-and-projections": {"tie_adaptive_projections": True}}


@pytest.fixture(params=TIES)
def make(request, make_model):
    return lambda dtype=torch.float64: make_model(SruppForCausalLM, dtype=dtype, **FIELDS, **TIES[request.param])


def states_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("mean_resizing", [True, False], ids=["around-the-mean", "as-new"])
@pytest.mark.parametrize("arguments", [{"new_num_tokens": 50}, {"pad_to_multiple_of": 25}, {"new_num_tokens": 42}])
def test_growing_adds_rows_at_the_end_of_the_last_cluster(make, make_ids, arguments, mean_resizing):
    model, ids = make(), make_ids(2, 9)
    before, logits = states_of(model), model(ids).logits
    embedding = model.resize_token_embeddings(**arguments, mean_resizing=mean_resizing)
    size = arguments.get("new_num_tokens", 50)
    assert embedding is model.get_input_embeddings()
    assert (embedding.num_embeddings, model.config.vocab_size) == (size, size)
    assert embedding.weight.shape == (size, 18)
    for name, value in model.state_dict().items():
        old = before[name]
        assert torch.equal(value[: len(old)], old), name
        assert len(value) == len(old) + (size - 41 if name.endswith(("tables.3.weight", "biases.3")) else 0)
    assert embedding.tables[3].weight is model.lm_head.tables[3].weight
    assert torch.unique(embedding.tables[3].weight, dim=0).shape[0] == size - 33
    after = model(ids).logits
    assert after.shape[-1] == size
    torch.testing.assert_close(after[..., :33], logits[..., :33])  # other clusters know nothing of it
    torch.testing.assert_close(after.exp().sum(-1), torch.ones(2, 9, dtype=torch.float64))


def test_new_ids_are_read_and_learned(make, make_ids):
    model, ids = make(), make_ids(2, 9)
    with pytest.raises(ValueError, match="input_ids holds 49, outside the vocabulary of 41 ids"):
        model(torch.full_like(ids, 49))
    model(ids, labels=ids).loss.backward()  # gradients of the old shape are forgotten
    model.resize_token_embeddings(50)
    model.zero_grad()
    ids[:, ::2] = 49
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        gradient = model.get_input_embeddings().tables[3].weight.grad
        assert gradient[49 - 33].any()
        assert model.lm_head.biases[3].grad[49 - 33] != 0
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    expected = -model(ids).logits[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    torch.testing.assert_close(model(ids, labels=ids).loss, expected)


def test_shrinking_takes_from_the_end(make, make_ids):
    model, ids = make(), make_ids(2, 9)
    before, logits = states_of(model), model(ids).logits
    model.resize_token_embeddings(63)
    model.resize_token_embeddings(41)
    assert_equal("weight", states_of(model), before)
    assert_equal("logits", model(ids).logits, logits)
    model.resize_token_embeddings(34)
    assert model.get_input_embeddings().weight.shape == (34, 18)
    assert torch.equal(model.get_input_embeddings().tables[3].weight, before["model.embed_tokens.tables.3.weight"][:1])
    after = model(ids.clamp(max=33)).logits
    torch.testing.assert_close(after.exp().sum(-1), torch.ones(2, 9, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"cannot be resized to 33.*begins at id 33\. Keep at least 34"):
        model.resize_token_embeddings(33)
    for wrong in (-1, 41.5):
        with pytest.raises(ValueError, match="new_num_tokens must be a whole number"):
            model.resize_token_embeddings(wrong)


def test_it_is_saved_and_loaded(make, make_ids, tmp_path):
    model = make(torch.float32)
    model.resize_token_embeddings(50)
    model.save_pretrained(tmp_path)
    loaded = SruppForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.vocab_size == loaded.get_input_embeddings().num_embeddings == 50
    assert_equal("weight", dict(loaded.named_parameters()), dict(model.named_parameters()))
    ids = make_ids(2, 9)
    ids[0, 3] = 49
    assert_close("logits", loaded(ids).logits, model(ids).logits, 1e-6)
    assert_close("loss", loaded(ids, labels=ids).loss, model(ids, labels=ids).loss, 1e-6)


def train_and_merge(adapted, ids):
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        adapted.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    before = adapted.eval()(input_ids=ids).logits
    merged = adapted.merge_and_unload()
    assert_close("logits", merged(ids).logits, before, 1e-5)
    return merged


@pytest.mark.parametrize("is_first", [True, False], ids=["before-the-adapter", "under-the-adapter"])
def test_an_adapter_on_a_resized_model(make, make_ids, tmp_path, is_first):
    peft = pytest.importorskip("peft")
    model, ids = make(torch.float32), make_ids(2, 9)
    ids[0, 3:6] = 49
    if is_first:
        model.resize_token_embeddings(50)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2))
    if not is_first:
        adapted.resize_token_embeddings(50)
    merged = train_and_merge(adapted, ids)
    merged.save_pretrained(tmp_path)
    loaded = SruppForCausalLM.from_pretrained(tmp_path).eval()
    assert_close("logits", loaded(ids).logits, merged(ids).logits, 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens.tables.3"]},
    ],
    ids=["copied-embedding", "copied-head", "table"],
)
def test_an_adapter_in_the_place_of_what_would_change_is_refused(make, make_ids, options):
    peft = pytest.importorskip("peft")
    model = make(torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"target_modules": ["down_proj"], "r": 2, **options}))
    with pytest.raises(ValueError, match=r"resize before it is put on, or after merge_and_unload\(\)"):
        adapted.resize_token_embeddings(50)
    assert model.config.vocab_size == 41


def test_tables_that_differ_are_both_resized(make, make_ids, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["down_proj"], r=2, modules_to_save=["lm_head"])
    model = train_and_merge(peft.get_peft_model(make(torch.float32), config), make_ids(2, 9))
    tables = [model.get_input_embeddings().tables[3], model.lm_head.tables[3]]
    before = [table.weight.detach().clone() for table in tables]
    assert not torch.equal(*before)
    model.resize_token_embeddings(50)
    for table, old in zip(tables, before, strict=True):
        assert table.weight.shape == (17, 2)
        assert torch.equal(table.weight[:8], old)
    ids = make_ids(2, 9)
    ids[0, 3] = 49
    assert model(ids, labels=ids).loss.isfinite()


def test_an_encoder_resized_under_its_softmax_is_refused(make, make_ids):
    """Nobody has told the softmax; the whole model does."""
    model, ids = make(), make_ids(2, 9)
    model.model.resize_token_embeddings(50)
    with pytest.raises(
        ValueError, match="embedding has 50 ids, but its softmax 41: call resize_token_embeddings of the"
    ):
        model(ids)
    model.resize_token_embeddings(50)
    assert model(ids).logits.shape[-1] == 50


def test_a_head_without_a_softmax(make_model, make_ids):
    model, ids = make_model(SruppForSequenceClassification, **FIELDS, pad_token_id=0), make_ids(2, 9)
    before = model(ids).logits
    assert model.resize_token_embeddings(50).num_embeddings == 50
    assert_equal("logits", model(ids).logits, before)
    ids[0, 3] = 49
    assert model(ids).logits.isfinite().all()
