"""What models ask of the mesh they run on, through `DecoderConfig.hidden_sharding`: that of hidden states [B T D].

The axes of the mesh have the names of `train.mesh`, of which models use `tensor`, `fsdp` and `expert`.
"""

import math

from jax.sharding import NamedSharding


def mesh_axes(sharding: NamedSharding, axis: int) -> tuple[str, ...]:
    """The mesh axes over which an axis of the hidden states is split."""
    names = sharding.spec[axis] or ()
    return (names,) if isinstance(names, str) else names


def num_shards(sharding: NamedSharding | None, axis: int) -> int:
    """How many shards an axis of the hidden states has: 0 the rows, 1 the columns."""
    if sharding is None:
        return 1
    return math.prod(sharding.mesh.shape[name] for name in mesh_axes(sharding, axis))
