"""transformers: import this module, then load packed folders as any other, or pack while loading.

    import slidesparse_nb.integrations.transformers as st
    model = AutoModelForCausalLM.from_pretrained("model-6of8-int8", device_map="cuda")
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=st.SlideSparseConfig("6:8", "INT8_W8A8"))

Linear layers become `SparseLinear`; embeddings, the output head, routers, norms, experts stored as one stacked parameter and
whatever `ignore` names stay as they are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

import slidesparse_nb as ss

from ..convert.kinds import not_linear
from ..pruning.model import renamer
from .tensors import named
from .torch import SparseLinear

NAME = "slidesparse"
HEADS = ("lm_head",)
"""Dense by default where a model is packed while it is loaded."""


class SlideSparseConfig(QuantizationConfigMixin):
    """How to pack a dense model while it is loaded; or how a packed one is stored, from its config.json.

    Args:
        pattern: "6:8", (6, 8) or a Pattern.
        scheme: "INT8_W8A8", "FP8_DYNAMIC", "BF16", "FP16", "W4A8", "NVFP4" or "MXFP4".
        prune: "magnitude", "random", or "none" for a model that obeys the pattern.
        ignore: layers that stay dense: exact names, or "re:" and a regular expression that matches from the name's start.
    """

    def __init__(
        self,
        pattern: Any = "6:8",
        scheme: Any = "INT8_W8A8",
        prune: str = "magnitude",
        ignore: Any = HEADS,
        **written: Any,
    ) -> None:
        self.quant_method = NAME
        if written:  # config.json's entry
            written.pop("quant_method", None)
            read = ss.PackedConfig.read({"quant_method": NAME, "pattern": pattern, "ignore": ignore, **written})
            self.packed = read.without_stacks("transformers")
        else:
            self.packed = ss.PackedConfig.of(pattern, scheme, ignore)
        self.prune = prune

    def to_dict(self) -> dict[str, Any]:
        return self.packed.written()

    def __repr__(self) -> str:
        return f"SlideSparseConfig({self.packed.pattern.described}, {self.packed.scheme}, ignore={list(self.packed.ignore)})"

    def ignores(self, name: str) -> bool:
        """Whether a layer stays dense."""
        return any(re.match(entry[3:], name) if entry.startswith("re:") else entry == name for entry in self.packed.ignore)


class SlideSparseQuantizer(HfQuantizer):
    """Swaps linear layers for `SparseLinear` before weights are loaded (packed folders), or after (dense ones)."""

    requires_calibration = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        pass

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        return torch.bfloat16 if dtype is None else dtype

    def _layers(self, model: nn.Module) -> list[tuple[str, nn.Linear]]:
        config = self.quantization_config
        return [(name, layer) for name, layer in model.named_modules() if type(layer) is nn.Linear and not config.ignores(name)]

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files: Any = None, **kwargs: Any) -> None:
        if self.pre_quantized:
            packed = self.quantization_config.packed
            modules, dense = modules_in(checkpoint_files or (), packed.scheme)
            linear = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear}
            wanted = {name for name, _ in self._layers(model) if not (modules and is_new_head(model, name, modules))}
            places = places_of(model, modules, dense, linear, wanted) if modules else None
            for name in wanted if places is None else places:
                layer = linear[name]
                bias, dtype = layer.bias is not None, layer.weight.dtype
                facts = packed.pattern, packed.scheme, bias, "meta", dtype
                model.set_submodule(name, SparseLinear(layer.in_features, layer.out_features, *facts))
            if modules and places is None:
                require_places(model, modules)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
        if len(places) > 1 and places & {"cpu", "disk"}:
            raise ss.UnsupportedError(
                f"device_map: {', '.join(sorted(places))}: packed layers are not moved between host and GPU for each call; use"
                " GPUs alone, or the CPU alone"
            )
        if self.pre_quantized:
            packed = {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseLinear)}
            if len(places) < 2:  # what moves between GPUs loses transformers' mark
                require_loaded(packed)
            for name, layer in packed.items():
                with named(name):
                    layer.packed()
                    layer.settle()
        else:
            self._pack(model)
        return model.requires_grad_(False)  # packed layers are for inference only

    def _pack(self, model: nn.Module) -> None:
        """Replace the dense layers. Those that share their weight, with an embedding, and what `slidesparse pack` would leave
        dense (routers; heads, if `ignore` names one) stay, and config.json will say so."""
        config = self.quantization_config
        uses = Counter(id(each.weight) for each in model.modules() if isinstance(getattr(each, "weight", None), nn.Parameter))
        layers = self._layers(model)
        heads = any(config.ignores(head) for head in HEADS)
        told = {name: not_linear(name, tuple(dense.weight.shape)) for name, dense in layers}
        left = {name for name, why in told.items() if why and (heads or "output head" not in why)}
        left |= {name for name, dense in layers if uses[id(dense.weight)] > 1}
        packed = config.packed
        config.packed = ss.PackedConfig.of(packed.pattern, packed.scheme, (*packed.ignore, *sorted(left)))
        if len(layers) == len(left):
            raise ss.UnsupportedError(f"model: {type(model).__name__} has no linear layer of torch.nn.Linear itself to pack")
        for name, dense in layers:
            if name not in left:
                with named(name):
                    made = SparseLinear.from_linear(dense, packed.pattern, packed.scheme, config.prune)
                model.set_submodule(name, made)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[Any, dict[str, str]]:
        """What `save_pretrained` writes beside its own: that the files hold packed weights."""
        return None, dict(self.quantization_config.packed.metadata())

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def modules_in(files: Iterable[str], scheme: ss.Scheme) -> tuple[set[str], set[str]]:
    """The packed and the dense modules in safetensors files; FormatError where packed values are of another type, which would
    be cast."""
    packed, dense = ".weight_packed", ".weight"
    modules: dict[str, set[str]] = {packed: set(), dense: set()}
    for path in files:
        if str(path).endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    module, dot, tensor = name.rpartition(".")
                    if dot + tensor == packed and (code := file.get_slice(name).get_dtype()) != scheme.dtype.safetensors:
                        raise ss.FormatError(
                            f"{path}: {name}: {code} must be {scheme.dtype.safetensors}, as config.json says; pack again"
                        )
                    modules.get(dot + tensor, set()).add(module)
    return modules[packed], modules[dense]


def names_of(model: Any, name: str) -> set[str]:
    """A module's name with and without the prefix of the model's body."""
    base = f"{model.base_model_prefix}."
    return {name, name.removeprefix(base), base + name}


def places_of(model: Any, modules: set[str], dense: set[str], linear: Collection[str], wanted: set[str]) -> set[str] | None:
    """The linear layers that the packed modules go to, renamed as transformers renames them; None if that is not known.

    Args:
        modules, dense: of the files, packed and dense.
        linear: the model's linear layers; wanted: those that config.json takes for packed.

    Raises:
        FormatError: a layer that is wanted is neither packed nor dense in the files.
        UnsupportedError: a packed module has no linear layer to go to.
    """
    if (rename := renamer(model)) is None:
        return None

    def place(module: str, tensor: str) -> str | None:
        key = rename(module + tensor).removesuffix(tensor)
        return next((name for name in names_of(model, key) if name in linear), None)

    packed_at = {module: place(module, ".weight_packed") for module in sorted(modules)}
    dense_at = {place(module, ".weight") for module in dense}
    for module, found in packed_at.items():
        if found is None:
            require_no_branch(model, module)
    places = {found for found in packed_at.values() if found is not None}
    if made_up := wanted - places - dense_at:
        count = len(places | made_up)
        raise ss.FormatError(
            f"{min(made_up)}: is not in the files, which have {len(places)} of {count} packed layers; pack again"
        )
    return places


def require_no_branch(model: Any, name: str) -> None:
    """UnsupportedError for a packed module without a place, unless the model lacks its whole branch, such as the head."""
    if any(hasattr(model, each.partition(".")[0]) for each in (name, name.removeprefix(f"{model.base_model_prefix}."))):
        raise ss.UnsupportedError(
            f"{name}: is packed, but {type(model).__name__} has no torch.nn.Linear there (experts in one parameter, or a class"
            " of its own); pack the model with it dense (--ignore)"
        )


def require_loaded(packed: Mapping[str, SparseLinear]) -> None:
    """FormatError for a tensor of a layer that was not loaded: transformers then leaves what its memory held before."""
    tensors = {
        f"{name}.{part}": tensor for name, layer in packed.items() for part, tensor in layer.state_dict(keep_vars=True).items()
    }
    missing = [name for name, tensor in tensors.items() if not getattr(tensor, "_is_hf_initialized", False)]
    if 0 < len(missing) < len(tensors):  # none: a version that does not mark what it loads
        raise ss.FormatError(f"{missing[0]}: is not in the files; pack again")


def is_new_head(model: Any, name: str, modules: set[str]) -> bool:
    """Whether a layer is outside the model's body and not in the files: a head for another task, which is to be trained."""
    body = model.base_model_prefix
    return hasattr(model, body) and not name.startswith(f"{body}.") and not names_of(model, name) & modules


def require_places(model: Any, modules: set[str]) -> None:
    """An error where packed modules and packed layers do not match, and transformers would make up weights.

    Where the model lacks a whole branch, such as the head, its modules are left out; renamed ones are told by their number.

    Raises:
        FormatError: a layer has no tensors in the files.
        UnsupportedError: a module has no linear layer to go to.
    """
    there = {name for name, layer in model.named_modules() if isinstance(layer, SparseLinear)}
    if len(modules) < len(there):
        name = next((name for name in sorted(there) if not names_of(model, name) & modules), min(there))
        raise ss.FormatError(
            f"{name}: is not in the files, which have {len(modules)} of {len(there)} packed layers; pack again"
        )
    for name in sorted(modules) if len(modules) > len(there) else ():
        if not names_of(model, name) & there:
            require_no_branch(model, name)


if NAME not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(NAME)(SlideSparseQuantizer)
if NAME not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(NAME)(SlideSparseConfig)
