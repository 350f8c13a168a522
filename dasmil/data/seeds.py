"""Random numbers that depend only on the place in the training at which they are drawn.

So a resumed training draws what it would have drawn, and several processes together draw what one
process draws alone.
"""

import os

import numpy as np


def training_seed() -> int:
    """Seed of ``seed_everything``, the same in every process; 0 if none was set."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def draw_seed(*place: int) -> int:
    """A seed of 64 bits for a place in the training, such as (seed, epoch, step)."""
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0])
