"""Tokenizers: ids equal those of the reference libraries, used without our loading code."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import sentencepiece
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Reference

from llm_jax.data.fast_tokenizer import load_bert_vocab
from llm_jax.data.sentencepiece_model import parse_model
from llm_jax.data.tokenizer import (
    ByteTokenizer,
    FastTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
)
from llm_jax.data.train_tokenizer import train_sentencepiece
from tests.data.multilingual import TEXTS
from tests.shared_data import shared_path

SENTENCEPIECE = (
    "tokenizers/llama2",
    "tokenizers/mistral-v1",
    "tokenizers/cluecorpussmall-zh-sp",
    "weights/stories260K/tokenizer.model",
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "She sells sea shells by the sea shore; the shells she sells are sea shells.",
    "我喜欢编程。我是一个热爱编程的程序员。",
    "今天天气真好，我们去公园玩吧！你喜欢去公园吗？",
    "How much wood would a woodchuck chuck if a woodchuck could chuck wood?",
    "学习新的语言需要时间，也需要耐心。",
] * 5


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def trained(request, tmp_path_factory):
    """A tiny sentencepiece tokenizer and its directory; needs no shared data."""
    directory = tmp_path_factory.mktemp(request.param)
    tokenizer = train_sentencepiece(
        CORPUS, directory, vocab_size=400, model_type=request.param, control_symbols=["<|im_end|>"]
    )
    return tokenizer, directory


@pytest.fixture(scope="module")
def unigram(tmp_path_factory):
    """A tiny unigram tokenizer and its directory."""
    directory = tmp_path_factory.mktemp("sampled")
    return train_sentencepiece(CORPUS, directory, vocab_size=400), directory


@pytest.fixture(scope="module")
def byte_level_files(tmp_path_factory):
    """A tiny byte-level BPE as vocab.json and merges.txt, with the special tokens of RoBERTa."""
    directory = tmp_path_factory.mktemp("byte_level")
    bpe = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"]
    bpe.train_from_iterator(CORPUS, vocab_size=400, special_tokens=special)
    bpe.save_model(str(directory))
    return directory


def with_config(source: Path, target: Path, **values) -> Path:
    shutil.copytree(source, target)
    (target / "tokenizer_config.json").write_text(json.dumps(values))
    return target


def assert_same_ids(tokenizer, encode, texts=TEXTS, **options):
    for text in texts:
        assert tokenizer.encode(text, **options) == list(encode(text)), repr(text)


# Identical ids to the reference libraries


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_sentencepiece_ids(name):
    path = shared_path(name)
    tokenizer = load_tokenizer(path)
    file = next(path.glob("*.model")) if path.is_dir() else path
    reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert_same_ids(tokenizer, reference.encode, add_special_tokens=False)
    assert_same_ids(tokenizer, lambda text: [reference.bos_id(), *reference.encode(text)])
    assert tokenizer.vocab_size == reference.vocab_size()
    assert (tokenizer.bos_id, tokenizer.eos_id) == (reference.bos_id(), reference.eos_id())
    for text in TEXTS:
        ids = reference.encode(text)
        assert tokenizer.decode(ids) == reference.decode(ids)


def test_llama_published_vector():
    # The example in the documentation of transformers' LlamaTokenizer.
    ids = load_tokenizer(shared_path("tokenizers/llama2")).encode("Hello this is a test")
    assert ids == [1, 15043, 445, 338, 263, 1243]


def test_gpt2_ids():
    path = shared_path("tokenizers/gpt2")
    tokenizer = load_tokenizer(path)
    reference = transformers.GPT2Tokenizer.from_pretrained(path)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert_same_ids(tokenizer, reference.encode)
    assert tokenizer.encode("a<|endoftext|>b") == reference.encode("a<|endoftext|>b")
    assert tokenizer.bos_id == tokenizer.eos_id == 50256
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["bert-base-chinese", "bert-base-uncased"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"tokenize_chinese_chars": False},
    ],
    ids=lambda options: ",".join(options) or "default",
)
def test_bert_ids(name, options, tmp_path):
    path = shared_path(f"tokenizers/{name}")
    if options:
        path = with_config(path, tmp_path / name, **options)
    tokenizer = load_tokenizer(path)
    reference = transformers.BertTokenizer(str(path / "vocab.txt"), **options)
    assert_same_ids(tokenizer, reference.encode)
    assert_same_ids(
        tokenizer, lambda t: reference.encode(t, add_special_tokens=False), add_special_tokens=False
    )
    ids = (
        tokenizer.pad_id,
        tokenizer.unk_id,
        tokenizer.cls_id,
        tokenizer.sep_id,
        tokenizer.mask_id,
    )
    assert ids == (0, 100, 101, 102, 103)


def test_deepseek_ids_and_bos():
    path = shared_path("tokenizers/deepseek-r1")
    tokenizer = load_tokenizer(path)
    text = gzip.decompress((path / "tokenizer.json.gz").read_bytes()).decode()
    reference = Reference.from_str(text)
    assert_same_ids(tokenizer, lambda t: reference.encode(t).ids, add_special_tokens=False)
    assert_same_ids(tokenizer, lambda t: [0, *reference.encode(t).ids])  # add_bos_token: true
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 1)
    assert tokenizer.encode("<think>", add_special_tokens=False) == reference.encode("<think>").ids


def test_stories_ids_from_both_files():
    path = shared_path("weights/stories260K")
    fast, spm = load_tokenizer(path), load_tokenizer(path / "tokenizer.model")
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    assert isinstance(fast, FastTokenizer)
    assert_same_ids(fast, reference.encode)
    assert_same_ids(spm, reference.encode)


@pytest.mark.parametrize(
    ("kind", "special"), [("RobertaTokenizer", "<mask>"), ("Qwen2Tokenizer", "<|endoftext|>")]
)
def test_vocab_and_merges_of_other_families(kind, special, byte_level_files, tmp_path):
    path = with_config(byte_level_files, tmp_path / kind, tokenizer_class=kind)
    tokenizer = load_tokenizer(path)
    reference = getattr(transformers, kind).from_pretrained(path)
    assert_same_ids(tokenizer, reference.encode)
    assert tokenizer.encode(f"a{special}b") == reference.encode(f"a{special}b")


def test_roberta_is_recognised_without_config(byte_level_files):
    tokenizer = load_tokenizer(byte_level_files)
    ids = tokenizer.encode("a dog")
    assert ids[0] == tokenizer.cls_id and ids[-1] == tokenizer.sep_id
    assert load_tokenizer(byte_level_files / "merges.txt").encode("a dog") == ids


# Trained tokenizers, and export


def test_trained_tokenizer_equals_sentencepiece_and_transformers(trained):
    tokenizer, directory = trained
    reference = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    assert_same_ids(tokenizer, reference.encode, add_special_tokens=False)
    exported = transformers.AutoTokenizer.from_pretrained(directory)
    assert_same_ids(tokenizer, exported.encode)
    special = "<s>a b</s> <|im_end|>c<|im_end|>"
    assert tokenizer.encode(special) == exported.encode(special)
    assert_same_ids(load_tokenizer(directory), tokenizer.encode)


def test_trained_tokenizer_is_lossless_and_has_the_documented_ids(trained):
    tokenizer, _ = trained
    ids = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id)
    assert ids == (0, 1, 2, 3)
    assert tokenizer.special_tokens == {"<pad>": 0, "<s>": 2, "</s>": 3, "<|im_end|>": 4}
    for text in TEXTS:
        if "▁" not in text:  # sentencepiece writes a space as this character
            assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_exported_tokenizer_gives_the_same_ids_for_any_text(trained_once, text):
    tokenizer, exported = trained_once
    assert exported.encode(text).ids == tokenizer.encode(text)


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    directory = tmp_path_factory.mktemp("once")
    tokenizer = train_sentencepiece(CORPUS, directory, vocab_size=400)
    return tokenizer, Reference.from_file(str(directory / "tokenizer.json"))


def test_training_is_reproducible(tmp_path):
    for name in "ab":
        train_sentencepiece(iter(CORPUS), tmp_path / name, vocab_size=350)
    a, b = ((tmp_path / name / "tokenizer.model").read_bytes() for name in "ab")
    assert a == b


def test_user_defined_symbols_are_one_token_everywhere(tmp_path):
    symbols = ["<think>", "<think>\n", "编程"]
    for kind in ("unigram", "bpe"):
        tokenizer = train_sentencepiece(
            CORPUS, tmp_path / kind, vocab_size=400, model_type=kind, user_defined_symbols=symbols
        )
        assert tokenizer.piece_to_id("编程") in tokenizer.encode("我喜欢编程吗")
        exported = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / kind)
        texts = [*TEXTS, "a<think>b", "<think>\n<think>我编程编程", " <think>"]
        assert_same_ids(tokenizer, exported.encode, texts)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_vocabulary_too_large_for_the_text_gives_what_there_is(kind, tmp_path):
    tokenizer = train_sentencepiece(["ab ab abc"], tmp_path, vocab_size=5000, model_type=kind)
    assert 260 < tokenizer.vocab_size < 300
    assert tokenizer.decode(tokenizer.encode("ab 你好")) == "ab 你好"


def test_training_refuses_what_cannot_work(tmp_path):
    with pytest.raises(ValueError, match="no text"):
        train_sentencepiece(["", "  \n"], tmp_path, vocab_size=300)
    with pytest.raises(ValueError, match="Enlarge vocab_size"):
        train_sentencepiece(CORPUS, tmp_path, vocab_size=100)
    with pytest.raises(ValueError, match="model_type must be one of unigram, bpe, got 'word'"):
        train_sentencepiece(CORPUS, tmp_path, vocab_size=300, model_type="word")
    with pytest.raises(ValueError, match=r"character_coverage must be in \[0.98, 1\], got 0.9"):
        train_sentencepiece(CORPUS, tmp_path, vocab_size=300, character_coverage=0.9)
    with pytest.raises(ValueError, match="normalization"):
        train_sentencepiece(CORPUS, tmp_path, vocab_size=300, normalization="nfd")


def test_normalizing_tokenizer_is_exported_only_if_exact(tmp_path):
    tokenizer = train_sentencepiece(CORPUS, tmp_path, vocab_size=400, normalization="nmt_nfkc")
    assert tokenizer.encode("ＡＢＣ") == tokenizer.encode("ABC")
    # tokenizers normalises by grapheme: half-width katakana with a voicing mark come out otherwise
    assert not (tmp_path / "tokenizer.json").exists()
    assert_same_ids(load_tokenizer(tmp_path), tokenizer.encode)


def test_sampled_segmentations(unigram):
    tokenizer, directory = unigram
    text = "The shells she sells are sea shells. 我喜欢编程。龘🙂"
    draws = [tokenizer.encode_sampled(text, alpha=0.3, seed=seed) for seed in range(20)]
    assert len(set(map(tuple, draws))) > 5
    assert {tokenizer.decode(draw) for draw in draws} == {text}
    # greatly sharpened, it is the likeliest segmentation, which sentencepiece finds
    assert tokenizer.encode_sampled(text, alpha=100.0, seed=0) == tokenizer.encode(text)

    code = (
        "import sys; from llm_jax.data.tokenizer import load_tokenizer; t = load_tokenizer(sys.argv[1]);"
        "print([t.encode_sampled(sys.argv[2], alpha=0.3, seed=seed) for seed in range(20)])"
    )
    model = str(directory / "tokenizer.model")
    command = [sys.executable, "-c", code, model, text]
    assert subprocess.check_output(command, text=True).strip() == str(draws)  # in another process too


def test_sampled_segmentations_are_distributed_as_those_of_sentencepiece(unigram):
    tokenizer, directory = unigram
    reference = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    count, text, options = 4000, "she sells", {"alpha": 0.4, "add_special_tokens": False}
    ours = Counter(tuple(tokenizer.encode_sampled(text, seed=i, **options)) for i in range(count))
    sampling = {"enable_sampling": True, "alpha": 0.4, "nbest_size": -1}
    theirs = Counter(tuple(reference.encode(text, **sampling)) for _ in range(count))
    common = [key for key in ours | theirs if ours[key] + theirs[key] >= 20]
    assert len(common) > 5
    table = [[side[key] for key in common] for side in (ours, theirs)]
    for row in table:
        row.append(count - sum(row))  # all rare segmentations together
    assert scipy.stats.chi2_contingency(np.array(table)).pvalue > 1e-3


def test_only_unigram_models_sample_segmentations(tmp_path):
    tokenizer = train_sentencepiece(CORPUS, tmp_path, vocab_size=400, model_type="bpe")
    with pytest.raises(ValueError, match="bpe model: only unigram"):
        tokenizer.encode_sampled("she", alpha=0.1, seed=0)


@pytest.mark.parametrize("name", ["gpt2", "bert-base-uncased", "deepseek-r1", "llama2"])
def test_saved_tokenizer_is_the_same_here_and_in_transformers(name, tmp_path):
    tokenizer = load_tokenizer(shared_path(f"tokenizers/{name}"))
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    exported = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert_same_ids(again, tokenizer.encode)
    assert_same_ids(tokenizer, exported.encode)
    roles = ("bos", "eos", "pad", "cls", "sep", "mask", "unk")
    assert [getattr(again, f"{role}_id") for role in roles] == [
        getattr(tokenizer, f"{role}_id") for role in roles
    ]
    assert (exported.bos_token_id, exported.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert exported.chat_template == tokenizer.chat_template
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert again.decode(ids) == tokenizer.decode(ids)
        assert exported.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


def test_inexact_conversion_saves_the_model_alone(tmp_path):
    tokenizer = load_tokenizer(shared_path("tokenizers/cluecorpussmall-zh-sp"))
    tokenizer.save(tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    assert_same_ids(load_tokenizer(tmp_path), tokenizer.encode)


def run_script(*flags: str) -> subprocess.CompletedProcess:
    script = Path(__file__).parents[2] / "scripts" / "train_tokenizer.py"
    environment = os.environ | {"PYTHONPATH": str(script.parents[1])}
    command = [sys.executable, str(script), *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_training_script_reads_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(CORPUS))
    (tmp_path / "b.tsv").write_text('text\tlabel\nan "odd quote\t1\n')
    (tmp_path / "c.csv").write_text('label,text\n1,"two\nlines, quoted"\n')
    (tmp_path / "d.jsonl").write_text('{"text": "一行"}\n\n{"text": "two"}\n')
    files = ",".join(str(tmp_path / name) for name in ("a.txt", "b.tsv", "c.csv", "d.jsonl"))
    done = run_script(f"--input={files}", f"--output={tmp_path / 'out'}", "--vocab_size=350", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["texts"] == len(CORPUS) + 4
    assert report["vocab_size"] == load_tokenizer(tmp_path / "out").vocab_size == 350
    assert report["tokenizer_json"] and report["characters_per_token"] > 1


def test_training_script_names_the_row_without_text(tmp_path):
    (tmp_path / "a.tsv").write_text("sentence\nhello\n")
    done = run_script(f"--input={tmp_path / 'a.tsv'}", f"--output={tmp_path / 'out'}")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"train_tokenizer.py: {tmp_path / 'a.tsv'}:2: field 'text': no such")
    assert "sentence" in done.stderr and "Traceback" not in done.stderr


# Conventions of the config files


def test_sentencepiece_options(trained, tmp_path):
    tokenizer, directory = trained
    (tmp_path / "tokenizer.model").write_bytes((directory / "tokenizer.model").read_bytes())
    config = {"add_bos_token": False, "add_eos_token": True, "legacy": False}
    config["added_tokens_decoder"] = {"500": {"content": "<tool>", "lstrip": True, "special": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    other = load_tokenizer(tmp_path)
    plain = tokenizer.encode("a dog", add_special_tokens=False)
    assert other.encode("a dog") == [*plain, 3]
    assert other.vocab_size == 501
    assert other.encode("a dog  <tool>", add_special_tokens=False) == [*plain, 500]
    assert other.decode([*plain, 500]) == "a dog<tool>"
    # legacy: every stretch of text gets the dummy prefix; otherwise only the first
    assert tokenizer.encode("<s>a dog", add_special_tokens=False) == [2, *plain]
    ids = other.encode("<s>a dog", add_special_tokens=False)
    assert "".join(map(other.id_to_piece, ids)) == "<s>a▁dog"


def test_special_tokens_map_and_added_tokens_files(trained, tmp_path):
    _, directory = trained
    (tmp_path / "tokenizer.model").write_bytes((directory / "tokenizer.model").read_bytes())
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<|im_end|>"}, "mask_token": "<mask>"})
    )
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<extra>": 600}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == 4
    assert tokenizer.piece_to_id("<extra>") == 600
    assert tokenizer.mask_id == 601  # the vocabulary lacks it, so it is put at the end
    assert tokenizer.vocab_size == 602


def test_tokenizer_json_is_preferred(trained):
    tokenizer, directory = trained
    assert isinstance(load_tokenizer(directory), FastTokenizer)
    assert isinstance(load_tokenizer(directory / "tokenizer.model"), SentencePieceTokenizer)
    assert load_tokenizer(str(directory / "tokenizer.json")).vocab_size == tokenizer.vocab_size


def test_truncation_and_padding_in_tokenizer_json_are_off(tmp_path):
    ByteTokenizer().save(tmp_path)
    backend = Reference.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=100)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("twelve bytes", add_special_tokens=False)) == 12


def test_bare_tokenizer_json_has_its_usual_special_tokens(tmp_path):
    ByteTokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 2, 3)


@pytest.mark.parametrize(
    ("kind", "bos", "eos", "expected"),
    [
        ("LlamaTokenizerFast", False, False, [101]),
        ("LlamaTokenizerFast", True, True, [2, 101, 3]),
        ("PreTrainedTokenizerFast", False, True, [2, 101]),  # its tokenizer.json decides
    ],
)
def test_add_bos_and_eos(kind, bos, eos, expected, tmp_path):
    ByteTokenizer().save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": kind, "add_bos_token": bos, "add_eos_token": eos}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a") == expected
    tokenizer.save(tmp_path / "again")
    exported = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "again")
    assert exported.encode("a") == expected


def test_byte_tokenizer():
    tokenizer = ByteTokenizer()
    assert tokenizer.vocab_size == 260
    assert tokenizer.encode("你a") == [2, *(4 + byte for byte in "你a".encode())]
    assert tokenizer.decode([2, 4 + ord("h"), 4 + ord("i"), 3]) == "hi"
    assert tokenizer.decode([2, 4 + 65], skip_special_tokens=False) == "<s>A"


def test_piece_and_id_are_inverse(trained):
    tokenizer, directory = trained
    for either in (tokenizer, load_tokenizer(directory), ByteTokenizer()):
        for id_ in range(either.vocab_size):
            assert either.piece_to_id(either.id_to_piece(id_)) == id_
        assert either.piece_to_id("no such piece") is None


def test_model_reader_agrees_with_the_library(trained):
    _, directory = trained
    data = (directory / "tokenizer.model").read_bytes()
    library = sentencepiece.SentencePieceProcessor(model_proto=data)
    for id_, piece in enumerate(parse_model(data).pieces):
        assert piece.text == library.id_to_piece(id_)
        assert piece.score == library.get_score(id_)
        assert (piece.score * 128).is_integer()  # rounded so that sums are exact


# Errors


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"looked for tokenizer\.json.*found config\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"needs merges\.txt"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b'{"model": {"vocab"', r"tokenizer\.json is not valid JSON"),
        ("tokenizer.json", b"[1]", "is no tokenizer.json"),
        (
            "tokenizer.json",
            b'{"model": {"type": "New", "vocab": {}}}',
            r"tokenizer\.json was refused",
        ),
        ("tokenizer.json.gz", gzip.compress(b"{}", mtime=0)[:-6], "truncated or damaged"),
        ("tokenizer.json.gz", b"{}", "truncated or damaged"),
        ("tokenizer.model", b"not a model", r"tokenizer\.model: no sentencepiece model"),
        ("tokenizer.model", b"", r"tokenizer\.model: "),
        ("vocab.txt", b"one\ntwo\n", r"lacks \[CLS\], \[SEP\], \[UNK\]"),
        ("tokenizer.tiktoken", b"", "unknown kind of tokenizer file"),
    ],
)
def test_damaged_files(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path / name)


def test_truncated_sentencepiece_model(trained, tmp_path):
    _, directory = trained
    data = (directory / "tokenizer.model").read_bytes()
    for size in range(1, len(data), 97):
        (tmp_path / "tokenizer.model").write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"tokenizer\.model"):
            load_tokenizer(tmp_path)


def test_unsupported_kinds(trained, byte_level_files, tmp_path):
    _, directory = trained
    (tmp_path / "tokenizer.model").write_bytes((directory / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    with pytest.raises(ValueError, match=r"T5Tokenizer renumbers.*supply its tokenizer\.json"):
        load_tokenizer(tmp_path)
    path = with_config(byte_level_files, tmp_path / "clip", tokenizer_class="CLIPTokenizer")
    with pytest.raises(ValueError, match="CLIPTokenizer .* not known; expected GPT2Tokenizer"):
        load_tokenizer(path)
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokeni')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        load_tokenizer(path)


def test_contradicting_config(tmp_path):
    ByteTokenizer().save(tmp_path)
    config = {"added_tokens_decoder": {"7": {"content": "<s>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'<s>' the id 7, but in the vocabulary it has 2"):
        load_tokenizer(tmp_path)
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": "yes", "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="add_bos_token must be true or false, got 'yes'"):
        load_tokenizer(tmp_path)
    config = {"tokenizer_class": "LlamaTokenizer", "add_eos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="add_eos_token is true but no eos_token is named"):
        load_tokenizer(tmp_path)


def test_wrong_ids_and_texts(trained):
    tokenizer, directory = trained
    for either in (tokenizer, load_tokenizer(directory)):
        for id_ in (-1, either.vocab_size, 10**6):
            with pytest.raises(ValueError, match=f"token id {id_} is not in the vocabulary of"):
                either.decode([id_])
        with pytest.raises(TypeError, match="text must be str, got list"):
            either.encode(["a"])
        with pytest.raises(ValueError, match="lone surrogate at character 1"):
            either.encode("a\ud83d")


def test_upper_case_vocabulary_is_not_lower_cased(tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Dog", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    assert load_bert_vocab(tmp_path / "vocab.txt").encode("Dog dog") == [2, 5, 6, 3]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces[:5] + ["dog"]))
    assert load_bert_vocab(tmp_path / "vocab.txt").encode("Dog dog") == [2, 5, 5, 3]
