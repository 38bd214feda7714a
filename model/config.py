"""What a Samba is: sizes, layer pattern and initialisation (arXiv 2406.07522, section 2 and table 12)."""

import math
import re

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAMBA, ATTENTION, MLP = "M", "*", "-"
_PATTERN = re.compile(r"\s*([M*-]+)\s*(?:x\s*(\d+)\s*)?")


class ModelConfig(BaseModel):
    """The shape of a model; it does not depend on how the model is spread over ranks."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    pattern: str = Field(
        description="Sublayers in order, in megatron-core's notation: M Mamba-1, * sliding-window attention, - SwiGLU; "
        "'M-*- x 6' repeats a pattern"
    )
    hidden_size: int = Field(gt=0, description="Width of the residual stream (d_model)")
    num_query_heads: int = Field(gt=0, description="Query heads; hidden_size / num_query_heads is the head dim")
    num_kv_heads: int = Field(gt=0, description="Attention key and value heads, a divisor of num_query_heads")
    mlp_size: int = Field(gt=0, description="Inner width of the SwiGLU MLP")
    window: int = Field(gt=0, description="Positions that a query sees, itself included")
    vocab_size: int = Field(gt=0, description="Rows of the embedding; at least the tokenizer's vocabulary")
    tie_embeddings: bool = Field(True, description="Whether the LM head is the embedding matrix")
    d_state: int = Field(16, gt=0, description="Mamba states per channel")
    d_conv: int = Field(4, gt=1, description="Taps of Mamba's causal convolution")
    expand: int = Field(2, gt=0, description="Mamba's inner width over hidden_size")
    dt_rank: int | None = Field(None, gt=0, description="Rank of Mamba's step sizes; null: ceil(hidden_size / 16)")
    dt_min: float = Field(1e-3, gt=0, description="Smallest initial step size (log-uniform up to dt_max)")
    dt_max: float = Field(1e-1, gt=0, description="Largest initial step size")
    dt_floor: float = Field(1e-4, gt=0, description="Floor of the initial step size")
    rope_base: float = Field(10_000.0, gt=0, description="Base of the rotary position embedding")
    norm_eps: float = Field(1e-5, gt=0, description="Epsilon of every RMSNorm")
    embedding_std: float = Field(0.02, gt=0, description="Standard deviation of the initial embedding")

    @field_validator("pattern")
    @classmethod
    def _expand_pattern(cls, value: str) -> str:
        match = _PATTERN.fullmatch(value)
        if not match or match[2] == "0":
            raise ValueError("allowed are the letters M, * and -, and an optional repetition as in 'M-*- x 6'")
        return match[1] * int(match[2] or 1)

    @model_validator(mode="after")
    def _check_heads(self) -> "ModelConfig":
        if self.hidden_size % self.num_query_heads:
            raise ValueError(
                f"model.num_query_heads is {self.num_query_heads}, which does not divide model.hidden_size "
                f"{self.hidden_size}: choose a divisor"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"model.num_query_heads is {self.num_query_heads}, which makes the head dim {self.head_dim} odd: "
                "rotary positions need an even one"
            )
        if self.num_query_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_kv_heads is {self.num_kv_heads}, which does not divide model.num_query_heads "
                f"{self.num_query_heads}: choose a divisor"
            )
        if self.dt_min > self.dt_max:
            raise ValueError(f"model.dt_min is {self.dt_min}, above model.dt_max {self.dt_max}")
        return self

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_query_heads

    @property
    def kv_size(self) -> int:
        """Width of all keys (and of all values)."""
        return self.num_kv_heads * self.head_dim

    @property
    def inner_size(self) -> int:
        """Width of Mamba's inner stream (d_inner)."""
        return self.expand * self.hidden_size

    @property
    def dt_rank_size(self) -> int:
        return self.dt_rank or math.ceil(self.hidden_size / 16)
