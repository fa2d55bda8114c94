"""Translations by a trained model, and how near they come to a reference: BLEU and chrF by sacrebleu."""

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sacrebleu
from jax.sharding import Mesh

from llm_jax.checkpoint.workdir import load_trained
from llm_jax.data.parallel import SentencePair, translation_prompt
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.infer.llm import LLM
from llm_jax.ops.sampling import SamplingParams


@dataclasses.dataclass(frozen=True)
class TranslationScores:
    """Corpus scores, 0 to 100, and what sacrebleu needs to be told to count the same."""

    bleu: float  # Papineni et al. 2002
    chrf: float  # chrF2, Popovic 2015
    signature: str  # of BLEU


def load_translator(path: str | Path, mesh: Mesh) -> LLM:
    """The translator in a workdir, its checkpoints/<step>, or a Hugging Face directory."""
    path = Path(path).expanduser()
    if path.parent.name == "checkpoints" or (path / "checkpoints").is_dir():
        trained = load_trained(path, mesh)
        tokenizer = load_tokenizer(trained.tokenizer)
        return LLM.from_params(trained.model, trained.params, tokenizer, mesh=mesh)
    return LLM(path, mesh=mesh)


def translate(llm: LLM, sources: Sequence[str], *, num_beams: int, max_new_tokens: int) -> list[str]:
    """The likeliest translation of each source: greedy with one beam, else the best of a beam search."""
    request = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)
    prompts = [translation_prompt(source) for source in sources]
    if num_beams == 1:
        outputs = llm.generate(prompts, request)
    else:
        outputs = llm.beam_search(prompts, request, num_beams=num_beams, num_return=1)
    return [output.text.strip() for output in outputs]


def score(translations: Sequence[str], references: Sequence[str]) -> TranslationScores:
    """Scores against one reference each, with sacrebleu's own settings (13a, mixed case)."""
    bleu = sacrebleu.BLEU()
    return TranslationScores(
        bleu=float(bleu.corpus_score(list(translations), [list(references)]).score),
        chrf=float(sacrebleu.CHRF().corpus_score(list(translations), [list(references)]).score),
        signature=str(bleu.get_signature()),
    )


def nearest_translations(sources: Sequence[str], pairs: Sequence[SentencePair]) -> list[str]:
    """For each source the translation of the known source that is most like it: a baseline.

    Likeness is the Dice coefficient of the two multisets of characters and pairs of characters.
    """
    found: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)
    sizes = np.zeros(len(pairs))
    for number, pair in enumerate(pairs):
        grams = _grams(pair.source)
        sizes[number] = grams.total()
        for gram, count in grams.items():
            found[gram].append((number, count))
    index = {gram: np.array(places).T for gram, places in found.items()}  # numbers and counts of pairs

    def nearest(source: str) -> str:
        wanted, common = _grams(source), np.zeros(len(pairs))
        for gram in wanted.keys() & index.keys():
            numbers, counts = index[gram]
            common[numbers] += np.minimum(counts, wanted[gram])
        return pairs[int(np.argmax(common / (wanted.total() + sizes)))].target

    return [nearest(source) for source in sources]


def _grams(text: str) -> collections.Counter[str]:
    return collections.Counter([*text, *(text[i : i + 2] for i in range(len(text) - 1))])
