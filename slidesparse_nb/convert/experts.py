"""How model types store the experts of a layer in one tensor: which axis is the expert, which is n, and which is k.

No tensor tells: the same name holds [e, n, k] in one model type and [e, k, n] in another, and where n = k both fit. So a stack
is packed only if its model type is in this table and its shape is the one that config.json's sizes demand.

    model type           tensor                          axes         n    k    multiplied as
    qwen3_moe, mixtral   experts.gate_up_proj            [e, n, k]    2f   d    x @ w[i].T, gate rows, then up rows
                         experts.down_proj               [e, n, k]    d    f    x @ w[i].T
    granitemoe*          as these, or input_linear.weight, output_linear.weight
    gpt_oss              experts.gate_up_proj            [e, k, n]    2f   d    x @ w[i], gate and up rows in turns
                         experts.down_proj               [e, k, n]    d    f    x @ w[i]
    llama4_text          as gpt_oss, but gate rows, then up rows
    dbrx                 experts.mlp.w1, v1              [e * n, k]   f    d    x @ w[i].T
                         experts.mlp.w2                  [e * k, n]   d    f    x @ w[i]

d is the hidden size, f the width of an expert. Rows keep their order. Seen in transformers 5.24, modeling_*.py of each type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint.stacked import Stacked, float_name
from ..core.scheme import Scheme
from ..errors import shown

_UNSTACK = "unstack them into one weight [n, k] an expert"

_FUSED = {"experts.gate_up_proj": ("... n k", "2f", "d"), "experts.down_proj": ("... n k", "d", "f")}
_TRANSPOSED = {"experts.gate_up_proj": ("... k n", "2f", "d"), "experts.down_proj": ("... k n", "d", "f")}
_LINEAR = {
    "block_sparse_moe.input_linear.weight": ("... n k", "2f", "d"),
    "block_sparse_moe.output_linear.weight": ("... n k", "d", "f"),
}
_JOINED = {
    "experts.mlp.w1": ("(... n) k", "f", "d"),
    "experts.mlp.v1": ("(... n) k", "f", "d"),
    "experts.mlp.w2": ("(... k) n", "d", "f"),
}

FAMILIES: dict[str, tuple[str, dict[str, tuple[str, str, str]]]] = {
    "qwen3_moe": ("moe_intermediate_size", _FUSED),
    "mixtral": ("intermediate_size", _FUSED),
    "gpt_oss": ("intermediate_size", _TRANSPOSED),
    "llama4_text": ("intermediate_size", _TRANSPOSED),
    "granitemoe": ("intermediate_size", {**_FUSED, **_LINEAR}),
    "granitemoeshared": ("intermediate_size", {**_FUSED, **_LINEAR}),
    "granitemoehybrid": ("intermediate_size", {**_FUSED, **_LINEAR}),
    "dbrx": ("ffn_hidden_size", _JOINED),
}
"""Model type -> config.json's key for f, and end of a tensor's name -> axes, n, k."""

_HIDDEN = ("hidden_size", "d_model")
_EXPERTS = ("num_local_experts", "num_experts", "moe_num_experts")
"""Keys of config.json for d and e; attribute maps of transformers make them one another."""


@dataclass(frozen=True)
class Experts:
    """What config.json says of the experts of a model.

    Attributes:
        model_type: the one that is in FAMILIES; or what the model says instead, "" if there is no config.json.
        sizes: e, d and f, as far as config.json says each, once.
    """

    model_type: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, objects: Mapping[str, Mapping[str, Any]]) -> Experts:
        """Of the objects in a config.json, by place, the whole first."""
        types = {at: value["model_type"] for at, value in objects.items() if isinstance(value.get("model_type"), str)}
        known = {at: kind for at, kind in types.items() if kind in FAMILIES}
        if len(known) != 1:
            return cls(", ".join(dict.fromkeys(types.values())))
        ((at, kind),) = known.items()
        inner = f"{at}.ffn_config".removeprefix(".")  # of dbrx
        places = [objects[at], *([objects[inner]] if inner in objects else [])]
        found = {
            size: {place[key] for place in places for key in names if _is_size(place.get(key))}
            for size, names in _keys(kind).items()
        }
        return cls(kind, {size: values.pop() for size, values in found.items() if len(values) == 1})

    def of(self, name: str, shape: tuple[int, ...], code: str, scheme: Scheme) -> tuple[Stacked, tuple[int, ...]] | str:
        """How a stack is stored, and its logical shape (e, n, k); or why it cannot be packed, one clause.

        Args:
            name, shape, code: of the tensor. scheme: that it will be packed in.
        """
        whose = f"stacked experts {list(shape)}"
        axes = next((row for end, row in self._rows.items() if f".{name}".endswith(f".{end}")), None)
        if axes is None:
            kind = (
                f"of model type {shown(self.model_type)}"
                if self.model_type
                else "without a config.json that tells the model type"
            )
            return f"{whose} {kind}: which axis is k is not known (known: {', '.join(FAMILIES)}); {_UNSTACK}"
        order, *letters = axes
        keys = _keys(self.model_type)
        if missing := [letter for letter in dict.fromkeys(("e", *(text[-1] for text in letters))) if letter not in self.sizes]:
            needed = " and ".join(" or ".join(keys[letter]) for letter in missing)
            return f"{whose}: config.json must say their {needed}, once; mend it, or {_UNSTACK}"
        n, k = (int(text[:-1] or 1) * self.sizes[text[-1]] for text in letters)
        logical = (self.sizes["e"], n, k)
        stacked = Stacked(name, order, float_name(code) if scheme.scaled else scheme.dtype.name)
        if stacked.dense_shape(logical) != shape:
            told = ", ".join(f"{size} = {value}" for size, value in self.sizes.items())
            return (
                f"{whose} of model type {self.model_type} must be {list(stacked.dense_shape(logical))} by config.json's sizes"
                f" (experts, hidden size, width: {told}); mend config.json, or {_UNSTACK}"
            )
        return stacked, logical

    @property
    def _rows(self) -> dict[str, tuple[str, str, str]]:
        return FAMILIES[self.model_type][1] if self.model_type in FAMILIES else {}


def _keys(model_type: str) -> dict[str, tuple[str, ...]]:
    """config.json's keys for e, d and f."""
    return {"e": _EXPERTS, "d": _HIDDEN, "f": (FAMILIES[model_type][0],)}


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
