"""Labels, counts and batches that no head can make sense of: each head says so, and is left as it was."""

import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import DynamicCache

from hf_efficient.auto import FAMILIES
from hf_efficient.objectives.replaced_token import ReplacedTokenObjective, ReplacedTokenObjectiveConfig
from tests.helpers.fuzzing.subjects import OBJECTIVES, VARIANTS, Key, build, fits, heads


HEADS = [(family, head) for family in FAMILIES for head in heads(family)]
TAUGHT = [(family, head) for family, head in HEADS if not head.endswith("Model")]
BATCH, LENGTH = 2, 5


def model_of(family, head, problem="inferred-classes"):
    variant = next(name for name in VARIANTS[family] if fits(family, head, name))
    problem = problem if head.endswith("SequenceClassification") else None
    return build(Key(family, head, variant, problem, None, torch.float32)).model


def call_of(head, **labels):
    """A right call of a head, with the given labels in the place of all its own."""
    ids = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) + 3
    ids[:, 0] = 0
    by_row = head.endswith(("SequenceClassification", "MultipleChoice", "QuestionAnswering"))
    right = (
        torch.ones(BATCH, dtype=torch.int64) if by_row else torch.ones_like(ids).index_fill(1, torch.tensor(0), -100)
    )
    names: tuple[str, ...] = ("start_positions", "end_positions") if head.endswith("QuestionAnswering") else ("labels",)
    names = () if head.endswith("Model") else names
    if head.endswith("MultipleChoice"):
        ids = ids[:, None].expand(-1, 2, -1)
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if head == "TerraformerModel" else {})}
    return {**inputs, **dict.fromkeys(names, right), **dict.fromkeys(names if labels else (), *labels.values())}


WRONG_LABELS = {
    "a string": (TypeError, lambda right: "0"),
    "a list": (TypeError, lambda right: right.tolist()),
    "complex": (ValueError, lambda right: right.to(torch.complex64)),
    "of another shape": (ValueError, lambda right: right[None, None]),
    "on the meta device": (ValueError, lambda right: right.to("meta")),
    "too large": (ValueError, lambda right: right + 1000),
    "negative": (ValueError, lambda right: right.masked_fill(right != -100, -5)),
}


@pytest.mark.parametrize("kind", WRONG_LABELS)
@pytest.mark.parametrize(("family", "head"), TAUGHT)
def test_wrong_labels(family, head, kind):
    if head.endswith("QuestionAnswering") and kind in ("too large", "negative"):
        pytest.skip("an answer outside the input is no target")
    model = model_of(family, head)
    error, spoil = WRONG_LABELS[kind]
    right = call_of(head)
    names = set(right) - {"input_ids"}
    # An objective's error shows what it got instead.
    error = (TypeError, ValueError) if head in OBJECTIVES else error
    with pytest.raises(error, match="|".join(names)):
        model(**call_of(head, labels=spoil(right[min(names)])))
    assert model(**right).loss.isfinite()
    model.config.problem_type = None


@pytest.mark.parametrize(("family", "head"), TAUGHT)
def test_numbers_of_targets(family, head):
    model, call = model_of(family, head), call_of(head)
    for wrong in (-3, float("nan"), float("inf"), "4", [4], torch.tensor(-3), torch.tensor([1, 2])):
        with pytest.raises((TypeError, ValueError), match="num_items_in_batch must be"):
            model(**call, num_items_in_batch=wrong)
    for right in (
        3,
        1.5,
        torch.tensor(3),
        torch.tensor([1.5]),
    ):  # processes may share one, and replicas get a list of it
        assert model(**call, num_items_in_batch=right).loss.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("labels", [torch.zeros(3).long(), torch.tensor([0, 9]), torch.zeros(2, 7)], ids=repr)
def test_labels_that_are_refused_say_nothing_of_the_problem(family, labels):
    model = model_of(family, next(head for head in heads(family) if head.endswith("SequenceClassification")))
    model.config.problem_type = None
    with pytest.raises(ValueError, match="labels"):
        model(torch.tensor([[0, 5], [0, 6]]), labels=labels)
    assert model.config.problem_type is None


@pytest.mark.parametrize(("family", "head"), HEADS)
def test_a_batch_without_rows(family, head):
    call = {name: tensor[:0] for name, tensor in call_of(head).items()}
    with pytest.raises(ValueError, match=r"input_ids has shape .*without rows"):
        model_of(family, head)(**call)


@pytest.mark.parametrize("name", ["input_ids", "attention_mask"])
@pytest.mark.parametrize(("family", "head"), HEADS)
def test_inputs_without_values(family, head, name):
    call = call_of(head)
    call["attention_mask"] = torch.ones_like(call["input_ids"])
    call[name] = call[name].to("meta")
    with pytest.raises(ValueError, match=f"({name}|labels) is on the meta device and holds no values"):
        model_of(family, head)(**call)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_values_takes_a_mask(family):
    head = next(head for head in heads(family) if head.endswith("Model"))
    config = model_of(family, head).config
    with torch.device("meta"):
        model = FAMILIES[family].load(head)(config)
        call = {name: torch.zeros(3, 5).long() for name in call_of(head)}
        output = model(**call, attention_mask=torch.ones(3, 5))
    assert output.last_hidden_state.is_meta
    assert output.last_hidden_state.shape == (3, 5, config.hidden_size)


def test_a_call_that_goes_on_from_a_cache_can_be_differentiated():
    model = model_of("srupp", "SruppForCausalLM")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([[0, 5, 6]]), cache=cache)
    output = model(torch.tensor([[7, 8]]), cache=cache, labels=torch.tensor([[7, 8]]))
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    model.zero_grad()


NONSENSE = [
    ("srupp", "num_hidden_layers", -1, "num_hidden_layers must be at least 1, not -1"),
    ("srupp", "highway_bias", float("nan"), "highway_bias must be finite, not nan"),
    ("srupp", "attention_layers", [1, 1], "attention_layers names layer 1 more than once"),
    ("scaling_transformer", "num_hidden_layers", -1, "num_hidden_layers must be at least 1, not -1"),
    ("scaling_transformer", "attention_sparsity", 3, "attention_sparsity wants an attention_type"),
    (
        "terraformer",
        "encoder_swaps",
        3,
        "encoder_swaps must be at most 2, not 3",
    ),
    ("terraformer", "decoder_type", "joint", "decoder_type is 'joint'.*Did you mean 'joined'"),
    ("tupe", "num_hidden_layers", -1, "num_hidden_layers must be at least 1, not -1"),
    ("tupe", "layer_norm_eps", float("nan"), "layer_norm_eps must be finite and at least 0, not nan"),
    ("tupe", "hidden_act", "gelo", "hidden_act is 'gelo'.*Did you mean 'gelu'"),
]


@pytest.mark.parametrize(("family", "name", "value", "message"), NONSENSE)
def test_a_config_that_was_changed_to_nonsense_builds_no_model(family, name, value, message, tmp_path):
    head = next(head for head in heads(family) if head.endswith("SequenceClassification"))
    model_class, config = FAMILIES[family].load(head), copy.deepcopy(model_of(family, head).config)
    config.save_pretrained(tmp_path)
    setattr(config, name, value)
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        model_class(config)
    model_of(family, head).save_pretrained(tmp_path)
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        model_class.from_pretrained(tmp_path, **{name: value})


def test_an_objective_checks_its_config_as_well():
    encoder = model_of("tupe", "TupeModel")
    config = ReplacedTokenObjectiveConfig(encoder_config=encoder.config.to_dict())
    config.temperature = -1.0
    with pytest.raises((ValueError, StrictDataclassError), match=r"temperature must be positive, not -1"):
        ReplacedTokenObjective(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_labels_and_no_such_problem(family):
    head = next(head for head in heads(family) if head.endswith("SequenceClassification"))
    model = copy.deepcopy(model_of(family, head))
    model.config.num_labels = -1
    with pytest.raises((ValueError, StrictDataclassError), match="num_labels must be at least 1"):
        type(model)(model.config)
    model = copy.deepcopy(model_of(family, head))
    model.config.__dict__["problem_type"] = "regresion"  # some releases check the assignment
    with pytest.raises((ValueError, StrictDataclassError), match=r"problem_type.*'regresion'"):
        type(model)(model.config)
    with pytest.raises(ValueError, match=r"problem_type is 'regresion'.*Did you mean 'regression'"):
        model(torch.tensor([[0, 5]]), labels=torch.rand(1, model.num_labels))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("problem", "value"),
    [
        *(("multi_label_classification", value) for value in (3.0, -0.5, float("nan"), float("inf"))),
        *(("regression", value) for value in (float("nan"), float("inf"), -float("inf"))),
    ],
)
def test_labels_that_no_loss_can_be_made_of(family, problem, value):
    head = next(head for head in heads(family) if head.endswith("SequenceClassification"))
    model = copy.deepcopy(model_of(family, head))
    model.config.problem_type = problem
    ids, labels = torch.tensor([[0, 5], [0, 6]]), torch.rand(2, model.num_labels)
    labels[0, -1] = -100
    assert model(ids, labels=labels).loss.isfinite()
    labels[1, 0] = value
    with pytest.raises(ValueError, match=f"labels hold {value}, but must be"):
        model(ids, labels=labels)
