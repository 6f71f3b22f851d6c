"""The demo page: what its models answer, and each tab clicked through in a browser where one is installed."""

import importlib
import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from hf_efficient import (
    ScalingTransformerConfig,
    ScalingTransformerForCausalLM,
    SruppConfig,
    SruppForCausalLM,
    TerraformerConfig,
    TerraformerForConditionalGeneration,
    TupeConfig,
    TupeForMaskedLM,
)
from hf_efficient.data.byte_tokenizer import byte_tokenizer
from hf_efficient.data.tokenizers import seq2seq_tokenizer, train_tokenizer


SPACE = Path(__file__).parents[3] / "training" / "examples" / "space"
TEXT = ["the old dog sees a red bird .", "a young cat hears the blue river .", "the bird sings in the tree ."]
SPARSE = {"ff_sparsity": 4, "ff_rank": 4, "attention_type": "multiplicative_conv", "attention_sparsity": 4}


@pytest.fixture(scope="module")
def answers():
    """The module, which lies beside the page as it does on the Hub."""
    sys.path.insert(0, str(SPACE))
    yield importlib.import_module("answers")
    sys.path.remove(str(SPACE))


def ids_of(tokenizer):
    """Fields of a config."""
    return {
        "vocab_size": len(tokenizer),
        "cls_token_id": tokenizer.cls_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a tiny model of random weights for each tab."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models")
    words, pieces, characters = train_tokenizer(TEXT, vocab_size=80), seq2seq_tokenizer(TEXT, 290), byte_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "max_position_embeddings": 300}
    scaling = {**sizes, "vocab_size": len(characters), "num_hidden_layers": 2}
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 1}
    configs = {
        "fill": (TupeForMaskedLM, TupeConfig(**sizes, **ids_of(words), num_hidden_layers=1), words),
        "write": (
            SruppForCausalLM,
            SruppConfig(vocab_size=len(characters), hidden_size=32, projection_size=16, num_hidden_layers=2,
                        num_attention_heads=2),
            characters,
        ),
        "dense": (ScalingTransformerForCausalLM, ScalingTransformerConfig(**scaling), characters),
        "sparse": (ScalingTransformerForCausalLM, ScalingTransformerConfig(**scaling, **SPARSE), characters),
        "summarize": (
            TerraformerForConditionalGeneration,
            TerraformerConfig(**sizes, **layers, **SPARSE, vocab_size=len(pieces)),
            pieces,
        ),
    }  # fmt: skip
    for name, (cls, config, tokenizer) in configs.items():
        cls(config).save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
    return path


@pytest.fixture
def models(answers, root):
    return answers.Models(answers.find_folders(root, {}))


@pytest.mark.parametrize("mask", ["[MASK]", "<mask>", "___", "______"])
def test_each_mask_gets_its_likeliest_words(answers, models, mask):
    found = answers.fill_mask(models, f"the old {mask} sees a {mask} .", count=3)
    assert [len(words) for words in found] == [3, 3]
    for words in found:
        chances = [chance for _, chance in words]
        assert chances == sorted(chances, reverse=True)
        assert 0 < chances[-1] <= chances[0] < 1


def test_writing_streams_and_is_the_models_own_text(answers, models):
    texts = list(answers.write(models, "the old", 7, temperature=0))
    assert len(texts) >= 2
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    model, tokenizer = models.load("write")
    ids = tokenizer("the old", return_tensors="pt", add_special_tokens=False)["input_ids"]
    whole = model.generate(ids, max_new_tokens=7, do_sample=False)
    assert texts[-1] == "the old" + tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)


def test_writing_stops_when_nobody_reads(answers, models, monkeypatch):
    model, _ = models.load("write")
    calls = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    writing = answers.write(models, "the old", 400, temperature=1.0)
    next(writing)
    writing.close()
    assert len(calls) < 400


def test_dense_and_sparse_get_the_same_time(answers, models):
    for dense, sparse in answers.side_by_side(models, "the old", 9):
        assert max(len(dense.tokens), len(sparse.tokens)) <= 9
    assert (len(dense.tokens), len(sparse.tokens)) == (9, 9)
    for one in (dense, sparse):
        whole = one.model.generate(one.ids, max_new_tokens=9, do_sample=False)
        assert whole[0, one.ids.shape[1] :].tolist() == one.tokens
        assert re.fullmatch(r"\*\*[\d.]+ tokens/s\*\*, [\d.]+ MB read for a token", one.figures())
    assert sparse.bytes_a_token < dense.bytes_a_token


def test_a_long_document_is_summarised_in_pieces(answers, models):
    text = answers.summarize(models, " ".join(TEXT) * 40, 5)
    assert isinstance(text, str)
    assert text


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda a, m: a.fill_mask(m, "no mask here"), "Write \\[MASK\\] where a word is missing"),
        (lambda a, m: a.fill_mask(m, " \n "), "Write something first"),
        (lambda a, m: a.fill_mask(m, None), "Write something first"),
        (lambda a, m: a.fill_mask(m, "___ " * 2000), "8,000 characters; this page takes up to 4,000"),
        (lambda a, m: a.fill_mask(m, "___ " * 900), "this model reads 300"),
        (lambda a, m: list(a.write(m, "", 5, 1.0)), "Write something first"),
        (lambda a, m: list(a.side_by_side(m, "x" * 299, 5)), "room for 300, and 5 are to be written"),
        (lambda a, m: a.summarize(m, "x" * 200_001, 5), "takes up to 200,000"),
    ],
    ids=["no-mask", "empty", "none", "too-long", "too-many-tokens", "no-prompt", "no-room", "huge-document"],
)
def test_what_cannot_be_answered_is_said(answers, models, ask, message):
    with pytest.raises(answers.PageError, match=message):
        ask(answers, models)


@pytest.mark.parametrize(
    "text", ["\x00 ___", "___ \ud83d\ude00", "مرحبا ___", "<script>alert(1)</script> ___", "___" * 50]
)
def test_odd_text_is_read(answers, models, text):
    assert answers.fill_mask(models, text)
    assert list(answers.write(models, text, 3, 0))


def test_missing_models_are_named_with_what_makes_them(answers, tmp_path):
    models = answers.Models(answers.find_folders(tmp_path, {}))
    with pytest.raises(
        answers.PageError, match=r"no model `fill` here\. Train one \(`hf-efficient pretrain tupe_small`"
    ):
        answers.fill_mask(models, "a ___")
    with pytest.raises(answers.PageError, match="`dense` and `sparse`"):
        next(answers.side_by_side(models, "a", 3))


def test_a_folder_that_is_given_has_to_hold_a_model(answers, tmp_path):
    with pytest.raises(answers.PageError, match=r"holds no model: it has no config\.json"):
        answers.find_folders(tmp_path, {"fill": tmp_path})


def test_a_broken_model_is_named(answers, root, tmp_path):
    shutil.copytree(root / "fill", tmp_path / "fill")
    (tmp_path / "fill" / "model.safetensors").write_bytes(b"broken")
    models = answers.Models(answers.find_folders(tmp_path, {}))
    with pytest.raises(answers.PageError, match="The model `fill` cannot be loaded"):
        answers.fill_mask(models, "a ___")


def test_the_page_describes_itself_as_a_space():
    head = (SPACE / "README.md").read_text(encoding="utf-8").split("---")[1]
    fields = dict(line.split(": ", 1) for line in head.strip().splitlines())
    assert fields["sdk"] == "gradio"
    assert (SPACE / fields["app_file"]).is_file()
    assert len(fields["short_description"]) <= 60
    needed = (SPACE / "requirements.txt").read_text(encoding="utf-8")
    assert f"gradio>={fields['sdk_version'].split('.')[0]}.0" in needed


@pytest.fixture
def page(root, tmp_path):
    """The address of the page, in a process of its own."""
    pytest.importorskip(
        "gradio", reason="gradio is not installed: pip install -r training/examples/space/requirements.txt"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "PYTHONPATH": str(SPACE.parents[2]), "GRADIO_TEMP_DIR": str(tmp_path)}
    command = [sys.executable, str(SPACE / "app.py"), str(root), "--port", str(port)]
    with (
        open(tmp_path / "log.txt", "w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path) as process,
    ):
        try:
            wait_for(address, process, tmp_path / "log.txt")
            yield address
        finally:
            process.terminate()


def wait_for(address, process, log):
    for _ in range(240):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(address, timeout=2).close()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"The page did not come up: {log.read_text()}")


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.mark.timeout(400)
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "screen"])
def test_every_tab_answers_in_a_browser(page, width, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    pictures = Path(os.environ.get("HF_EFFICIENT_PICTURES", tmp_path))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=OPTIONS)
        view = browser.new_page(viewport={"width": width, "height": 844})
        outside = []
        view.on(
            "request", lambda sent: None if sent.url.startswith((page, "data:", "blob:")) else outside.append(sent.url)
        )
        view.goto(page)
        view.get_by_role("button", name="Fill", exact=True).wait_for()

        def click(tab, button, answer, done):
            view.get_by_role("tab", name=tab, exact=True).click()
            view.get_by_role("button", name=button, exact=True).filter(visible=True).click()
            place = view.locator(answer)

            def read():
                areas = place.locator("textarea")
                return areas.input_value() if areas.count() else place.inner_text()

            for _ in range(300):
                if done(read()):
                    break
                view.wait_for_timeout(200)
            view.screenshot(path=pictures / f"{button}-{answer.strip('#')}-{width}.png", full_page=True)
            assert done(read()), read()
            # Nothing is wider than the screen.
            assert view.evaluate("document.documentElement.scrollWidth") <= width
            return read()

        click("Fill", "Fill", "#fill-answer", lambda text: text.count("%") == 5)
        click("Write", "Write", "#write-answer", lambda text: len(text) > 30)
        click("Compare", "Write", "#pair-message", lambda text: "times the tokens a second" in text)
        view.get_by_role("tab", name="Summarise").click()
        view.get_by_label("Document").fill(" ".join(TEXT) * 9)
        click("Summarise", "Summarise", "#summary-answer", bool)
        view.get_by_label("Document").fill("")
        click("Summarise", "Summarise", "#summary-message", lambda text: "Write something first" in text)
        browser.close()
    assert outside == [], "the page asks other machines"
