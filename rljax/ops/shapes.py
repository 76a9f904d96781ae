"""Names of the array types that several modules of ops share."""

from jaxtyping import Array, Bool, Float, Int

Scalar = float | Float[Array, ""]  # an array where a run is one compiled function of its hyperparameters
PerRow = Float[Array, " B"]
PerToken = Float[Array, "B T"]
TokenMask = Bool[Array, "B T"]
Segments = Int[Array, "B T"] | None  # None: each row is one sequence
PromptIds = Int[Array, " B"] | Int[Array, "B T"] | None  # of each row, or of each column of packed rows
Elementwise = Float[Array, "*shape"]
