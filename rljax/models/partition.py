"""What models ask of the mesh they run on, through `DecoderConfig.hidden_sharding`: that of hidden states [B T D].

The axes of the mesh have the names of `train.mesh`, of which models use `tensor`, `fsdp` and `expert`.
"""

import math

from jax.sharding import NamedSharding


def num_shards(sharding: NamedSharding | None, axis: int) -> int:
    """How many shards an axis of the hidden states has: 0 the rows, 1 the columns."""
    if sharding is None:
        return 1
    names = sharding.spec[axis] or ()
    names = (names,) if isinstance(names, str) else names
    return math.prod(sharding.mesh.shape[name] for name in names)
