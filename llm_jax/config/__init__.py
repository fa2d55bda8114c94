"""Frozen, typed settings: trees of dataclasses, each with its defaults.

Files under configs/ are Python with `get_config()`. No layer outside this package has a default for a
hyperparameter.

reading    from a mapping or a config file, and back
checks     what the settings are refused by
model      the architecture of a model
training   what every training run has
engine     an inference engine
tasks      what each task adds to it
"""

from llm_jax.config.checks import unread as unread
from llm_jax.config.engine import EngineConfig as EngineConfig
from llm_jax.config.model import ModelConfig as ModelConfig
from llm_jax.config.model import RopeScaling as RopeScaling
from llm_jax.config.reading import from_dict as from_dict
from llm_jax.config.reading import nearest as nearest
from llm_jax.config.reading import to_config_dict as to_config_dict
from llm_jax.config.reading import to_dict as to_dict
from llm_jax.config.reading import unknown_override as unknown_override
from llm_jax.config.tasks import ClassificationConfig as ClassificationConfig
from llm_jax.config.tasks import DataSource as DataSource
from llm_jax.config.tasks import DistillConfig as DistillConfig
from llm_jax.config.tasks import DraftHeadConfig as DraftHeadConfig
from llm_jax.config.tasks import FinetuneConfig as FinetuneConfig
from llm_jax.config.tasks import LanguageModelConfig as LanguageModelConfig
from llm_jax.config.tasks import LoraConfig as LoraConfig
from llm_jax.config.tasks import MaskedLanguageModelConfig as MaskedLanguageModelConfig
from llm_jax.config.tasks import PreferenceConfig as PreferenceConfig
from llm_jax.config.tasks import PretrainConfig as PretrainConfig
from llm_jax.config.tasks import QuestionAnsweringConfig as QuestionAnsweringConfig
from llm_jax.config.tasks import TranslationConfig as TranslationConfig
from llm_jax.config.tasks import TuneConfig as TuneConfig
from llm_jax.config.tasks import WordVectorConfig as WordVectorConfig
from llm_jax.config.training import MAY_CHANGE as MAY_CHANGE
from llm_jax.config.training import OPTIMIZERS as OPTIMIZERS
from llm_jax.config.training import OptimConfig as OptimConfig
from llm_jax.config.training import TrainConfig as TrainConfig
