"""PyTorch: `SparseLinear`, a linear layer with a packed weight.

layer = SparseLinear.from_linear(linear, "6:8", "INT8_W8A8", prune="magnitude")
y = layer(x)                                            # x [..., k] -> y [..., n]
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import slidesparse_nb as ss

from .operators import FLOATS, require_no_grad
from .tensors import NUMPY, PACKED, TORCH, arrange, as_cupy, as_numpy, facts_of, from_numpy


class Quantized(NamedTuple):
    """Activations quantized once, for several layers of one pattern, scheme and k: from `SparseLinear.quantize`."""

    operand: Tensor
    scale: Tensor
    lead: tuple[int, ...]
    dtype: torch.dtype
    kind: tuple[str, str, int]


class DenseView(Tensor):
    """What `layer.weight` of a packed layer is, for code that expects a dense one: type, shape and place, which cost nothing.

    Whatever computes with it gets the dequantized weight, made anew each time; it cannot be changed.
    """

    layer: SparseLinear
    FACTS = frozenset(
        getattr(Tensor, name).__get__ for name in ("dtype", "shape", "ndim", "layout", "requires_grad", "is_sparse")
    ) | {
        *(getattr(Tensor, name) for name in ("size", "dim", "ndimension", "numel", "nelement", "element_size", "stride")),
        *(getattr(Tensor, name) for name in ("is_floating_point", "is_complex", "is_contiguous", "__len__", "__hash__")),
    }

    @classmethod
    def of(cls, layer: SparseLinear) -> DenseView:
        """Of a layer's weight."""
        made = torch.empty(layer.out_features, layer.in_features, dtype=layer.dtype, device="meta").as_subclass(cls)
        made.layer = layer
        made._is_hf_initialized = True  # transformers: there is nothing to initialize
        return made

    @property
    def device(self) -> torch.device:
        return self.layer.device

    @property
    def is_cuda(self) -> bool:
        return self.layer.device.type == "cuda"

    @property
    def is_meta(self) -> bool:
        return self.layer.device.type == "meta"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if func in cls.FACTS:
            return super().__torch_function__(func, types, args, kwargs)
        if func in (Tensor.data.__get__, Tensor.detach):  # type: ignore[attr-defined]
            return args[0]
        if name in ("data_ptr", "storage", "untyped_storage"):
            raise ss.UnsupportedError(f"weight: of a packed layer, has no memory of its own ({name}); take layer.dense()")
        if any(isinstance(leaf, cls) for leaf in tree_leaves(cls._changed(name, args, kwargs))):
            raise ss.UnsupportedError(
                f"weight: of a packed layer, cannot be changed ({name}); pack the model with the layer dense (--ignore)"
            )
        args, kwargs = tree_map_only(cls, lambda view: view.layer.dense(), (args, kwargs))
        return func(*args, **kwargs)

    @staticmethod
    def _changed(name: str, args: Any, kwargs: Any) -> Any:
        """What a function changes: `out`, and its first argument if it works in place."""
        in_place = name in ("__setitem__", "__set__") or re.fullmatch(r"__i(?!n|ter)\w+__|[a-z]\w*_|_foreach\w+_", name)
        if not (in_place or kwargs.get("inplace")):
            return kwargs.get("out")
        return args[0] if args else kwargs.get("input", kwargs.get("tensor"))


class SparseLinear(nn.Module):
    """y = x @ w.T + bias with a packed weight [out_features, in_features]; inference only.

    The tensors of the packed format (docs/format.md) are its state: `weight_packed`, `weight_meta`, `weight_scale`,
    `weight_block_scale`, `weight_shape`, `bias`. On a GPU the weight is arranged in memory of PyTorch's there, and the packed
    tensors stay on the host; `drop_packed` frees them.

    Args:
        pattern: "6:8", (6, 8) or a Pattern.
        scheme: "INT8_W8A8", "FP8_DYNAMIC", "BF16", "FP16", "W4A8", "NVFP4", "MXFP4", or the type of weights that tells it.
        bias: whether there is one, of `dtype`.
        device, dtype: as of torch.nn.Linear; the packed tensors keep their types whatever `dtype` and later casts say.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pattern: Any = "6:8",
        scheme: Any = "INT8_W8A8",
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        config = ss.PackedConfig.of(pattern, scheme)
        self.pattern, self.scheme = config.pattern, config.scheme
        self._kind = str(self.pattern), str(self.scheme), in_features
        for name, (kind, shape) in config.tensors(out_features, in_features).items():
            self.register_buffer(name, torch.empty(shape, dtype=TORCH[kind], device=device))
        for name in PACKED:
            if name not in self._buffers:
                self.register_buffer(name, None)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype), False) if bias else None
        )
        self.arranged: list[Tensor] = []
        self.facts = facts_of(self)
        self.dtype = dtype or torch.get_default_dtype()

    # ---- where weights come from

    @classmethod
    def from_packed(cls, packed: ss.PackedWeight, bias: Tensor | None = None, device: Any = None) -> SparseLinear:
        """Of a packed weight on the host or a GPU."""
        with torch.device("meta"):
            made = cls(packed.k, packed.n, packed.pattern, packed.scheme, bias=False)
        for name, array in packed.tensors().items():
            held = from_numpy(np.array(array.get() if hasattr(array, "get") else array))
            made._buffers[name] = held.view(made._buffers[name].dtype)
        if bias is not None:
            made.bias = nn.Parameter(bias.detach(), False)
        if not made.scheme.scaled:
            made.dtype = TORCH[made.scheme.dtype.name]
        elif bias is not None:
            made.dtype = bias.dtype
        return made.settle(device)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, pattern: Any = "6:8", scheme: Any = "INT8_W8A8", prune: Any = "magnitude"
    ) -> SparseLinear:
        """Prune, quantize and pack a dense layer, where it is; arguments and errors are those of `slidesparse_nb.pack`."""
        weight = linear.weight.detach().contiguous()
        if weight.dtype not in FLOATS or weight.device.type not in ("cpu", "cuda"):
            raise ss.OperandError(
                f"linear: its weight is {weight.dtype} on {weight.device}, must be float32, float16 or bfloat16, on the CPU or"
                " a GPU"
            )
        found = ss.Scheme.of(scheme)
        if on_gpu := weight.is_cuda and not found.blocks:  # whose weights are packed on the CPU
            torch.cuda.synchronize(weight.device)  # CuPy's stream is not PyTorch's
        packed = ss.pack(as_cupy(weight) if on_gpu else as_numpy(weight.cpu()), pattern, found, prune=prune)
        made = cls.from_packed(packed, linear.bias, weight.device)
        made.dtype = weight.dtype
        return made

    # ---- where they are

    def settle(self, device: Any = None) -> SparseLinear:
        """Arrange the packed tensors for the GPU that they are on, or are to go to; the packed ones go to the host.

        Called by whoever filled the buffers: `.to`, `load_state_dict`, adapters.
        """
        target = torch.device(device) if device is not None else self.device
        self._require_packed()
        if target.type == "cuda":
            if target.index is None:
                target = torch.device("cuda", torch.cuda.current_device())
            self.arranged = [arrange(self.packed(), target)]
        else:
            self.arranged = []
        if target.type != "meta":
            for name in PACKED:
                if self._buffers[name] is not None:
                    self._buffers[name] = self._buffers[name].to("cpu")
        if self.bias is not None and (self.bias.device != target or self.bias.requires_grad):
            self.bias = nn.Parameter(self.bias.detach().to(target), False)
        return self

    @property
    def device(self) -> torch.device:
        """Where it multiplies."""
        if self.weight_packed is not None and self.weight_packed.device.type != "cpu":
            return self.weight_packed.device
        return self.arranged[0].device if self.arranged else torch.device("cpu")

    def packed(self) -> ss.PackedWeight:
        """The packed weight, on the host.

        Raises:
            OperandError: it was dropped.
            FormatError: the tensors do not belong together.
        """
        self._require_packed()
        tensors = {name: as_numpy(self._buffers[name].cpu()) for name in PACKED if self._buffers[name] is not None}
        found = ss.PackedWeight.from_tensors(tensors, self.pattern, self.scheme)
        if found.shape != (self.out_features, self.in_features):
            raise ss.FormatError(
                f"weight_shape: {found.shape} must be {self.out_features, self.in_features}, the layer's n and k"
            )
        return found

    @property
    def weight(self) -> DenseView:
        """For code that looks at a linear layer's weight, or computes with it: slowly, by `dense`."""
        return DenseView.of(self)

    @torch.compiler.disable
    def dense(self) -> Tensor:
        """The weight [out_features, in_features] dequantized, in the layer's `dtype`, where it multiplies.

        Raises:
            OperandError: the packed tensors were dropped.
        """
        packed = self.packed()
        w = np.asarray(ss.unpack(packed)).astype(np.float32)
        return torch.from_numpy(w if packed.scale is None else w * packed.scale).to(self.device, self.dtype)

    def reset_parameters(self) -> None:
        """Nothing: packed weights are not initialized."""

    def _require_packed(self) -> None:
        if self.weight_packed is None:
            raise ss.OperandError("weight: the packed tensors were dropped; load the layer again")

    def drop_packed(self) -> None:
        """Free the packed tensors; the layer then has no state to save. On the CPU they are what is multiplied."""
        if self.arranged:
            for name in PACKED:
                self._buffers[name] = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        place = self.device
        probe = fn(torch.empty(0, dtype=torch.uint8, device=place))  # casts change no integers
        if probe.device != place:
            self._require_packed()
        if self.bias is not None:
            self.bias = nn.Parameter(fn(self.bias.detach()), False)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=place)).dtype
        if probe.device != place:
            if "meta" in (probe.device.type, place.type):  # there is nothing to arrange: .to("meta"), or .to_empty(...)
                for name, tensor in self._buffers.items():
                    if tensor is not None:
                        self._buffers[name] = fn(tensor.view(torch.uint8)).view(tensor.dtype)
                self.arranged = []
            else:
                self.settle(probe.device)
        return self

    def _save_to_state_dict(self, *arguments: Any, **options: Any) -> None:
        self._require_packed()
        super()._save_to_state_dict(*arguments, **options)

    def _load_from_state_dict(self, state: Any, prefix: str, *others: Any) -> None:
        """Tensors of another type, or of another n or k, are refused, where PyTorch would cast them."""
        given = {name: state[prefix + name] for name in PACKED if prefix + name in state}
        wrong = [
            f"{prefix}{name}: {tensor.dtype} must be {own.dtype}, as {self.scheme} weights have it"
            for name, tensor in given.items()
            if (own := self._buffers[name]) is not None and tensor.dtype != own.dtype
        ]
        shape = given.get("weight_shape")
        if shape is not None and not shape.is_meta and shape.tolist() != [self.out_features, self.in_features]:
            wrong.append(f"{prefix}weight_shape: {shape.tolist()} must be {[self.out_features, self.in_features]}, the layer's")
        if wrong:
            others[-1].extend(wrong)
            return
        super()._load_from_state_dict(state, prefix, *others)
        if given and self.weight_packed is not None and not self.weight_packed.is_meta:
            self.settle()

    # ---- the product

    def _operands(self) -> list[Tensor]:
        if self.arranged:
            return self.arranged
        held = [self._buffers[name] for name in PACKED[:-1] if self._buffers[name] is not None]
        return [t.view(torch.uint8) if NUMPY[t.dtype].startswith("float8") else t for t in held]  # bits are all that is read

    def quantize(self, x: Tensor) -> Quantized:
        """x [..., k], quantized for this layer and others of the same pattern, scheme and k (q/k/v, gate/up)."""
        require_no_grad(x)
        operand, scale = torch.ops.slidesparse.quantize(x, self._operands(), self.out_features, self.in_features, self.facts)
        return Quantized(operand, scale, tuple(x.shape[:-1]), x.dtype, self._kind)

    def forward(self, x: Tensor | Quantized) -> Tensor:
        """x: [..., k] float32, float16 or bfloat16, or what `quantize` made of it -> y: [..., n] of its type."""
        facts = self.out_features, self.in_features, self.facts
        if isinstance(x, Quantized):
            if x.kind != self._kind:
                (pattern, scheme, k), own = x.kind, self._kind
                raise ss.OperandError(
                    f"x: was quantized for {pattern} {scheme} of k={k}, this layer is {own[0]} {own[1]} of k={own[2]}; quantize"
                    " x with a layer of the same pattern, scheme and k"
                )
            y = torch.ops.slidesparse.product(x.operand, x.scale, self._operands(), self.bias, x.dtype, *facts)
            return y.reshape(*x.lead, self.out_features)
        require_no_grad(x)
        return torch.ops.slidesparse.linear(x, self._operands(), self.bias, *facts)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None},"
            f" {self.pattern.described}, {self.scheme}"
        )
