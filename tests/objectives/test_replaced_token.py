"""Replaced-token detection: losses and gradients against plain arithmetic, draws, phases, saving, and Trainer."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from encoders import CONFIGS, VOCAB, make_batch, make_encoder, perturb
from transformers import AutoModel, AutoModelForSequenceClassification

from hf_efficient.objectives.masking import mask_tokens
from hf_efficient.objectives.replaced_token import ReplacedTokenObjective, ReplacedTokenObjectiveConfig


def make_objective(name="tupe", **options):
    encoder = make_encoder(name)
    torch.manual_seed(2)
    return perturb(ReplacedTokenObjective(encoder=encoder, **options)).double().eval()


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
    detector, tokens, replaced, found, kept = torch.zeros((), dtype=torch.float64), 0, 0, 0, 0
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
            detector = detector + torch.log1p(torch.exp(-logit if is_one else logit))
            tokens, replaced = tokens + 1, replaced + is_replaced
            right = bool(logit > 0) == is_one
            found, kept = found + (right and is_replaced), kept + (right and not is_replaced)
    return mlm, targets, detector, tokens, replaced, found, kept


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("baseline", [False, True])
def test_losses_and_gradients_are_those_of_plain_arithmetic(name, baseline):
    options = {"label_original": 1, "discriminator_hidden_layer": False, "detector_weight": 20.0} if baseline else {}
    objective = make_objective(name, **options)
    reference = copy.deepcopy(objective)
    batch = make_batch()
    samples = make_samples(batch)
    batch.pop("draw_seeds")
    output = objective(**batch, sampled_ids=samples.masked_fill(batch["labels"] == -100, -100))
    output.loss.backward()

    mlm, targets, detector, tokens, replaced, found, kept = plain_losses(reference, batch, samples)
    weight = options.get("detector_weight", 50.0)
    loss = mlm / targets + weight * detector / tokens
    loss.backward()
    assert tokens == 29
    assert 0 < replaced < targets
    expected = {
        "loss": loss.item(),
        "generator_loss": mlm.item() / targets,
        "detector_loss": detector.item() / tokens,
        "share_replaced": replaced / tokens,
        "recall_replaced": found / replaced,
        "accuracy_original": kept / (tokens - replaced),
    }
    for key, value in expected.items():
        assert output[key].item() == pytest.approx(value, rel=1e-6), key
    for (key, ours), theirs in zip(objective.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10, msg=key)


def gradients(objective, *batches, **options):
    objective.zero_grad()
    losses = [objective(**batch, **options).loss for batch in batches]
    sum(losses).backward()
    found = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    return sum(losses).item(), found


@pytest.mark.parametrize("sizes", [[1, 2, 4], [3, 4], [1] * 7])
def test_accumulated_batches_equal_one(sizes):
    """Their draws too, as they belong to the rows."""
    objective = make_objective()
    batch = make_batch(batch=7)
    columns = [value.split(sizes) for value in batch.values()]
    parts = [dict(zip(batch, values, strict=True)) for values in zip(*columns, strict=True)]
    count = (batch["labels"] != -100).sum()
    whole, expected = gradients(objective, batch, num_items_in_batch=count)
    total, found = gradients(objective, *parts, num_items_in_batch=count)
    assert total == pytest.approx(whole, rel=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11, msg=name)
    output = objective(**batch)
    weighted = output.generator_loss * count + 50 * 0.15 * output.detector_loss * batch["attention_mask"].sum()
    assert whole == pytest.approx((weighted / count).item(), rel=1e-9)


def test_padding_leaves_no_trace():
    objective = make_objective()
    batch = make_batch(batch=4, padding=4)
    trimmed = {key: value[1:2, :7] if value.dim() == 2 else value[1:2] for key, value in batch.items()}
    padded = {key: value[1:2] for key, value in batch.items()}
    assert padded["attention_mask"].sum() == 7
    loss, expected = gradients(objective, trimmed)
    again, found = gradients(objective, padded)
    assert again == pytest.approx(loss, rel=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


def test_sources_of_draws_and_their_order():
    objective = make_objective()
    batch = make_batch()
    seeds = batch.pop("draw_seeds")
    samples = make_samples(batch)
    losses = {
        objective(**batch, draw_seeds=seeds).loss.item(),
        objective(**batch, draw_seeds=seeds + 1).loss.item(),
        objective(**batch, generator=torch.Generator().manual_seed(0)).loss.item(),
        objective(**batch, generator=torch.Generator().manual_seed(1)).loss.item(),
        objective(**batch, sampled_ids=samples, draw_seeds=seeds).loss.item(),
    }
    assert len(losses) == 5
    assert objective(**batch, sampled_ids=samples).loss.item() in losses
    assert objective(**batch, draw_seeds=seeds, generator=torch.Generator().manual_seed(9)).loss.item() in losses
    assert objective(**batch, generator=torch.Generator().manual_seed(1)).loss.item() in losses
    torch.manual_seed(5)
    first = objective(**batch).loss
    torch.manual_seed(5)
    assert objective(**batch).loss == first
    with pytest.raises(ValueError, match="`sampled_ids` must have the shape"):
        objective(**batch, sampled_ids=samples[:, 1:])


def test_samples_follow_the_generator():
    """At a low temperature the likeliest id comes, at 1 each as often as the softmax says."""
    objective = make_objective()
    batch = make_batch(batch=1)
    ids, labels = batch["input_ids"].expand(4000, -1), batch["labels"].expand(4000, -1)
    seen = []
    objective.encoder.register_forward_pre_hook(lambda m, a, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    with torch.no_grad():
        objective.generator.bias.mul_(10)
        generator, table = objective.generator, objective.get_input_embeddings().weight
        states = generator.transform(generator.states(batch["input_ids"], None, table))
        scores = (states @ generator.project(table).T + generator.bias)[0]
        objective(ids, labels=labels, draw_seeds=torch.arange(4000))
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
    objective = make_objective("bert")
    output = objective(**make_batch(rows, length))
    assert output.loss.isfinite()
    assert output.loss.item() == pytest.approx((output.generator_loss + 50 * output.detector_loss).item())


def test_rows_without_targets_train_the_detector_only():
    objective = make_objective()
    batch = make_batch()
    batch["labels"].fill_(-100)
    for count in (None, torch.tensor(0)):
        loss, found = gradients(objective, batch, num_items_in_batch=count)
        assert math.isfinite(loss)
        assert not any(gradient.isnan().any() for gradient in found.values())
        assert found["discriminator.weight"].abs().sum() > 0
        assert found["generator.dense.weight"].abs().sum() == 0
    output = objective(**batch)
    assert output.generator_loss.isnan()
    assert output.recall_replaced.isnan()
    assert output.share_replaced == 0


@pytest.mark.parametrize("name", ["tupe", "bert", "electra"])
def test_the_detectors_gradient_can_be_kept_from_the_table(name):
    batch = make_batch()
    _, tied = gradients(make_objective(name), batch)
    objective = make_objective(name, embedding_sharing="stop_detector_gradient")
    _, stopped = gradients(objective, batch)
    objective.detector_on.fill_(False)
    _, alone = gradients(objective, batch)
    table = objective.get_input_embeddings().weight
    key = next(name for name, parameter in objective.named_parameters() if parameter is table)
    assert torch.equal(stopped[key], alone[key])
    assert not torch.allclose(tied.pop(key), stopped.pop(key))
    for other, gradient in tied.items():
        torch.testing.assert_close(stopped[other], gradient, rtol=1e-10, atol=1e-12, msg=other)
    ids = batch["input_ids"]
    objective.zero_grad()
    objective.encoder(input_ids=ids).last_hidden_state.square().sum().backward()
    assert table.grad.abs().sum() > 0  # by itself the encoder is as ever


def test_gradient_checkpointing_changes_nothing():
    objective = make_objective("bert")
    batch = make_batch()
    loss, expected = gradients(objective, batch)
    objective.gradient_checkpointing_enable({"use_reentrant": False})
    objective.train()
    again, found = gradients(objective, batch)
    assert again == pytest.approx(loss, rel=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_whole_and_read_in_a_fresh_process(name, tmp_path):
    objective = make_objective(name, generator_divider=2, label_original=1, detector_start_step=3).float()
    objective.detector_on.fill_(True)
    batch = make_batch()
    objective.save_pretrained(tmp_path / "objective")
    objective.encoder.save_pretrained(tmp_path / "encoder")
    torch.save(batch, tmp_path / "batch.pt")
    program = (
        "import sys, torch, hf_efficient\n"
        "from hf_efficient.objectives.replaced_token import ReplacedTokenObjective\n"
        "objective, info = ReplacedTokenObjective.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "assert not info['missing_keys'] and not info['unexpected_keys'], info\n"
        "print(repr(objective(**torch.load(sys.argv[2])).loss.item()))"
    )
    if name == "tupe":  # one is enough to pay for a process
        command = [sys.executable, "-c", program, str(tmp_path / "objective"), str(tmp_path / "batch.pt")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) == objective(**batch).loss.item()
    again, info = ReplacedTokenObjective.from_pretrained(tmp_path / "objective", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again(**batch).loss == objective(**batch).loss

    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = objective.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    encoder = AutoModel.from_pretrained(tmp_path / "encoder").eval()
    assert torch.equal(encoder(input_ids=ids, attention_mask=mask).last_hidden_state, expected)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder").eval()
    base = classifier.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(base, expected)


def test_autocast_keeps_gradients_close_and_in_float32():
    """Also those of the table's rows, which are sums over many tokens."""
    objective = make_objective("bert").float()
    batch = make_batch(batch=16)
    batch["sampled_ids"] = make_samples(batch)
    _, expected = gradients(objective, batch)
    with torch.autocast("cpu", torch.bfloat16):
        _, found = gradients(objective, batch)
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        if gradient.norm() > 1e-4:
            assert (found[name] - gradient).norm() < 0.1 * gradient.norm(), name


def test_detector_learns_what_a_blind_one_cannot():
    """Text in which each token follows from the one before it; the watch for the plateau is done by hand."""
    objective = ReplacedTokenObjective(
        encoder=make_encoder("bert", num_hidden_layers=1, hidden_size=32, num_attention_heads=4), generator_divider=2
    )
    objective.train().detector_on.fill_(False)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    steps = torch.arange(16) * 7
    logs = []
    for _ in range(450):
        original = (torch.randint(0, VOCAB - 5, (16, 1)) + steps) % (VOCAB - 5) + 5
        masked = mask_tokens(
            original, original > 0, mask_token_id=4, vocab_size=VOCAB, mask_share=1.0, random_share=0.0
        )
        output = objective(masked.input_ids, None, masked.labels)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if output.generator_loss < 3.5:
            objective.detector_on.fill_(True)
        logs.append({name: value.item() for name, value in output.items()})
    loss, share, recall = (
        sum(log[name] for log in logs[-50:]) / 50 for name in ("detector_loss", "share_replaced", "recall_replaced")
    )
    blind = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert loss < 0.95 * blind
    assert recall > 0.1


def test_a_new_encoder_is_in_float32_whatever_its_config_says():
    config = ReplacedTokenObjectiveConfig(encoder_config={**CONFIGS["tupe"]().to_dict(), "dtype": "bfloat16"})
    assert {parameter.dtype for parameter in ReplacedTokenObjective(config).parameters()} == {torch.float32}


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
    baseline = ReplacedTokenObjectiveConfig.mcbert_baseline(encoder_config=encoder.config.to_dict())
    objective = ReplacedTokenObjective(baseline)
    assert objective.dense is None
    assert (objective.config.label_original, objective.config.detector_weight) == (1, 50.0)
    with pytest.raises(ValueError, match="Give ReplacedTokenObjective an `encoder`"):
        ReplacedTokenObjective()
    with pytest.raises(ValueError, match="no option detector_wait"):
        ReplacedTokenObjective(encoder=encoder, detector_wait=3)
    with pytest.raises(ValueError, match="a config or options"):
        ReplacedTokenObjective(baseline, encoder, detector_weight=3)
    with pytest.raises(ValueError, match="MaskingCollator"):
        objective(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="before the objective is made"):
        objective.resize_token_embeddings(99)
    for wrong in ({"label_original": 2}, {"temperature": 0}, {"embedding_sharing": "none"}, {"target_share": 0}):
        with pytest.raises(Exception, match=next(iter(wrong))):
            ReplacedTokenObjectiveConfig(**wrong)
