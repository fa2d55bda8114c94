"""The documents' literal example: 7 -> 10 -> 3, mean squared error, 1000 Adam steps, many seeds.

    python scripts/train.py --config=configs/documents_mlp.py --workdir=DIR

Hardware and time: two CPU cores, about 10 seconds (2000 seeds under each of two backward rules).
Expected: the documents' losses lie between the 31st percentile of the seeds (step 0) and the 93rd (step
500); the nearest seed, 926, differs by an RMS of 0.192 in ln(loss). See docs/documents_example.md.
"""

import ml_collections

from llm_jax.config import to_config_dict
from llm_jax.train.documents_mlp import DocumentsMLPConfig


def get_config() -> ml_collections.ConfigDict:
    """The documents' settings, with the defaults of Keras' Adam, for 2000 draws of the weights."""
    config = to_config_dict(
        DocumentsMLPConfig(
            num_seeds=2000,
            seed=0,
            num_steps=1000,
            log_every=100,
            learning_rate=1e-3,
            beta1=0.9,
            beta2=0.999,
            eps=1e-7,
            layer_sizes=(7, 10, 3),
            inputs=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0),
            target=(1.0, 0.0, 0.0),
        )
    )
    config.task = "documents_mlp"
    return config
