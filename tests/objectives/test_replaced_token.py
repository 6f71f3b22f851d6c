"""Replaced-token detection: losses and gradients against plain arithmetic, samples, stages, saving, and Trainer."""

import copy
import math

import pytest
import torch

from hf_efficient.objectives.masking import mask_tokens
from hf_efficient.objectives.replaced_token import ReplacedTokenObjective, ReplacedTokenObjectiveConfig
from tests.helpers.comparison import assert_close, assert_gradients_close
from tests.objectives.discriminator_models import gradients, make_objective
from tests.objectives.encoders import CONFIGS, VOCAB, make_batch, make_encoder


def make_samples(batch):
    """Samples of which some happen to be right."""
    labels = batch["labels"]
    samples = torch.randint(5, VOCAB, labels.shape)
    return torch.where((torch.rand(labels.shape) < 0.3) & (labels != -100), labels, samples)


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def layer_norm(x, norm):
    centred = x - x.mean()
    return centred / (centred.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias


def plain_losses(objective, batch, samples):
    """Both losses position by position: sums, counts, and how many tokens were replaced and found."""
    config, generator = objective.config, objective.generator
    table = objective.encoder.get_input_embeddings().weight
    small_table = torch.stack([generator.projection.weight @ row + generator.projection.bias for row in table])
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    embeds = torch.stack([torch.stack([small_table[i] for i in row]) for row in ids])
    small = generator.network(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    mlm, targets, seen = torch.zeros((), dtype=torch.float64), 0, ids.clone()
    for row in range(ids.shape[0]):
        for column in range(ids.shape[1]):
            label = labels[row, column].item()
            if label == -100:
                continue
            x = layer_norm(gelu(generator.dense.weight @ small[row, column] + generator.dense.bias), generator.norm)
            scores = small_table @ x + generator.bias
            mlm = mlm + scores.logsumexp(0) - scores[label]
            targets += 1
            seen[row, column] = samples[row, column]
    states = objective.encoder(input_ids=seen, attention_mask=mask).last_hidden_state
    discriminator, tokens, replaced, found, kept = torch.zeros((), dtype=torch.float64), 0, 0, 0, 0
    for row in range(ids.shape[0]):
        for column in range(ids.shape[1]):
            if not mask[row, column]:
                continue
            label = labels[row, column] if labels[row, column] != -100 else ids[row, column]
            x = states[row, column]
            if config.discriminator_hidden_layer:
                x = gelu(objective.dense.weight @ x + objective.dense.bias)
            logit = objective.discriminator.weight[0] @ x + objective.discriminator.bias[0]
            is_replaced = bool(seen[row, column] != label)
            is_one = is_replaced != bool(config.label_original)
            discriminator = discriminator + torch.log1p(torch.exp(-logit if is_one else logit))
            tokens, replaced = tokens + 1, replaced + is_replaced
            right = bool(logit > 0) == is_one
            found, kept = found + (right and is_replaced), kept + (right and not is_replaced)
    return mlm, targets, discriminator, tokens, replaced, found, kept


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("baseline", [False, True])
def test_losses_and_gradients_are_those_of_plain_arithmetic(name, baseline):
    options = (
        {"label_original": 1, "discriminator_hidden_layer": False, "discriminator_weight": 20.0} if baseline else {}
    )
    objective = make_objective("replaced_token", name, **options)
    reference = copy.deepcopy(objective)
    batch = make_batch()
    samples = make_samples(batch)
    batch.pop("sample_seeds")
    output = objective(**batch, sampled_ids=samples.masked_fill(batch["labels"] == -100, -100))
    output.loss.backward()

    mlm, targets, discriminator, tokens, replaced, found, kept = plain_losses(reference, batch, samples)
    weight = options.get("discriminator_weight", 50.0)
    loss = mlm / targets + weight * discriminator / tokens
    loss.backward()
    assert tokens == 29
    assert 0 < replaced < targets
    expected = {
        "loss": loss.item(),
        "generator_loss": mlm.item() / targets,
        "discriminator_loss": discriminator.item() / tokens,
        "replaced_fraction": replaced / tokens,
        "recall_replaced": found / replaced,
        "accuracy_original": kept / (tokens - replaced),
    }
    for key, value in expected.items():
        assert output[key].item() == pytest.approx(value, rel=1e-6), key
    assert_gradients_close(objective, reference, 1e-8)


def test_samples_follow_the_generator():
    """At a low temperature the likeliest id comes, at 1 each as often as the softmax says."""
    objective = make_objective("replaced_token")
    batch = make_batch(batch=1)
    ids, labels = batch["input_ids"].expand(4000, -1), batch["labels"].expand(4000, -1)
    seen = []
    objective.encoder.register_forward_pre_hook(lambda m, a, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    with torch.no_grad():
        objective.generator.bias.mul_(10)
        generator, table = objective.generator, objective.get_input_embeddings().weight
        states = generator.transform(generator.states(batch["input_ids"], None, table))
        scores = (states @ generator.project(table).T + generator.bias)[0]
        objective(ids, labels=labels, sample_seeds=torch.arange(4000))
        objective.config.temperature = 1e-4
        objective(ids[:3], labels=labels[:3])
    target = labels[0] != -100
    assert target.any()
    for column in target.nonzero().flatten().tolist():
        counts = torch.bincount(seen[0][:, column], minlength=VOCAB)
        expected = 4000 * scores[column].softmax(0)
        assert ((counts - expected) ** 2 / expected).sum() < 100  # 56 degrees of freedom, 0.03 %
        assert (seen[1][:, column] == scores[column].argmax()).all()
    assert torch.equal(seen[0][:, ~target], ids[:, ~target])


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 7), (5, 1)])
def test_small_batches(rows, length):
    objective = make_objective("replaced_token", "bert")
    output = objective(**make_batch(rows, length))
    assert output.loss.isfinite()
    assert output.loss.item() == pytest.approx((output.generator_loss + 50 * output.discriminator_loss).item())


@pytest.mark.parametrize("name", ["tupe", "bert", "electra"])
def test_the_discriminators_gradient_can_be_kept_from_the_table(name):
    batch = make_batch()
    _, tied = gradients(make_objective("replaced_token", name), batch)
    objective = make_objective("replaced_token", name, embedding_sharing="stop_discriminator_gradient")
    _, stopped = gradients(objective, batch)
    objective.enable_discriminator(False)
    _, alone = gradients(objective, batch)
    table = objective.get_input_embeddings().weight
    key = next(name for name, parameter in objective.named_parameters() if parameter is table)
    assert_close("gradient of the table", stopped[key], alone[key], 1e-10)
    assert not torch.allclose(tied.pop(key), stopped.pop(key))
    assert_gradients_close(stopped, tied, 1e-10)
    ids = batch["input_ids"]
    objective.zero_grad()
    objective.encoder(input_ids=ids).last_hidden_state.square().sum().backward()
    assert table.grad.abs().sum() > 0  # by itself the encoder is as ever


def test_autocast_keeps_gradients_close_and_in_float32():
    """Also those of the table's rows, which are sums over many tokens."""
    objective = make_objective("replaced_token", "bert").float()
    batch = make_batch(batch=16)
    batch["sampled_ids"] = make_samples(batch)
    _, expected = gradients(objective, batch)
    with torch.autocast("cpu", torch.bfloat16):
        _, found = gradients(objective, batch)
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        if gradient.norm() > 1e-4:
            assert (found[name] - gradient).norm() < 0.1 * gradient.norm(), name


def test_discriminator_learns_what_a_blind_one_cannot():
    """Text in which each token follows from the one before it; the watch for the plateau is done by hand."""
    objective = ReplacedTokenObjective(
        encoder=make_encoder("bert", num_hidden_layers=1, hidden_size=32, num_attention_heads=4), generator_divider=2
    )
    objective.train().enable_discriminator(False)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    steps = torch.arange(16) * 7
    logs = []
    for _ in range(450):
        original = (torch.randint(0, VOCAB - 5, (16, 1)) + steps) % (VOCAB - 5) + 5
        masked = mask_tokens(
            original, original > 0, mask_token_id=4, vocab_size=VOCAB, mask_replace_prob=1.0, random_replace_prob=0.0
        )
        output = objective(masked.input_ids, None, masked.labels)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if output.generator_loss < 3.5:
            objective.enable_discriminator(True)
        logs.append({name: value.item() for name, value in output.items()})
    loss, share, recall = (
        sum(log[name] for log in logs[-50:]) / 50
        for name in ("discriminator_loss", "replaced_fraction", "recall_replaced")
    )
    blind = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert loss < 0.95 * blind
    assert recall > 0.1


def test_a_given_encoder_keeps_its_weights_and_the_rest_starts_as_released():
    encoder = make_encoder("bert")
    before = {key: value.clone() for key, value in encoder.state_dict().items() if not key.startswith("pooler")}
    assert len(before) < len(encoder.state_dict())
    objective = ReplacedTokenObjective(encoder=encoder)
    after = objective.encoder.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(before[key], after[key]) for key in before)
    for linear in (objective.dense, objective.generator.projection, objective.generator.dense):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.2)
        assert not linear.bias.any()
    assert not objective.generator.bias.any()


def test_options_and_mistakes():
    encoder = make_encoder("tupe")
    baseline = ReplacedTokenObjectiveConfig.preset("mcbert_baseline", encoder_config=encoder.config.to_dict())
    objective = ReplacedTokenObjective(baseline)
    assert objective.dense is None
    assert (objective.config.label_original, objective.config.discriminator_weight) == (1, 50.0)
    with pytest.raises(ValueError, match=r"has no preset 'paper'. Its presets are: electra, mcbert_baseline"):
        ReplacedTokenObjectiveConfig.preset("paper")
    with pytest.raises(ValueError, match="Give ReplacedTokenObjective an `encoder`"):
        ReplacedTokenObjective()
    with pytest.raises(ValueError, match="no option discriminator_wait"):
        ReplacedTokenObjective(encoder=encoder, discriminator_wait=3)
    with pytest.raises(ValueError, match="a config or options"):
        ReplacedTokenObjective(baseline, encoder, discriminator_weight=3)
    with pytest.raises(ValueError, match="MaskingCollator"):
        objective(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="before the objective is made"):
        objective.resize_token_embeddings(99)
    for wrong in ({"label_original": 2}, {"temperature": 0}, {"embedding_sharing": "none"}, {"target_fraction": 0}):
        with pytest.raises(Exception, match=next(iter(wrong))):
            ReplacedTokenObjectiveConfig(**wrong)
