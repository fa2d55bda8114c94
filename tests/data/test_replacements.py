"""Replaced parts of texts: what is found, one token each, the same in transformers, and kept on disk."""

import pytest
import transformers

from llm_jax.data.replacements import frequent_matches, replacer
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.data.train_tokenizer import train_sentencepiece

PAIRS = (
    (r"https?://[\w./?=&%#~-]+", "<link>"),
    (r"//@[^:：\s]{1,30}[:：]", "<from>"),
    (r"@[\w-]{1,30}", "<user>"),
)
TEXTS = [
    "谢谢@小明 今天很开心[心][心]",
    "//@天气预报:明天有雨//@路人-甲：带伞 http://t.cn/A6x-?y=1",
    "see https://a.b/c?d=e#f @you [心]",
    "没有别的",
] * 3


def test_each_pair_in_turn_and_the_text_as_it_stands():
    replace = replacer(PAIRS)
    assert replace("转发//@甲:谢谢@乙 http://t.cn/x_1") == "转发<from>谢谢<user> <link>"
    assert replacer(((r"a+", "b"), (r"bc", r"\1")))("aaac") == r"\1"
    assert replacer(())("x@y") == "x@y"


def test_frequent_matches_are_counted_over_all_texts():
    assert frequent_matches(TEXTS, r"\[[^\[\]\s]{1,8}\]") == ["[心]"]
    assert frequent_matches(["a1 b2 a1", "b2 c3"], r"[a-z]\d", least=2) == ["a1", "b2"]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ((("(", "x"),), r"'\(' is no regular expression"),
        ((("a*", "x"),), "finds the empty text"),
        (("ab",), "no pair"),
        ((("a", 1),), "no pair"),
    ],
)
def test_pairs_that_cannot_be_meant_are_refused(pairs, message):
    with pytest.raises(ValueError, match=message):
        replacer(pairs)


def test_what_is_put_in_place_is_one_token_for_every_reader(tmp_path):
    tokenizer = train_sentencepiece(
        TEXTS,
        tmp_path,
        vocab_size=400,
        user_defined_symbols=["[心]"],
        replacements=PAIRS,
    )
    pieces = [tokenizer.id_to_piece(id_) for id_ in tokenizer.encode("雨//@甲:谢谢@乙[心] http://q.r/s")]
    for symbol in ("<from>", "<user>", "<link>", "[心]"):
        assert pieces.count(symbol) == 1
    assert not {"@", "甲", "乙", "/"} & set("".join(pieces))
    assert tokenizer.decode(tokenizer.encode("谢谢@乙")) == "谢谢<user>"

    assert (tmp_path / "tokenizer.json").is_file()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again = [load_tokenizer(tmp_path), load_tokenizer(tmp_path / "tokenizer.model")]
    for text in [*TEXTS, "<s>@a <user> //@b:c", "@", "http://", "//@:"]:
        ids = tokenizer.encode(text)
        assert theirs(text).input_ids == ids
        assert all(reader.encode(text) == ids for reader in again)
    sampled = tokenizer.encode_sampled("雨//@甲:谢谢@乙", alpha=0.5, seed=1)
    assert tokenizer.piece_to_id("<from>") in sampled and tokenizer.piece_to_id("<user>") in sampled

    # A copy has them as well.
    again[1].save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy" / "tokenizer.model").encode(TEXTS[1]) == tokenizer.encode(
        TEXTS[1]
    )
    assert load_tokenizer(tmp_path / "copy").encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])


def test_replaced_first_and_normalized_then(tmp_path):
    tokenizer = train_sentencepiece(
        TEXTS, tmp_path, vocab_size=400, replacements=PAIRS, normalization="nmt_nfkc_cf"
    )
    for reader in (tokenizer, load_tokenizer(tmp_path)):
        assert reader.encode("SEE @You") == reader.encode("see <user>")
        assert reader.decode(reader.encode("SEE  ＨＴＴＰ @You")) == "see http <user>"
