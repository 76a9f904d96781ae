"""Names of the array types that several modules of ops share, and sizes of which few programs are compiled."""

from jaxtyping import Array, Bool, Float, Int

Scalar = float | Float[Array, ""]  # an array where a run is one compiled function of its hyperparameters
PerRow = Float[Array, " B"]
PerToken = Float[Array, "B T"]
TokenMask = Bool[Array, "B T"]
Segments = Int[Array, "B T"] | None  # None: each row is one sequence
PromptIds = Int[Array, " B"] | Int[Array, "B T"] | None  # of each row, or of each column of packed rows
Elementwise = Float[Array, "*shape"]


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max(number - 1, 0).bit_length()
