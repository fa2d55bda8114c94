"""Streams of text: joined they equal decode, and no piece of them ends inside a character."""

import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Reference

from llm_jax.data.detokenize import Detokenizer, StreamingDecoder, byte_alphabet, from_decoder_spec
from llm_jax.data.fast_tokenizer import FastTokenizer
from llm_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from llm_jax.data.tokenizer_config import TokenizerConfig
from llm_jax.data.train_tokenizer import train_sentencepiece
from tests.data.multilingual import FAMILY, TEXTS
from tests.shared_data import shared_path

CORPUS = ["the cat sat on the mat with the other cats, and sat there", "我喜欢编程，也喜欢猫。"] * 4
KINDS = ("bytes", "byte_level", "unigram", "bpe", "exported", "wordpiece", "metaspace", "words")


def byte_level() -> FastTokenizer:
    """Byte-level BPE whose merges leave some characters whole and cut others after a byte."""
    vocab = {char: id_ for id_, char in enumerate(byte_alphabet())}
    to_char = {byte: char for char, byte in byte_alphabet().items()}
    merges = []
    for pair in ("th", "你"[:1], "😀"):
        left, right = (to_char[byte] for byte in pair.encode()[:2])
        merges.append((left, right))
        vocab[left + right] = len(vocab)
    backend = Reference(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("<ü tool>", normalized=False), "<think>"])
    backend.add_special_tokens(["<end>"])
    return FastTokenizer(backend, TokenizerConfig())


def wordpiece() -> FastTokenizer:
    pieces = ["[UNK]", "[CLS]", "the", "cat", "##s", "##'", "'", "s", "t", "##n't", "n't", ",", "."]
    pieces += ["?", "!", "我", "猫", "##猫", "do", "not", "##", "'s", "'ve", "'re", "'m", "a"]
    backend = Reference(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[CLS]"])
    return FastTokenizer(backend, TokenizerConfig())


def metaspace() -> FastTokenizer:
    pieces = ["<unk>", "▁", "▁▁", "▁the", "▁cat▁", "s", "我", "猫", "▁猫"]
    backend = Reference(models.Unigram([(piece, -9.0) for piece in pieces], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return FastTokenizer(backend, TokenizerConfig())


def words() -> FastTokenizer:
    backend = Reference(models.WordLevel({"<unk>": 0, "the": 1, "猫": 2, "cat": 3}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return FastTokenizer(backend, TokenizerConfig())


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """One small tokenizer of every kind of decoding; needs no shared data."""
    directory = tmp_path_factory.mktemp("sentencepiece")
    unigram = train_sentencepiece(CORPUS, directory / "unigram", vocab_size=350)
    bpe = train_sentencepiece(CORPUS, directory / "bpe", vocab_size=350, model_type="bpe")
    return {
        "bytes": ByteTokenizer(),
        "byte_level": byte_level(),
        "unigram": unigram,
        "bpe": bpe,
        "exported": load_tokenizer(directory / "unigram"),
        "wordpiece": wordpiece(),
        "metaspace": metaspace(),
        "words": words(),
    }


@pytest.fixture(scope="module")
def references(kinds, tmp_path_factory):
    """The same tokenizers, as the tokenizers library reads them."""
    directory = tmp_path_factory.mktemp("references")
    for kind in KINDS:
        kinds[kind].save(directory / kind)
    return {kind: Reference.from_file(str(directory / kind / "tokenizer.json")) for kind in KINDS}


def chunks(ids, sizes):
    """`ids` cut into parts of the given sizes, repeated as long as needed."""
    start = index = 0
    while start < len(ids):
        size = sizes[index % len(sizes)]
        yield ids[start : start + size]
        start, index = start + size, index + 1


def streamed(tokenizer, ids, sizes=(1,), **options):
    stream = tokenizer.stream(**options)
    return [*(stream.push(part) for part in chunks(ids, sizes)), stream.flush()]


STRIP = {"type": "Strip", "content": " ", "start": 0, "stop": 0}
SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=5)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(text=st.text() | st.sampled_from(TEXTS), sizes=SIZES)
def test_stream_of_a_text_equals_decode(kinds, kind, text, sizes):
    tokenizer = kinds[kind]
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    parts = streamed(tokenizer, ids, sizes)
    assert "".join(parts) == whole
    assert parts[-1] == ""  # every character was complete before the end
    assert "".join(parts).count("\ufffd") == whole.count("\ufffd")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data(), sizes=SIZES, skip=st.booleans())
def test_stream_of_any_ids_equals_decode(kinds, kind, data, sizes, skip):
    tokenizer = kinds[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(streamed(tokenizer, ids, sizes, skip_special_tokens=skip)) == whole


@pytest.mark.parametrize("kind", ["bytes", "byte_level", "wordpiece", "metaspace", "words"])
@settings(max_examples=150, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_decode_equals_the_tokenizers_library_for_any_ids(kinds, references, kind, data, skip):
    tokenizer, reference = kinds[kind], references[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    expected = reference.decode(ids, skip_special_tokens=skip)
    assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


@settings(max_examples=150, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_decode_equals_the_tokenizers_library_where_bytes_are_whole(kinds, references, data, skip):
    # Of a run of bytes that is malformed anywhere, tokenizers replaces all, valid characters too.
    tokenizer, reference = kinds["exported"], references["exported"]
    whole = st.integers(260, tokenizer.vocab_size - 1) | st.integers(0, 3)
    ids = data.draw(st.lists(whole.map(lambda id_: [id_]) | st.text().map(tokenizer.encode)))
    ids = [id_ for part in ids for id_ in part]
    expected = reference.decode(ids, skip_special_tokens=skip)
    assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_decode_equals_sentencepiece_for_any_ids(kinds, kind, data):
    tokenizer = kinds[kind]
    # Malformed UTF-8 too: the first 260 ids are special tokens and bytes.
    small = st.integers(0, 259)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1) | small))
    assert tokenizer.decode(ids) == tokenizer._processor.decode(ids)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_special_token_cuts_off_a_character_as_in_sentencepiece(kinds, kind):
    tokenizer = kinds[kind]
    lead, trail = (tokenizer.piece_to_id(piece) for piece in ("<0xC2>", "<0x80>"))
    ids = [lead, tokenizer.pad_id, trail]
    assert tokenizer.decode(ids) == tokenizer._processor.decode(ids) == "\N{REPLACEMENT CHARACTER}" * 2


@pytest.mark.parametrize("text", [FAMILY, "编程😀é", "🏳️‍🌈 flag", "𠮷野家"])
def test_character_is_emitted_with_its_last_byte_and_not_before(text):
    tokenizer = ByteTokenizer()
    data = text.encode()
    stream, so_far = tokenizer.stream(), ""
    for count, id_ in enumerate(tokenizer.encode(text, add_special_tokens=False), start=1):
        so_far += stream.push(id_)
        assert so_far == data[:count].decode(errors="ignore")
    assert stream.flush() == ""


def test_cut_off_character_is_replaced_only_at_the_end(kinds):
    for kind in ("bytes", "byte_level", "unigram", "exported"):
        tokenizer = kinds[kind]
        ids = tokenizer.encode("好" + "\U00020bb7")[:-1]
        parts = streamed(tokenizer, ids)
        assert "\ufffd" not in "".join(parts[:-1])
        assert set(parts[-1]) == {"\ufffd"}
        assert "".join(parts).startswith("好")


def test_leading_space_of_sentencepiece(kinds):
    for kind in ("unigram", "bpe", "exported"):
        tokenizer = kinds[kind]
        for text in ("the cat", " the", "   the", "", " ", "我 the"):
            assert "".join(streamed(tokenizer, tokenizer.encode(text))) == text
        ids = tokenizer.encode("the cat", add_special_tokens=False)
        # a special token that is not shown leaves the text before it as it is
        assert tokenizer.decode([tokenizer.bos_id, *ids]) == "the cat"
        assert tokenizer.decode([*ids, tokenizer.eos_id, *ids]) == "the cat the cat"
        shown = tokenizer.decode([tokenizer.bos_id, *ids], skip_special_tokens=False)
        assert shown == "<s> the cat"


def test_each_token_is_looked_up_once():
    looked_up = []

    def render(id_, begun):
        looked_up.append(id_)
        return bytes([id_]), True

    stream = StreamingDecoder(Detokenizer(render), skip=())
    data = list((FAMILY * 40).encode())
    for id_ in data:
        stream.push(id_)
    assert looked_up == data  # so the cost of a token does not grow with the text before it


@pytest.mark.parametrize("name", ["gpt2", "llama2", "mistral-v1", "deepseek-r1", "bert-base-chinese"])
def test_real_vocabularies(name):
    tokenizer = load_tokenizer(shared_path(f"tokenizers/{name}"))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        whole = tokenizer.decode(ids)
        so_far = ""
        stream = tokenizer.stream()
        for id_ in ids:
            so_far += stream.push(id_)
            assert whole.startswith(so_far)
        assert so_far + stream.flush() == whole
        if name in ("gpt2", "deepseek-r1"):
            assert whole == text


def test_real_llama_json_and_model_decode_alike():
    path = shared_path("weights/stories260K")
    fast, spm = load_tokenizer(path), load_tokenizer(path / "tokenizer.model")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    for text in TEXTS:
        ids = reference.encode(text)
        assert fast.decode(ids) == spm.decode(ids) == reference.decode(ids)


@pytest.mark.parametrize(
    "spec",
    [
        {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
        {"type": "BPEDecoder", "suffix": "</w>"},
        {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"},
        {"type": "Sequence", "decoders": [STRIP | {"start": 1}]},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, STRIP | {"stop": 1}]},
    ],
    ids=lambda spec: json.dumps(spec)[:40],
)
def test_decoders_that_cannot_be_streamed_exactly_are_refused(spec):
    with pytest.raises(ValueError, match="is not supported"):
        from_decoder_spec(spec, str)
