"""Replays the cases recorded from the original MC-BERT code: integers exactly, losses, and every gradient by name."""

import pytest
import torch
from torch import nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from hf_efficient.objectives import meta_controller
from hf_efficient.objectives.convert_mcbert import convert_state_dict, infer_config, restore_state_dict
from hf_efficient.objectives.generator import TiedEmbeddingGenerator
from hf_efficient.objectives.meta_controller import MetaControllerObjective, MetaControllerObjectiveConfig
from hf_efficient.objectives.replaced_token import ReplacedTokenObjective, ReplacedTokenObjectiveConfig
from tests.golden.mcbert_cases import CASES, Case, OriginalForSequenceClassification, case_names
from tests.helpers.comparison import assert_allclose


ATTENTION = ["eager", "sdpa"]

pytestmark = pytest.mark.golden

# Our option <- the case's.
DIVIDERS = {"mcbert_pretrain": "controller_size_divider", "electra_pretrain": "generator_size_divider"}
PRETRAINING = {"mcbert_pretrain": MetaControllerObjective, "electra_pretrain": ReplacedTokenObjective}
LOGITS, LOSSES = {"atol": 2e-5, "rtol": 1e-4}, {"atol": 2e-5, "rtol": 1e-5}


def check_output(case: Case, name: str, ours: torch.Tensor, dims: int = 0, **tolerance: float):
    """What the case has under this name, at positions that are no padding; `ours` is `(batch, length, ...)` with `dims`
    dimensions besides, or has these positions alone."""
    if name in case.outputs:
        ours = ours[case.real] if ours.dim() == dims + 2 else ours
        assert_allclose(name, ours, case.outputs[name][case.real], **tolerance)
        case.unseen.discard(name)


def make_config(case: Case):
    encoder_config = case.encoder_config()
    if case.kind == "mcbert_finetune_classification":
        return encoder_config
    divider = case.options[DIVIDERS[case.kind]]
    fields = {
        "encoder_config": encoder_config.to_dict(),
        "generator_divider": divider,
        "generator_num_attention_heads": case.options["num_attention_heads"] // divider,
    }
    if case.kind == "mcbert_pretrain":
        fields |= {"num_candidates": case.options["num_candidates"], "loss_weight": case.options["loss_lambda"]}
        return MetaControllerObjectiveConfig(**fields, nota_token_id=case.options["neither_id"])
    return ReplacedTokenObjectiveConfig.preset(
        "mcbert_baseline", **fields, discriminator_weight=case.options["loss_lambda"]
    )


def load(case: Case, model: nn.Module, config) -> nn.Module:
    """The model with the case's weights; only what the case says is unused may find no place."""
    converted = convert_state_dict(case.weights, config)
    own = dict(model.named_parameters())
    unused = set(convert_state_dict({name: case.weights[name] for name in case.unused}, config))
    assert set(converted) - unused == set(own), sorted((set(converted) - unused) ^ set(own))
    model.load_state_dict({name: converted[name] for name in own}, strict=False)
    return model.eval()


def compare_gradients(case: Case, model: nn.Module, config):
    expected = convert_state_dict(case.grads, config)
    for name in convert_state_dict({name: case.grads[name] for name in case.unused}, config):
        assert not expected.pop(name).any(), name
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    # The original has no token types; here there is one, which is not trained there.
    ours, expected = (
        {name: grad for name, grad in grads.items() if "token_type_embeddings" not in name}
        for grads in (ours, expected)
    )
    assert set(ours) == set(expected), f"gradients: {sorted(set(ours) ^ set(expected))}"
    for name, grad in expected.items():
        assert ours[name] is not None, f"no gradient of {name}"
        # Float32 sums over a batch are off by a little of their largest terms.
        atol = max(1e-5, 1e-6 * grad.abs().max().item())
        assert_allclose(f"gradient of {name}", ours[name], grad, atol, rtol=1e-3)


def build_objective(case: Case, attention: str) -> tuple[nn.Module, TiedEmbeddingGenerator]:
    config = make_config(case)
    model = PRETRAINING[case.kind](config)
    small = model.generator
    for encoder in (model.encoder, small.network):
        encoder.set_attn_implementation(attention)
    return load(case, model, config), small


def record(monkeypatch, owner, name: str) -> list:
    """What a function or method that is still called returns from now on, with its arguments."""
    calls, function = [], getattr(owner, name)

    def recorded(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append((args, result))
        return result

    monkeypatch.setattr(owner, name, recorded)
    return calls


def check_generator(case: Case, small: TiedEmbeddingGenerator, table: torch.Tensor, bias: torch.Tensor):
    batch = case.batch()
    states = small.states(batch["input_ids"], batch["attention_mask"], table)
    logits = small.transform(states) @ small.project(table).T + bias
    check_output(case, "controller_logits_all", logits, 1, **LOGITS)
    for name in ("controller_logits_masked", "generator_logits_masked"):
        if name in case.outputs:
            assert_allclose(name, logits[case.masked], case.outputs[name], **LOGITS)
            case.unseen.discard(name)


def check_loss(case: Case, loss: torch.Tensor, name: str):
    assert_allclose(name, loss.detach(), torch.tensor(case.scalars[name], dtype=loss.dtype), **LOSSES)


def check_electra(case: Case, attention: str, monkeypatch):
    model, generator = build_objective(case, attention)
    check_generator(case, generator, model.get_input_embeddings().weight, generator.bias)
    encoded = record(monkeypatch, model, "encode")
    detected = record(monkeypatch, model, "discriminator_logits")
    output = model(**case.batch())
    ((replaced_ids, _), _), (_, logits) = encoded[0], detected[0]
    check_output(case, "replaced_ids", replaced_ids)
    check_output(case, "is_original", (replaced_ids == case.inputs["target_ids"]).long())
    check_output(case, "discriminator_logits", logits, **LOGITS)
    check_loss(case, output.generator_loss, "mlm_loss_mean")
    check_loss(case, output.discriminator_loss, "rtd_loss_mean")
    check_loss(case, output.loss, "total_loss_normalised")
    output.loss.backward()
    compare_gradients(case, model, model.config)


def check_mcbert(case: Case, attention: str, monkeypatch):
    model, controller = build_objective(case, attention)
    check_generator(case, controller, model.get_input_embeddings().weight, model.bias)
    built = record(monkeypatch, meta_controller, "build_candidates")
    scored = record(monkeypatch, model, "score")
    output = model(**case.batch())
    ((_, replaced_ids, *_), (candidates, labels)), ((states, _), scores) = built[0], scored[0]
    check_output(case, "replaced_ids", replaced_ids)
    check_output(case, "candidate_ids", candidates, 1)
    check_output(case, "labels", labels)
    check_output(case, "backbone_hidden", states, 1, **LOGITS)
    check_output(case, "kway_logits", scores, 1, **LOGITS)
    check_loss(case, output.generator_loss, "mlm_loss_mean")
    check_loss(case, output.discriminator_loss, "kway_loss_mean")
    check_loss(case, output.loss, "total_loss_normalised")
    output.loss.backward()
    compare_gradients(case, model, model.config)


def check_classification(case: Case, attention: str, monkeypatch):
    config = make_config(case)
    plain = type(config) is RobertaConfig
    model_class = RobertaForSequenceClassification if plain else OriginalForSequenceClassification
    model = load(case, model_class._from_config(config, attn_implementation=attention), config)
    ids, labels, real = case.inputs["input_ids"], case.inputs["labels"], case.real
    output = model(ids, attention_mask=real.long(), labels=labels, output_hidden_states=True)
    check_output(case, "hidden", output.hidden_states[-1], 1, **LOGITS)
    assert_allclose("logits", output.logits, case.outputs["logits"], **LOGITS)
    case.unseen.discard("logits")
    check_loss(case, output.loss, "loss_mean")
    output.loss.backward()
    compare_gradients(case, model, config)


CHECKS = {
    "mcbert_pretrain": check_mcbert,
    "electra_pretrain": check_electra,
    "mcbert_finetune_classification": check_classification,
}


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", case_names(), ids=lambda name: f"mcbert-{name}")
def test_case(name: str, attention: str, monkeypatch):
    case = Case(name)
    CHECKS[case.kind](case, attention, monkeypatch)
    assert not case.unseen, f"outputs that this test does not compare: {sorted(case.unseen)}"


@pytest.mark.parametrize("name", case_names(), ids=lambda name: f"mcbert-{name}")
def test_restore_inverts_convert(name: str):
    """With the tensors that a case holds, and with all the names under which the original's own files have them."""
    case = Case(name)
    config = make_config(case)
    everything = {**case.weights, **{alias: case.weights[source] for alias, source in case.aliases.items()}}
    for original, aliases in ((case.weights, False), (everything, bool(case.aliases))):
        restored = restore_state_dict(convert_state_dict(original, config), config, aliases=aliases)
        assert set(restored) == set(original)
        for key, tensor in original.items():
            assert torch.equal(restored[key], tensor), key
            assert restored[key].dtype == tensor.dtype


@pytest.mark.parametrize("name", case_names(), ids=lambda name: f"mcbert-{name}")
def test_a_checkpoint_tells_its_config(name: str):
    """All but what no tensor tells, which is given here."""
    case = Case(name)
    heads, pad = case.options["num_attention_heads"], case.options["pad_id"]
    if not case.options.get("embedding_layer_norm", True):
        with pytest.raises(ValueError, match="no norm of its embeddings"):
            infer_config(case.weights, heads)
        return
    told, said = infer_config(case.weights, heads), make_config(case)
    assert isinstance(said, type(told))
    told, said = (getattr(config, "encoder_config", None) or config.to_dict() for config in (told, said))
    for field in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings"):
        assert told[field] == said[field], field
    assert told["pad_token_id"] == pad


def test_there_are_cases():
    assert case_names(), f"no golden cases in {CASES}"
