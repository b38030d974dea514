"""The shape of a decoder-only transformer, and what follows from it: its parameters and its linear layers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A decoder-only transformer's shape. `params` is computed from the shapes where it is not given.

    `intermediate` is the width of the gated MLP (or of one expert, with `experts` > 0); `norms` counts the norms in a
    layer; `bias` names the attention projections that have one ("qkv", "qkvo" or ""); `extra_params` are loaded with
    the model but take no part in text (an image tower). `bytes_per_token` is for English text, about.
    """

    id: str
    aliases: tuple[str, ...] = ()
    family: str
    model_type: str
    params: int = 0
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    context: int
    bytes_per_token: float = 4.0
    qk_norm: bool = False
    norms: int = 2
    bias: str = ""
    experts: int = 0
    experts_used: int = 0
    extra_params: int = 0
    instruct: bool = False
    licence: str | None = None

    def __post_init__(self) -> None:
        if not self.params:
            object.__setattr__(self, "params", self._count(self.experts) + self.extra_params)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one block outside experts: name -> (inputs, outputs). Adapters attach to these."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.model_type == "phi3":
            layers = {"qkv_proj": (self.hidden, wide + 2 * narrow), "o_proj": (wide, self.hidden)}
            mlp = {"gate_up_proj": (self.hidden, 2 * self.intermediate), "down_proj": (self.intermediate, self.hidden)}
        else:
            layers = {
                "q_proj": (self.hidden, wide),
                "k_proj": (self.hidden, narrow),
                "v_proj": (self.hidden, narrow),
                "o_proj": (wide, self.hidden),
            }
            mlp = {
                "gate_proj": (self.hidden, self.intermediate),
                "up_proj": (self.hidden, self.intermediate),
                "down_proj": (self.intermediate, self.hidden),
            }
        return layers if self.experts else layers | mlp

    @property
    def active_params(self) -> int:
        """Parameters that take part in one token's forward pass (all but idle experts and image towers)."""
        return self._count(self.experts_used)

    @property
    def matmul_params(self) -> int:
        """Parameters multiplied for each token inside the blocks, the output head not counted."""
        return self.active_params - self.vocabulary * self.hidden * (1 if self.tied else 2)

    def _count(self, experts: int) -> int:
        layer = sum(wide * tall for wide, tall in self.linears.values()) + self.norms * self.hidden
        if self.qk_norm:
            layer += 2 * self.head_dim
        if self.bias:
            layer += (self.heads + 2 * self.kv_heads) * self.head_dim + (self.hidden if "o" in self.bias else 0)
        if self.experts:
            layer += self.hidden * self.experts + experts * 3 * self.hidden * self.intermediate
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * layer + embeddings + self.hidden
