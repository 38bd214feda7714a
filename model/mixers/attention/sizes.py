"""The attention's keys of the section `model`."""

from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, Field, model_validator

# In a layer pattern: over a window, over everything before, and over the keys of the last of those.
LETTER, FULL_LETTER, CROSS_LETTER = "*", "F", "X"


class AttentionSizes(BaseModel):
    """Heads, window and positions of the attention."""

    if TYPE_CHECKING:
        hidden_size: int  # of the model

    num_query_heads: int = Field(gt=0, description="Query heads; hidden_size / num_query_heads is the head dim")
    num_kv_heads: int = Field(gt=0, description="Attention key and value heads, a divisor of num_query_heads")
    window: int = Field(gt=0, description="Positions that a query of a layer * sees, itself included")
    rope_base: float | None = Field(
        10_000.0, gt=0, description="Base of the rotary position embedding; null: attention without positions"
    )

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.hidden_size % self.num_query_heads:
            raise ValueError(
                f"model.num_query_heads is {self.num_query_heads}, which does not divide model.hidden_size "
                f"{self.hidden_size}: choose a divisor"
            )
        if self.head_dim % 2 and self.rope_base is not None:
            raise ValueError(
                f"model.num_query_heads is {self.num_query_heads}, which makes the head dim {self.head_dim} odd: "
                "rotary positions need an even one"
            )
        if self.num_query_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_kv_heads is {self.num_kv_heads}, which does not divide model.num_query_heads "
                f"{self.num_query_heads}: choose a divisor"
            )
        return self

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_query_heads

    @property
    def kv_size(self) -> int:
        """Width of all keys (and of all values)."""
        return self.num_kv_heads * self.head_dim
