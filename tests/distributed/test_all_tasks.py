"""Every task of scripts/train.py that other tests leave out, in two processes as in one."""

import json

import jax
import pytest

from tests.distributed import all_tasks
from tests.distributed.launching import ROOT, assert_same_curve, run


@pytest.mark.slow
def test_every_other_task_gives_the_results_of_one_process(tmp_path):
    all_tasks.write_data(tmp_path)
    alone = all_tasks.train(tmp_path, tmp_path / "one", "data:2")
    run(tmp_path, 2, 1, ROOT / "tests" / "distributed" / "all_tasks.py", tmp_path)
    many = json.loads((tmp_path / "results.json").read_text())
    assert many.keys() == alone.keys()
    for name, results in json.loads(json.dumps(alone)).items():
        assert flat(many[name]) == pytest.approx(flat(results), rel=1e-4), name
        assert_same_curve(tmp_path / "many" / name, tmp_path / "one" / name)
    for written in ("sft/adapter", "draft_head/draft_head"):
        assert (tmp_path / "many" / written).is_dir()


def flat(results):
    """{path: number} of the numbers in nested results."""
    leaves = jax.tree_util.tree_leaves_with_path(results)
    return {jax.tree_util.keystr(path): x for path, x in leaves if not isinstance(x, str)}
