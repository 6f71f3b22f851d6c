"""The dictionary of notes by itself: mixing, taking and moving against plain loops, and what it keeps."""

import pytest
import torch

from hf_efficient.objectives.notes import NoteDictionary, NoteSettings, flatten_spans
from hf_efficient.objectives.notes import updates as note_updates


KEYS = [(5, 6), (7,), (8, 9, 10), (11, 12), (13,)]
# Adjacent words, the same word twice in a row and in a column, both ends of a row, and a row without any.
SPANS = torch.tensor(
    [(0, 0, 2, 0), (0, 2, 3, 1), (0, 3, 4, 1), (0, 4, 7, 2), (2, 1, 3, 0), (2, 10, 11, 1), (3, 2, 5, 2), (3, 5, 7, 0)]
)


def make_notes(hidden=6, dtype=torch.float64, **settings):
    return NoteDictionary(KEYS, hidden, NoteSettings(**settings), dtype=dtype, seed=3)


def loop_window(hidden, mask, span, half_window):
    row, start, end, _ = span.tolist()
    columns = range(max(start - half_window, 0), min(end + half_window, hidden.shape[1]))
    states = [hidden[row, column] for column in columns if mask[row, column]]
    return sum(states) / len(states)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("spans", [SPANS, SPANS[:1], SPANS[:0]])
def test_blend_is_a_plain_loop(spans, scale):
    notes = make_notes(note_weight=0.3, scale_to_tokens=scale)
    embeds = torch.randn(4, 11, 6, dtype=torch.float64, requires_grad=True)
    blended, norms = notes.mix_in(embeds, spans)
    expected, note_norms, token_norms = embeds.detach().clone(), [], []
    gradient = torch.ones_like(embeds)
    for row, start, end, key in spans.tolist():
        for column in range(start, end):
            token, note = embeds[row, column].detach(), notes.values[key]
            if scale:
                note = note / note.norm() * token.norm()
            expected[row, column] = 0.7 * token + 0.3 * note
            gradient[row, column] = 0.7
            note_norms.append(note.norm())
            token_norms.append(token.norm())
    torch.testing.assert_close(blended, expected, rtol=0, atol=1e-14)
    (grad,) = torch.autograd.grad(blended.sum(), embeds)
    torch.testing.assert_close(grad, gradient, rtol=0, atol=1e-14)
    if len(spans):
        torch.testing.assert_close(norms["note_norm"], torch.stack(note_norms).mean())
        torch.testing.assert_close(norms["token_norm"], torch.stack(token_norms).mean())
    else:
        assert blended is embeds
        assert norms["note_norm"].isnan()


@pytest.mark.parametrize("half_window", [0, 2, 16])
@pytest.mark.parametrize("padding", ["none", "right", "left and inside"])
def test_pooled_context_is_that_of_a_plain_loop(half_window, padding):
    notes = make_notes(half_window=half_window)
    hidden = torch.randn(4, 11, 6, dtype=torch.float64)
    mask = torch.ones(4, 11, dtype=torch.int64)
    if padding == "right":
        mask[0, 7:] = mask[3, 7:] = 0
    if padding == "left and inside":
        mask[2, 0] = mask[2, 4:6] = mask[3, :2] = 0
    hidden[mask == 0] = torch.nan  # what stands in padding is nobody's business
    taken = notes.pool_context(hidden, None if padding == "none" else mask, SPANS)
    expected = torch.stack([loop_window(hidden, mask, span, half_window) for span in SPANS])
    torch.testing.assert_close(taken, expected, rtol=0, atol=1e-14)
    one = SPANS[SPANS[:, 0] == 2]
    alone = notes.pool_context(hidden[2:3], mask[2:3], torch.cat([torch.zeros_like(one[:, :1]), one[:, 1:]], 1))
    torch.testing.assert_close(alone, expected[SPANS[:, 0] == 2], rtol=0, atol=1e-14)


def test_take_sums_half_precision_in_float32():
    notes = make_notes(dtype=torch.float32)
    hidden = torch.randn(4, 11, 6).bfloat16()
    taken = notes.pool_context(hidden, None, SPANS)
    expected = torch.stack([loop_window(hidden.double(), torch.ones(4, 11), span, 16) for span in SPANS])
    torch.testing.assert_close(taken.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("update", ["mean", "occurrence"])
def test_updates_are_a_plain_loop_and_do_not_depend_on_the_split(update):
    taken = torch.randn(len(SPANS), 6, dtype=torch.float64)
    whole, parts = (make_notes(update=update, gamma=0.2) for _ in range(2))
    expected = whole.values.clone()
    if update == "mean":
        for key in SPANS[:, 3].unique():
            expected[key] = 0.8 * expected[key] + 0.2 * taken[SPANS[:, 3] == key].mean(0)
    else:
        for note, key in zip(taken, SPANS[:, 3], strict=True):
            expected[key] = 0.8 * expected[key] + 0.2 * note
    whole.enqueue(SPANS[:, 3], taken)
    whole.apply_updates()
    torch.testing.assert_close(whole.values, expected, rtol=0, atol=1e-14)
    for part in torch.arange(len(SPANS)).split([3, 0, 1, 4]):
        parts.enqueue(SPANS[part, 3], taken[part])
    parts.apply_updates()
    torch.testing.assert_close(parts.values, expected, rtol=0, atol=1e-14)
    assert parts.updates.tolist() == whole.updates.tolist()
    assert whole.updates.tolist() == ([1, 1, 1, 0, 0] if update == "mean" else [3, 3, 2, 0, 0])
    before = whole.values.clone()
    whole.apply_updates()  # nothing is left
    assert torch.equal(whole.values, before)


def test_notes_that_are_not_finite_are_dropped():
    notes = make_notes()
    before = notes.values.clone()
    taken = torch.zeros(3, 6, dtype=torch.float64)
    taken[0, 1], taken[1, 2] = torch.nan, torch.inf
    notes.enqueue(torch.tensor([0, 1, 1]), taken)
    notes.apply_updates()
    assert torch.equal(notes.values[0], before[0])
    torch.testing.assert_close(notes.values[1], 0.9 * before[1])
    assert notes.updates.tolist() == [0, 1, 0, 0, 0]


def test_notes_that_nobody_applies_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(note_updates, "MOST_WAITING", 2)
    notes = make_notes()
    for _ in range(2):
        notes.enqueue(torch.tensor([0]), torch.zeros(1, 6))
    with pytest.raises(RuntimeError, match="apply_updates"):
        notes.enqueue(torch.tensor([0]), torch.zeros(1, 6))


def test_notes_keep_their_dtype_and_are_no_parameters():
    notes = make_notes(dtype=torch.float32)
    before = notes.values.clone()
    assert not list(notes.parameters())
    holder = torch.nn.ModuleList([notes]).to(torch.bfloat16).half()
    assert notes.values.dtype == torch.float32
    assert torch.equal(notes.values, before)
    assert set(holder.state_dict()) == {"0.bits", "0.updates", "0.steps", "0.key_ids", "0.key_lengths"}
    assert not any(buffer.is_floating_point() for buffer in holder.buffers())  # FSDP casts those
    embeds = torch.randn(4, 11, 6).bfloat16()
    assert notes.mix_in(embeds, SPANS)[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="float32 or float64"):
        make_notes(dtype=torch.float16)


def test_rows_stay_on_the_cpu_if_asked_to():
    kept, moved = make_notes(keep_on_cpu=True), make_notes()
    with torch.device("meta"):
        holder = torch.nn.ModuleList([kept, moved])
    holder.to("meta")
    assert kept.values.device.type == "cpu"
    assert moved.values.device.type == "meta"


def test_first_notes_belong_to_the_seed_alone():
    first = make_notes().values
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(make_notes().values, first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(NoteDictionary(KEYS, 6, seed=4, dtype=torch.float64).values, first)


def test_own_file_is_exact_and_whole(tmp_path):
    notes = make_notes(update="occurrence", half_window=3, start_step=2)
    notes.enqueue(torch.tensor([3]), torch.randn(1, 6))
    notes.apply_updates()
    path = notes.save(tmp_path / "run")
    assert [file.name for file in (tmp_path / "run").iterdir()] == [path.rsplit("/", 1)[-1]]
    again = NoteDictionary.load(tmp_path / "run")
    assert again.settings == notes.settings
    assert again.keys == KEYS
    assert again.values.dtype == torch.float64
    assert all(torch.equal(value, notes.state_dict()[name]) for name, value in again.state_dict().items())
    assert NoteDictionary.load(tmp_path / "run", gamma=0.5).settings.gamma == 0.5
    with pytest.raises(FileNotFoundError, match="no notes"):
        NoteDictionary.load(tmp_path)


def test_notes_on_other_words_are_refused():
    state = make_notes().state_dict()
    other = NoteDictionary([*KEYS[:-1], (14,)], 6, dtype=torch.float64)
    before = other.values.clone()
    with pytest.raises(RuntimeError, match="taken on other words"):
        other.load_state_dict(state)
    with pytest.raises(RuntimeError, match="another dtype"):
        make_notes(dtype=torch.float32).load_state_dict(state)
    assert torch.equal(other.values, before)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"gamma": 0.0}, "gamma"),
        ({"note_weight": 1.1}, "note_weight"),
        ({"half_window": -1}, "half_window"),
        ({"update": "last"}, "occurrence"),
    ],
)
def test_settings_out_of_range(settings, named):
    with pytest.raises(ValueError, match=named):
        NoteSettings(**settings)


@pytest.mark.parametrize("keys", [[], [(1, 2), (1, 2)], [()]], ids=["no key", "one key twice", "an empty key"])
def test_keys_must_be_distinct_words(keys):
    with pytest.raises(ValueError, match="distinct words"):
        NoteDictionary(keys, 4)


def test_spans_of_a_batch_are_flattened_in_order():
    note_spans = torch.tensor([[[1, 3, 0], [3, 4, 2]], [[-1, -1, -1], [-1, -1, -1]], [[2, 3, 1], [-1, -1, -1]]])
    assert flatten_spans(note_spans).tolist() == [[0, 1, 3, 0], [0, 3, 4, 2], [2, 2, 3, 1]]
    assert flatten_spans(note_spans[:, :0]).shape == (0, 4)


def test_a_state_from_before_the_start_is_not_read():
    """Whether notes are mixed in is looked up once, and anew after a state is loaded."""
    notes = make_notes(start_step=3)
    early = {name: tensor.clone() for name, tensor in notes.state_dict().items()}
    for _ in range(3):
        assert not notes.reading
        notes.apply_updates()
    assert notes.reading
    notes.load_state_dict(early)
    assert not notes.reading


def test_occurrences_move_notes_in_the_order_of_batches_over_processes(monkeypatch):
    """The first batches of all processes come before the second ones, as in a run of one process."""
    queues = [note_updates.PendingNotes(6, torch.float64, "occurrence") for _ in range(2)]
    batches = [[(0, 1.0), (1, 2.0)], [(0, 3.0)], [(0, 4.0)], [(1, 5.0), (0, 6.0)]]
    for place, batch in enumerate(batches):  # dealt out in turn
        keys, values = zip(*batch, strict=True)
        vectors = torch.tensor(values, dtype=torch.float64)[:, None].expand(-1, 6)
        queues[place % 2].add(torch.tensor(keys), vectors)
    own = [queue._own(torch.device("cpu")) for queue in queues]
    monkeypatch.setattr(note_updates.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(note_updates.dist, "get_world_size", lambda: 2)
    gathered = iter(zip(*own, strict=True))
    monkeypatch.setattr(note_updates, "_gather_rows", lambda rows: list(next(gathered)))
    cpu = torch.device("cpu")
    seen: dict[int, list[float]] = {0: [], 1: []}
    for keys, vectors in queues[0].steps(cpu, cpu):
        for key, vector in zip(keys.tolist(), vectors, strict=True):
            seen[key].append(vector[0].item())
    assert seen == {0: [1.0, 3.0, 4.0, 6.0], 1: [2.0, 5.0]}
