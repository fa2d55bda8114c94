"""Ways to draft, measured on the demo model."""

import jax
import pytest

from llm_jax import LLM
from llm_jax.bench import drafting
from llm_jax.checkpoint.draft_head import export_draft_head
from llm_jax.infer.llm import demo_model
from llm_jax.models.draft_head import describe_draft_head, init_draft_head

NEW = 10


@pytest.mark.slow
def test_all_ways_are_beside_none(tmp_path, monkeypatch):
    llm = LLM()
    head = describe_draft_head(llm.model.config, 8)
    export_draft_head(tmp_path / "head", head, init_draft_head(head, llm.mesh, jax.random.key(0)))
    monkeypatch.setattr(drafting, "PROMPTS", ("我喜欢", "I like to"))
    dirs = (str(tmp_path / "head"), str(demo_model()))
    found = {each["case"]: each for each in drafting.drafters(llm, *dirs, new_tokens=NEW, repeats=1)}
    assert list(found) == [f"drafters/{way}" for way in ("prompt_lookup", "draft_head", "draft_model")]
    itself = found["drafters/draft_model"]
    assert itself["drafted"] > 0 and itself["accepted_share"] == 1, "it drafts for itself"
    assert itself["tokens_per_step"] > 1
    assert all(0 <= each["accepted_share"] <= 1 for each in found.values())


def test_a_head_of_another_model_is_refused(tmp_path):
    with pytest.raises((ValueError, OSError), match="draft_head.json"):
        next(drafting.drafters(LLM(), str(tmp_path), None, NEW, 1))
