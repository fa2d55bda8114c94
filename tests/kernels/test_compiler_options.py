"""Options of the compiler reach it where it knows them; see also tests/plan/test_compiled.py."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from llm_jax.infer.generate import Compiled, Timing
from llm_jax.kernels import compiler_options as options
from llm_jax.kernels.chips import RULES


class Lowered:
    """A jitted function that keeps what it is compiled with."""

    def __init__(self):
        self.options = None

    def lower(self, *args):
        return self

    def compile(self, options):
        self.options = options
        return options


@pytest.fixture
def as_tpu(monkeypatch):
    """The kind of the CPUs here is that of a tpu7x."""
    kind = jax.devices()[0].device_kind
    monkeypatch.setitem(RULES, kind, RULES["TPU7x"])
    options.is_known.cache_clear()
    yield
    options.is_known.cache_clear()


@pytest.mark.usefixtures("as_tpu")
def test_what_a_compiler_does_not_know_is_left_out_and_said(caplog):
    assert options.compiler_options(options.SERVE, jax.devices()) == {}
    assert "does not know xla_tpu_control_large_2nd_minor_layout_for_x16" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.usefixtures("as_tpu")
def test_steps_are_compiled_with_what_it_knows(monkeypatch):
    known = {"xla_cpu_enable_fast_math": False}  # XLA:CPU's
    monkeypatch.setitem(options.SERVE, "tpu7x", known)
    assert options.compiler_options(options.SERVE, jax.devices()) == known
    on_device, on_host = jax.numpy.zeros(3), np.zeros(3)
    assert Compiled().get(Lowered(), Timing(), on_host, on_device) == known
    assert Compiled().get(Lowered(), Timing(), on_host) == {}


def test_a_process_asks_the_compiler_of_its_own_devices(monkeypatch):
    """Of a mesh over several processes; none can compile for another's."""
    there, here = (SimpleNamespace(device_kind="TPU v5", process_index=i) for i in (0, 1))
    asked = []
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(options, "is_known", lambda device, *_: asked.append(device) or True)
    assert options.compiler_options(options.TRAIN, [there, here]) == options.GATHER
    assert asked == [here]


def test_no_options_for_what_is_no_tpu():
    for table in (options.SERVE, options.TRAIN):
        assert options.compiler_options(table, jax.devices()) == {}


def test_another_error_of_the_compiler_is_not_hidden():
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_cpu_enable_fast_math"):
        options.is_known(jax.devices()[0], "xla_cpu_enable_fast_math", "neither")
