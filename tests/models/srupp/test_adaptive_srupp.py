"""Adaptive embedding and softmax against their definition, one word at a time."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from hf_efficient.models.srupp.modeling_srupp import SruppForCausalLM
from hf_efficient.modules.adaptive_softmax import AdaptiveEmbedding, AdaptiveSoftmax, cluster_sizes


FIELDS = {"adaptive_cutoffs": [5, 20, 33], "adaptive_embedding_size": 16, "adaptive_divisor": 2}
TIES = {"tables": {}, "tables-and-projections": {"tie_adaptive_projections": True}}


@pytest.fixture(params=TIES)
def model(request, make_model):
    return make_model(SruppForCausalLM, **FIELDS, **TIES[request.param])


def cluster_of(word):
    return sum(word >= cutoff for cutoff in FIELDS["adaptive_cutoffs"])


def test_sizes_of_clusters(make_config):
    assert cluster_sizes(make_config(**FIELDS)) == [(5, 16), (15, 8), (13, 4), (8, 2)]


@torch.no_grad()
def test_embedding(model):
    embedding, starts = model.get_input_embeddings(), [0, 5, 20, 33]
    assert isinstance(embedding, AdaptiveEmbedding)
    ids = torch.randperm(41)[:40].view(5, 8)
    output = embedding(ids)
    for place, word in enumerate(ids.flatten().tolist()):
        cluster = cluster_of(word)
        row = embedding.tables[cluster].weight[word - starts[cluster]]
        expected = embedding.projections[cluster].weight @ row
        torch.testing.assert_close(output.view(-1, 18)[place], expected)


@torch.no_grad()
def test_log_probabilities_are_a_distribution_of_words_within_clusters(model):
    head, hidden, starts = model.lm_head, torch.randn(2, 3, 18, dtype=torch.float64), [0, 5, 20, 33]
    assert isinstance(head, AdaptiveSoftmax)
    log_probs = head.log_probs(hidden)
    assert log_probs.shape == (2, 3, 41)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 3, dtype=torch.float64))

    def inner(vector, cluster):
        return vector @ head.projections[cluster].weight

    vector = hidden[1, 2]
    first = torch.cat(
        [
            head.tables[0].weight @ inner(vector, 0) + head.biases[0],
            head.cluster_weight @ inner(vector, 0) + head.cluster_bias,
        ]
    ).log_softmax(-1)
    for word in range(41):
        cluster = cluster_of(word)
        expected = first[word] if cluster == 0 else first[-cluster]  # cluster i at column -i, as in the original
        if cluster:
            logits = head.tables[cluster].weight @ inner(vector, cluster) + head.biases[cluster]
            expected = expected + logits.log_softmax(-1)[word - starts[cluster]]
        torch.testing.assert_close(log_probs[1, 2, word], expected)


def test_losses_are_those_of_the_distribution_in_the_order_of_positions(model, make_ids):
    ids = make_ids(3, 9)
    ids[0, :4] = torch.tensor([40, 0, 21, 6])  # all clusters
    labels = ids.clone()
    labels[1, 3:6] = -100
    output = model(ids, labels=labels)
    assert output.logits is None
    log_probs = model(ids).logits[:, :-1]
    expected = -log_probs.gather(-1, labels[:, 1:].clamp(min=0)[..., None]).squeeze(-1)
    expected = expected.masked_fill(labels[:, 1:] == -100, 0.0)
    torch.testing.assert_close(output.token_losses[:, :-1], expected)
    assert (output.token_losses[:, -1] == 0).all()
    torch.testing.assert_close(output.loss, expected.sum() / (labels[:, 1:] != -100).sum())
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=7).loss, expected.sum() / 7)

    # The same gradients as through all words
    gradients = []
    for loss in (output.loss, expected.sum() / (labels[:, 1:] != -100).sum()):
        model.zero_grad()
        loss.backward(retain_graph=True)
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_ties(make_model, tmp_path):
    for name, fields in TIES.items():
        model = make_model(SruppForCausalLM, dtype=torch.float32, **FIELDS, **fields)
        model.save_pretrained(tmp_path / name)
        for again in (model, SruppForCausalLM.from_pretrained(tmp_path / name)):
            embedding, head = again.get_input_embeddings(), again.lm_head
            for cluster in range(4):
                tied = embedding.tables[cluster].weight is head.tables[cluster].weight
                assert tied
                tied = embedding.projections[cluster].weight is head.projections[cluster].weight
                assert tied == fields.get("tie_adaptive_projections", False)
        for key, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], value)


def test_a_loss_over_no_words_at_all(model, make_ids):
    """As with an ordinary softmax: not a number, and no gradient that spoils anything when divided by a real count."""
    ids = make_ids(1, 5)
    output = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=3)
    assert output.loss == 0
    output.loss.backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_embedding_dropout_acts_in_training_alone(make_model, make_ids):
    model, ids = make_model(SruppForCausalLM, **FIELDS, embedding_dropout=0.5), make_ids(2, 9)
    assert torch.equal(model(ids, labels=ids).loss, model(ids, labels=ids).loss)
    model.train()
    assert not torch.equal(model(ids, labels=ids).loss, model(ids, labels=ids).loss)


@pytest.mark.parametrize("label", [-1, -99])
def test_labels_outside_the_vocabulary_are_refused(model, make_ids, label):
    ids = make_ids(2, 5)
    for wrong in (label, model.config.vocab_size):
        labels = ids.clone()
        labels[1, 3] = wrong
        with pytest.raises(ValueError, match=f"labels hold {wrong}, outside the vocabulary"):
            model(input_ids=ids, labels=labels)


def test_tables_are_always_tied(make_config):
    assert make_config(**FIELDS, tie_word_embeddings=False).tie_word_embeddings
    assert not make_config().tie_word_embeddings


def test_resizing_to_the_same_size_changes_nothing(model):
    before = dict(model.named_parameters())
    for resized in (model, model.model):
        assert resized.resize_token_embeddings(41) is model.get_input_embeddings()
        assert resized.resize_token_embeddings() is model.get_input_embeddings()
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_the_embedding_says_its_size_and_gives_the_vectors_of_all_words(model):
    embedding = model.get_input_embeddings()
    assert (embedding.num_embeddings, embedding.embedding_dim) == embedding.weight.shape == (41, 18)
    torch.testing.assert_close(embedding.weight, embedding(torch.arange(41)))


def test_all_projections_are_called(model, make_ids):
    """So that hooks, offloading, adapters and quantised layers act; shared ones are called by the embedding."""
    called = set()
    for name, module in model.named_modules():
        if name.rpartition(".")[0].endswith("projections"):
            module.register_forward_hook(lambda module, args, output, name=name: called.add(name))
    model(make_ids(2, 9), labels=make_ids(2, 9))
    sides = ["model.embed_tokens"] if model.config.tie_adaptive_projections else ["model.embed_tokens", "lm_head"]
    assert called == {f"{side}.projections.{cluster}" for side in sides for cluster in range(4)}


class Doubled(nn.Module):
    """A layer that stands in the place of another and changes what it gives."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


@torch.no_grad()
@pytest.mark.parametrize("part", ["tables", "projections"])
def test_what_stands_in_the_place_of_a_shared_part_acts_on_both_sides(make_model, make_ids, part):
    model = make_model(SruppForCausalLM, **FIELDS, tie_adaptive_projections=True)
    expected = make_model(SruppForCausalLM, **FIELDS, tie_adaptive_projections=True)
    for cluster in range(4):
        parts = getattr(model.get_input_embeddings(), part)
        parts[cluster] = Doubled(parts[cluster])
        getattr(expected.get_input_embeddings(), part)[cluster].weight.mul_(2)
    ids = make_ids(2, 9)
    torch.testing.assert_close(model(ids).logits, expected(ids).logits)
    torch.testing.assert_close(model(ids, labels=ids).loss, expected(ids, labels=ids).loss)


def test_dropout_falls_on_the_vectors_of_each_cluster(make_model):
    """Of what the tables are compared with too, not of embeddings alone: each loss changes from call to call."""
    model = make_model(SruppForCausalLM, **FIELDS, embedding_dropout=0.5).train()
    hidden = torch.randn(1, 60, model.config.hidden_size, dtype=model.dtype)
    targets = torch.arange(60)[None] % model.config.vocab_size
    first, second = model.lm_head(hidden, targets), model.lm_head(hidden, targets)
    edges = model.lm_head.cutoffs
    for start, stop in pairwise(edges):
        inside = (targets >= start) & (targets < stop)
        assert inside.any()
        assert not torch.equal(first[inside], second[inside])
    model.eval()
    assert torch.equal(model.lm_head(hidden, targets), model.lm_head(hidden, targets))


def trained_and_merged(model, ids, saved):
    """Adapters and a whole copy of the module called `saved`, trained for three steps and merged."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["down_proj"], r=2, modules_to_save=[saved])
    adapted = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return adapted.eval().merge_and_unload()


def another_embedding(model, other):
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(3)
    model.set_input_embeddings(other.model.embed_tokens)
    model.tie_weights()
    return model


CHANGES = {
    "a-copied-head": lambda model, other, ids: trained_and_merged(model, ids, "lm_head"),
    "a-copied-embedding": lambda model, other, ids: trained_and_merged(model, ids, "embed_tokens"),
    "another-embedding": lambda model, other, ids: another_embedding(model, other),
}


@pytest.mark.parametrize("ties", TIES.values(), ids=TIES)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_saved_after_a_change_of_one_side_is_what_is_loaded(make_model, make_ids, tmp_path, change, ties):
    """Tables that differ are two tables from then on, in memory, in the folder and in a copy of the weights alone."""
    model, other = (make_model(SruppForCausalLM, dtype=torch.float32, **FIELDS, **ties) for _ in range(2))
    ids = make_ids(2, 9)
    before = model(ids, labels=ids).loss
    model = change(model, other, ids).eval()
    model.save_pretrained(tmp_path)
    expected = model(ids, labels=ids).loss
    assert (expected - before).abs() > 1e-3
    loaded = SruppForCausalLM.from_pretrained(tmp_path).eval()
    assigned = make_model(SruppForCausalLM, dtype=torch.float32, **FIELDS, **ties)
    assigned.load_state_dict(model.state_dict(), assign=True)
    for again in (loaded, loaded.to(torch.float64).float(), assigned):
        torch.testing.assert_close(again(ids, labels=ids).loss, expected)
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_an_embedding_set_in_the_place_of_the_first_is_shared_likewise(make_model):
    ties = {"tie_adaptive_projections": True}
    model, other = (make_model(SruppForCausalLM, **FIELDS, **ties) for _ in range(2))
    embedding = another_embedding(model, other).get_input_embeddings()
    hidden = torch.randn(1, 3, 18, dtype=torch.float64)
    for part in (embedding.projections, embedding.tables):
        plain = part[0]
        part[0] = Doubled(plain)
        found = model.lm_head(hidden)
        part[0] = plain
        with torch.no_grad():
            plain.weight.mul_(2)
        torch.testing.assert_close(found, model.lm_head(hidden))
