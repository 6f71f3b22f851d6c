"""The meta-controller: losses and gradients against plain arithmetic, and the rules of its draws."""

import copy
import math

import pytest
import torch

from hf_efficient.objectives import meta_controller
from hf_efficient.objectives.base import embedding_weight
from hf_efficient.objectives.meta_controller import build_candidates
from hf_efficient.ops.categorical import sample_categorical
from hf_efficient.ops.counter_rng import counter_based_uniforms
from tests.helpers.comparison import assert_close, assert_gradients_close
from tests.objectives.discriminator_models import NOTA, make_draws, make_objective
from tests.objectives.encoders import CONFIGS, VOCAB, make_batch


def layer_norm(x, norm):
    centred = x - x.mean()
    return centred / (centred.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias


def head(x, dense, norm):
    x = dense.weight @ x + dense.bias
    return layer_norm(0.5 * x * (1 + torch.erf(x / math.sqrt(2))), norm)


def plain_parts(objective, batch, draws):
    """Losses and shares, position by position, from the rules as they are written down."""
    config, controller = objective.config, objective.controller
    table, lookup = objective.encoder.get_input_embeddings().weight, objective.encoder.get_input_embeddings()
    small_table = table @ controller.projection.weight.T + controller.projection.bias
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    embeds = torch.stack([torch.stack([small_table[i] for i in row]) for row in ids])
    small = controller.network(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    seen, mlm = ids.clone(), []
    for row, column in (labels != -100).nonzero().tolist():
        scores = small_table @ head(small[row, column], controller.dense, controller.norm) + objective.bias
        mlm.append(scores.logsumexp(0) - scores[labels[row, column]])
        seen[row, column] = draws[row, column, 0]
    states = objective.encoder(input_ids=seen, attention_mask=mask).last_hidden_state
    kway, found, flagged, kept, replaced = [], 0, 0, 0, 0
    for row, column in mask.nonzero().tolist():
        label = labels[row, column] if labels[row, column] != -100 else ids[row, column]
        candidates = draws[row, column].clone()
        candidates[0] = NOTA
        wrong = bool(seen[row, column] != label)
        if wrong:
            candidates[1] = label
        x = states[row, column]
        scores = lookup(candidates) @ (head(x, objective.dense, objective.norm) if config.head == "transform" else x)
        if config.head == "transform":
            scores = scores + objective.bias[candidates]
        kway.append(scores.logsumexp(0) - scores[int(wrong)])
        choice = scores.argmax().item()
        replaced, found, kept = replaced + wrong, found + (wrong and choice == 1), kept + (not wrong and choice == 0)
        flagged += wrong and candidates[choice].item() != NOTA
    parts = {"replaced_fraction": replaced / len(kway), "accuracy_original": kept / (len(kway) - replaced)}
    parts |= {"recall_replaced": flagged / replaced, "accuracy_replaced": found / replaced}
    return torch.stack(mlm), torch.stack(kway), parts


@pytest.mark.parametrize(
    ("name", "head"), [*((name, "transform") for name in CONFIGS), ("tupe", "dot"), ("bert", "dot")]
)
def test_losses_and_gradients_are_those_of_plain_arithmetic(name, head):
    objective = make_objective("meta_controller", name, head=head, loss_weight=20.0)
    reference = copy.deepcopy(objective)
    batch = make_batch()
    draws = make_draws(batch)
    output = objective(**batch, sampled_ids=draws)
    output.loss.backward()
    mlm, kway, parts = plain_parts(reference, batch, draws)
    loss = mlm.mean() + 20.0 * kway.mean()
    loss.backward()
    assert len(kway) == 29
    assert 0 < parts["replaced_fraction"] < len(mlm) / 29
    for key, value in {"loss": loss, "generator_loss": mlm.mean(), "discriminator_loss": kway.mean(), **parts}.items():
        assert output[key].item() == pytest.approx(torch.as_tensor(value).item(), rel=1e-6), key
    assert_gradients_close(objective, reference, 1e-8)


@pytest.fixture
def drawn(monkeypatch):
    """Records the arguments and results of the objective's calls of `build_candidates`."""
    calls = []

    def build(*args):
        calls.append((*args, *build_candidates(*args)))
        return calls[-1][-2:]

    monkeypatch.setattr(meta_controller, "build_candidates", build)
    return calls


def test_draws_at_every_position_follow_the_controller(drawn):
    """At unmasked positions too, nothing filtered; only targets are replaced, by the first draw."""
    objective = make_objective("meta_controller")
    batch = make_batch(batch=1)
    rows = 4000
    ids, labels = batch["input_ids"].expand(rows, -1), batch["labels"].expand(rows, -1)
    controller, table = objective.controller, objective.get_input_embeddings().weight
    with torch.no_grad():
        states = controller.transform(controller.states(batch["input_ids"], None, table))
        scores = (states @ controller.project(table).T + objective.bias)[0]
        objective(ids, labels=labels, sample_seeds=torch.arange(rows))
    original, replaced, sampled, *_ = drawn[0]
    target = labels[0] != -100
    assert torch.equal(replaced[:, target], sampled[:, target, 0])
    assert torch.equal(replaced[:, ~target], ids[:, ~target])
    assert torch.equal(original, torch.where(target, labels, ids))
    for column in (0, int(target.nonzero()[0])):
        assert target[column] == (column > 0)
        for draw in (0, 4):
            counts = torch.bincount(sampled[:, column, draw], minlength=VOCAB)
            expected = rows * scores[column].softmax(0)
            assert ((counts - expected) ** 2 / expected).sum() < 100  # 56 degrees of freedom, 0.03 %
    assert {0, 1, 4, NOTA} <= set(sampled.flatten().tolist())  # special tokens and the reject option are drawn too


def test_without_replacement_the_draws_of_a_position_differ(drawn):
    batch = make_batch()
    objective = make_objective("meta_controller", candidate_replacement=False, num_candidates=20)
    objective(**batch)
    ordered = drawn[0][2].sort(-1).values
    assert (ordered[..., 1:] != ordered[..., :-1]).all()
    make_objective("meta_controller", num_candidates=20)(**batch)
    ordered = drawn[1][2].sort(-1).values
    assert (ordered[..., 1:] == ordered[..., :-1]).any()


def test_a_low_temperature_draws_the_likeliest(drawn):
    batch = make_batch()
    objective = make_objective("meta_controller", temperature=1e-5)
    objective(**batch)
    assert (drawn[0][2] == drawn[0][2][..., :1]).all()


def test_padding_and_reject_option_as_replacements_are_tokens_of_the_row():
    """The mask that the encoder gets stays as it is; the reject option goes into its input like any other token."""
    objective = make_objective("meta_controller", "bert")
    batch = make_batch()
    draws = make_draws(batch)
    (row, first), (_, second) = (batch["labels"] != -100).nonzero()[:2].tolist()
    draws[row, first, 0], draws[row, second, 0] = 1, NOTA
    seen = []
    objective.encoder.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    output = objective(**batch, sampled_ids=draws)
    assert seen[0]["input_ids"][row, [first, second]].tolist() == [1, NOTA]
    assert torch.equal(seen[0]["attention_mask"], batch["attention_mask"])
    assert output.loss.isfinite()


def test_scores_do_not_know_the_column():
    objective = make_objective("meta_controller")
    torch.manual_seed(0)
    states, candidates = torch.randn(7, 24).double(), torch.randint(VOCAB, (7, 5))
    order = torch.tensor([3, 0, 4, 2, 1])
    expected = objective.score(states, candidates)[:, order]
    assert_close("scores", objective.score(states, candidates[:, order]), expected, 1e-12)


@pytest.mark.parametrize(("rows", "length", "count"), [(1, 1, 2), (1, 7, 3), (5, 1, 11)])
def test_small_batches(rows, length, count):
    objective = make_objective("meta_controller", "bert", num_candidates=count)
    output = objective(**make_batch(rows, length))
    assert output.loss.item() == pytest.approx((output.generator_loss + 50 * output.discriminator_loss).item())


def test_candidates_by_hand():
    """Kept, masked and guessed right, replaced; with the original and the reject option among the draws."""
    original = torch.tensor([[3, 4, 5, 6]])
    replaced = torch.tensor([[3, 4, 7, 8]])
    sampled = torch.tensor([[[1, 3, 2], [4, 2, 2], [7, 0, NOTA], [8, 0, 6]]])
    before = sampled.clone()
    candidates, labels = build_candidates(original, replaced, sampled, NOTA)
    # The token that took the original's place (7, 8) is dropped; what was drawn for column 1 stays unless it was
    # replaced; neither the original token (3; 6, for the second time) nor the reject option is filtered out.
    assert candidates.tolist() == [[[NOTA, 3, 2], [NOTA, 2, 2], [NOTA, 5, NOTA], [NOTA, 6, 6]]]
    assert labels.tolist() == [[0, 0, 1, 1]]
    assert torch.equal(sampled, before)


def test_the_replacing_token_comes_back_only_if_it_is_drawn_again():
    candidates, _ = build_candidates(torch.tensor([5]), torch.tensor([7]), torch.tensor([[7, 0, 2, 7]]), NOTA)
    assert candidates.tolist() == [[NOTA, 5, 2, 7]]


def test_two_candidates_are_the_least():
    candidates, labels = build_candidates(
        torch.tensor([5, 6]), torch.tensor([7, 6]), torch.tensor([[7, 0], [1, 2]]), NOTA
    )
    assert candidates.tolist() == [[NOTA, 5], [NOTA, 2]]
    assert labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match="At least 2 candidates"):
        build_candidates(torch.tensor([5]), torch.tensor([7]), torch.tensor([[7]]), NOTA)
    with pytest.raises(ValueError, match="must have shapes"):
        build_candidates(torch.tensor([5]), torch.tensor([7]), torch.tensor([[7, 1], [7, 1]]), NOTA)


@pytest.mark.parametrize("kind", ["replaced_token", "meta_controller"])
def test_the_samples_of_a_seed_are_the_same_in_every_release(kind):
    """A run that a newer release resumes goes on with its samples: each objective has a stream of its own."""
    objective, batch = make_objective(kind, "bert"), make_batch()
    seeds = batch.pop("sample_seeds")
    stream, draws = {"replaced_token": (0, 1), "meta_controller": (1, 5)}[kind]
    inputs = [batch[name] for name in ("input_ids", "attention_mask", "labels")]
    with torch.no_grad():
        table = embedding_weight(objective.encoder)
        generated = objective.generator(*inputs, table, objective.vocabulary_bias)
        hidden = objective.generator.transform(generated.states).flatten(0, 1)
        uniforms = counter_based_uniforms(seeds, 11, draws, stream).flatten(0, 1)
        drawn = sample_categorical(hidden, generated.projected, objective.vocabulary_bias, uniforms)
        samples = drawn.view(*batch["labels"].shape, -1)
        expected = objective(**batch, sampled_ids=samples)
        found = objective(**batch, sample_seeds=seeds)
    for name in ("loss", "replaced_fraction", "discriminator_loss"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
