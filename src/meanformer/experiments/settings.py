"""What a user can set for every experiment."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from ..checks import check_count


class BadArgument(ValueError):
    """What the user asked for cannot be done by this experiment."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of `meanformer run`.

    - `seed`: of the random initial tokens; the same seed gives the same numbers.
    - `tokens`: how many (default: as in the paper).
    - `quick`: a smaller, faithful version, in seconds.
    - `layers`: the paper's fixed Euler layers where the default is adaptive steps; Figure 1
        takes them anyhow.
    - `progress`: show a bar.
    """

    seed: int = 0
    tokens: int | None = None
    quick: bool = False
    layers: bool = False
    progress: bool = False

    def __post_init__(self):
        check_count(self.seed, "seed", minimum=0)
        if self.tokens is not None:
            check_count(self.tokens, "tokens")

    @property
    def key(self) -> PRNGKeyArray:
        return jax.random.key(self.seed)

    def count(self, paper: int, quick: int, minimum: int = 1) -> int:
        """How many tokens to take; fewer than `minimum` cannot show the claims."""
        n = self.tokens if self.tokens is not None else quick if self.quick else paper
        if n < minimum:
            raise BadArgument(
                f"Argument `tokens` must be at least {minimum} for this experiment, whose "
                f"claims are statistical, but is {n}. Leave it out for the paper's number."
            )
        return n

    def record(self, **more: Any) -> dict[str, Any]:
        """The parameters for the summary."""
        return more | {
            "quick": self.quick,
            "precision": 64 if jnp.result_type(float) == jnp.float64 else 32,
        }
