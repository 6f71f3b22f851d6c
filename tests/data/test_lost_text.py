"""Tokenizers that lose no text while ids are free, and the warning about those that do."""

import random
import re
import subprocess
import sys
import unicodedata

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_efficient.data.corpus import load_corpus
from hf_efficient.data.tokenizers import MAX_WORD, MAX_WORD_BYTES, subword_tokenizer, train_tokenizer
from hf_efficient.data.unknown_tokens import report_unknown, sample_texts, unknown_share
from tests.data.test_tokenizers import TEXT


LANGUAGES = {
    "chinese": "我們在學校裏學習漢字和數學。今天天氣很好。",
    "japanese": "がんばってください、プログラムをべんきょうします。",
    "korean": "한국어는 재미있는 언어입니다.",
    "hindi": "हिन्दी भाषा में विद्यार्थी पढ़ते हैं।",
    "thai": "ภาษาไทยเป็นภาษาที่สวยงามมากและน้ำก็ดี",
    "arabic": "اللغة العربية جميلة جدا",
    "vocalised arabic": "العَرَبِيَّةُ هٰذَا كِتَابٌ",
    "vedic": "अ॒ग्निमी॑ळे",
    "emoji": "fine 😀👍🏽 thanks👨‍👩‍👧🇩🇪 🫨",
    "marks": "zero\u0301 x\u20d7 a\u0323\u0302",
    "symbols": "∀x ∃y: ⌈x⌉ ≥ y → \U0001d518\U0001d55f ☃",
}


def unknown(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids.count(tokenizer.unk_token_id)


def bare(text):
    return "".join(text.split())


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("language", LANGUAGES)
def test_no_character_is_unknown(language, lowercase):
    """Nor dropped by the normalisation, but for accents and invisible characters."""
    text = LANGUAGES[language]
    tokenizer = train_tokenizer([*TEXT, text], vocab_size=2000, lowercase=lowercase)
    assert unknown(tokenizer, text) == 0
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)
    joined = "".join(piece.removeprefix("##") for piece in pieces)
    assert joined == bare(tokenizer.backend_tokenizer.normalizer.normalize_str(text))
    if language in ("japanese", "hindi", "thai", "arabic", "vocalised arabic", "vedic"):
        assert unicodedata.normalize("NFC", joined) == unicodedata.normalize("NFC", bare(text))


@pytest.mark.parametrize("algorithm", ["wordpiece", "bpe"])
def test_accents_alone_are_dropped(algorithm):
    tokenizer = train_tokenizer(TEXT, algorithm=algorithm, vocab_size=400)
    normalised = tokenizer.backend_tokenizer.normalizer.normalize_str("Ünïcödé Ελλάδα Й tiếng が เที่ हिन्दी")
    assert normalised == "unicode ελλαδα и tieng か\u3099 เที่ हिन्दी"


def test_what_is_no_letter_is_counted_or_kept():
    """Soft hyphens, joiners of zero width, private use: BERT's cleaning drops them, and BPE does not."""
    text = "co\u00adope\u200brate \ue000"
    assert unknown_share(train_tokenizer([*TEXT, text], vocab_size=500), [text]) == (0.0, 3 / 12)
    for lowercase in (True, False):
        bpe = train_tokenizer([*TEXT, text], algorithm="bpe", vocab_size=500, lowercase=lowercase)
        assert unknown_share(bpe, [text]) == (0.0, 0.0)
        assert bpe.decode(bpe(text, add_special_tokens=False).input_ids).strip() == text


@pytest.mark.parametrize(("characters", "size"), [(3000, 4096), (40, 100), (1200, 1250), (1300, 1250)])
def test_ids_are_left_only_when_every_character_has_one(characters, size):
    generator = random.Random(0)
    han = [chr(0x4E00 + i) for i in range(characters)]
    weights = [1 / (i + 10) for i in range(characters)]
    texts = ["".join(generator.choices(han, weights, k=300)) for _ in range(30)] + ["".join(han)]
    tokenizer = train_tokenizer(texts, vocab_size=size)
    assert len(tokenizer) <= size
    assert (unknown(tokenizer, "".join(han)) == 0) == (characters + 5 <= size)
    assert (len(tokenizer) == size) == (characters + 5 >= size)
    assert not [token for token in tokenizer.get_vocab() if token.startswith("##")]


def test_frequent_characters_come_before_words():
    """The second language of a text, whose words alone would fill the vocabulary."""
    generator = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(generator.choices(letters, k=generator.randint(3, 9))) for _ in range(2000)]
    greek = [chr(0x4E00 + i) for i in range(150)]
    texts = [" ".join(generator.choices(words, k=200)) + "".join(generator.choices(greek, k=100)) for _ in range(40)]
    tokenizer = train_tokenizer(texts, vocab_size=500)
    assert len(tokenizer) == 500
    assert sum(unknown(tokenizer, text) for text in texts) == 0


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "subword"])
def test_text_without_spaces(kind):
    """Is known whole, and cut to pieces of bounded length before words are learned, which takes the square of it."""
    generator = random.Random(0)
    text = "".join(generator.choices("abcdefghijklmnopqrstuvwxyzé", k=200_000))
    if kind == "subword":
        tokenizer = subword_tokenizer([text], 500)
    else:
        tokenizer = train_tokenizer([text], algorithm=kind, vocab_size=500, lowercase=False)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert max(len(piece) for piece, _ in pieces) <= (MAX_WORD if kind == "wordpiece" else MAX_WORD_BYTES)
    assert unknown(tokenizer, text) == 0
    assert bare(tokenizer.decode(ids)) == text.replace("##", "")


def test_long_words_are_cut_at_the_same_place_after_loading(tmp_path):
    text = "donaudampfschifffahrt" * 30
    tokenizer = train_tokenizer([*TEXT, text], vocab_size=300)
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == " ".join(
        text[start : start + 100] for start in range(0, len(text), 100)
    )
    program = (
        "import sys; from transformers import AutoTokenizer; "
        f"print(AutoTokenizer.from_pretrained({str(tmp_path)!r})({text!r}).input_ids, 'hf_efficient' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == f"{ids} False"
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()


@pytest.mark.data
@pytest.mark.parametrize("size", [2048, 16384])
def test_real_text_in_many_scripts(data_dir, size):
    """Articles of Wikipedia, which name things in their own languages."""
    texts = load_corpus(str(data_dir / "corpus" / "wiki*.parquet"))["text"][:20]
    tokenizer = train_tokenizer(texts, vocab_size=size)
    tokens, characters = unknown_share(tokenizer, texts)
    assert max(tokens, characters) < (1e-4 if size == 16384 else 1e-3)


class TestReport:
    """[`report_unknown`] on tokenizers of any kind."""

    def wordpiece(self):
        return train_tokenizer(["the old dog sees a red bird"], vocab_size=100)

    def test_share_of_tokens_and_characters(self):
        assert unknown_share(self.wordpiece(), ["the dog", "a bird"]) == (0.0, 0.0)
        assert unknown_share(self.wordpiece(), ["the dog ☃☃☃☃"]) == (1 / 3, 4 / 10)
        assert unknown_share(self.wordpiece(), [""]) == (0.0, 0.0)
        assert unknown_share(subword_tokenizer(["a"], 257), ["☃ é 漢"]) == (0.0, 0.0)

    def test_text_that_is_dropped_without_an_unknown_token(self):
        backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
        assert unknown_share(tokenizer, ["ab cc"]) == (0.0, 0.5)

    def test_long_runs_of_a_tokenizer_of_elsewhere(self):
        backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##a": 2}, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
        tokens, characters = unknown_share(tokenizer, sample_texts(["a" * 50_000, "a " * 50_000]))
        assert tokens < 0.001
        assert characters == pytest.approx(1 / 2, abs=0.01)

    def test_levels(self, caplog):
        with caplog.at_level("INFO"):
            report_unknown(self.wordpiece(), ["the old dog"], "Do this.")
        assert caplog.messages == [
            "0.00% of the tokens of the text are unknown ([UNK]), and 0.00% of its characters are lost."
        ]
        caplog.clear()
        report_unknown(self.wordpiece(), ["the old dog sees ☃"], "Do this.")
        assert re.fullmatch(r"20\.00% of the tokens .* lost\. Do this\.", caplog.messages[0])
        assert caplog.records[0].levelname == "WARNING"
        with pytest.raises(ValueError, match=r"100\.00% of the tokens .* nothing to learn from it\. Do this\."):
            report_unknown(self.wordpiece(), ["☃" * 1000], "Do this.")

    @pytest.mark.parametrize("lengths", [[0], [3], [3999, 4003], [1_000_000], [5] * 1000, [90_000] * 7, [0, 9_000]])
    def test_samples_are_spread(self, lengths):
        texts = [("abcde " * (length // 6 + 1))[:length] for length in lengths]
        pieces = list(sample_texts(texts))
        assert sum(map(len, pieces)) >= min(sum(lengths), 390_000) * 0.98
        assert sum(map(len, pieces)) <= 430_000
        cut = [word for piece in pieces for word in piece.split() if word != "abcde"]
        assert len(cut) <= len(texts), "words are cut where no text ends"
