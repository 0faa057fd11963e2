"""The first run: bivl on emoji, their words and Python's documentation, on two CPU cores.

It takes minutes.

    bash launch/quickstart.sh            or
    python -m bivl.train --config=configs/quickstart.py --workdir=DIR

configs/pretrain/bivl.py:size=tiny with every evaluator that has something to draw.
"""

from configs import common
from configs.pretrain import bivl


def get_config(text=None):
    """Options: smoke."""
    chosen = common.options(text, {"smoke": False})
    c = bivl.get_config("smoke" if chosen["smoke"] else "size=tiny")
    if not chosen["smoke"]:
        c.evaluators = ("knn", "linear", "retrieval", "pictures", "cross_attention")
    return c
