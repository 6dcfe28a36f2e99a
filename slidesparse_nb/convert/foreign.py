"""What tensors and files beside them show at once: no dense model, or weights that only another tool reads. All is refused."""

from __future__ import annotations

import re
from functools import lru_cache

from ..checkpoint import Checkpoint
from ..errors import UnsupportedError, shown
from . import kinds

ADAPTER_FILE = "adapter_config.json"
FOREIGN = (
    (re.compile(r"qweight|qzeros|g_idx|weight_g_idx"), "GPTQ or AWQ"),
    (re.compile(r"SCB|absmax|quant_map|nested_absmax|nested_quant_map|quant_state.*|weight_format"), "bitsandbytes"),
    (re.compile(r"qscale_weight|qscale_act"), "Mistral's FP8"),
    (re.compile(r"scale_weight|scaled_fp8"), "scaled FP8"),
    (re.compile(r"pre_quant_scale|weight_scale_2|weight_quantizer|input_quantizer"), "ModelOpt"),
    (re.compile(r"compressed|bitmask|row_offsets"), "a sparse format of compressed-tensors"),
    (re.compile(r"weight_global_scale|input_global_scale"), "NVFP4"),
    (re.compile(r"W_q|qmap"), "HQQ"),
    (re.compile(r"Qidxs|SU|SV"), "QuIP#"),
    (re.compile(r"suh|svh|trellis"), "EXL3"),
    (re.compile(r"q_weight|q_scale_max|q_groups|q_perm|q_invperm"), "EXL2"),
    (re.compile(r"_?weight_qdata"), "torchao"),
    (re.compile(r"weight_scales|weight_blocks|.*_proj_blocks|.*_proj_scales"), "a block format such as MXFP4"),
    (re.compile(r"_data|_scale|_zeropoint|_shift"), "quanto"),
)  # fmt: skip
"""Last parts of tensor names -> the tool whose loader alone can read such weights."""
AMBIGUOUS = {"_data", "_scale"}
"""Of these, the ones that mean it only where they take the place of a module's weight."""
SCALES = re.compile(r"(?<!logit_)scale|zeros|zero_point|absmax|centroid|codebook")
INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32")
"""Types of quantized values; 64-bit integers are indices."""


def refuse_no_dense_model(checkpoint: Checkpoint) -> None:
    """Refuse what is packed already, an adapter, and weights that were left elsewhere.

    Raises:
        UnsupportedError: it names the tensor or the file.
    """
    _refuse_packed(checkpoint.shapes)
    _refuse_adapters(checkpoint, checkpoint.shapes)
    _refuse_ungathered(checkpoint.shapes)


def _refuse_packed(shapes: kinds.Shapes) -> None:
    """Refuse a checkpoint that is packed already, by this tool or another."""
    packed = any(name.endswith(".weight_packed") for name in shapes)
    stray = next((name for name in shapes if name.endswith((".weight_meta", ".weight_shape"))), None)
    if packed and stray is not None and any(name.endswith(".weight_meta") for name in shapes):
        blocks = any(name.endswith(".weight_block_scale") for name in shapes)
        way = "pack its dense source" if blocks else "`slidesparse show --unpack OUT` writes it back dense"
        raise UnsupportedError(f"this checkpoint is packed already; {way}")
    if packed:
        raise UnsupportedError("this checkpoint holds another tool's packed weights; start from the unquantized model")
    if stray is not None:
        raise UnsupportedError(
            f"{shown(stray)}: a packed checkpoint could not be told from one of another tool; rename this tensor"
        )


def _refuse_adapters(checkpoint: Checkpoint, shapes: kinds.Shapes) -> None:
    """Refuse an adapter in place of a model, and one that loaders would add to it."""
    if checkpoint.root is not None and (checkpoint.root / ADAPTER_FILE).exists():
        what = (
            "the folder holds an adapter and no model"
            if checkpoint.config is None
            else "loaders add its adapter to the weights"
        )
        raise UnsupportedError(
            f"{ADAPTER_FILE}: {what}; merge the adapter into the model first (in peft: merge_and_unload), and pack that, or"
            " take the adapter's files out of the folder to pack the model alone"
        )
    weights = [name for name in shapes if len(shapes[name]) >= 2]
    if weights and all(kinds.is_adapter(name) for name in weights):
        raise UnsupportedError(
            f"{shown(weights[0])}: the checkpoint is an adapter and no model; merge it into its model first (in peft:"
            " merge_and_unload), and pack that"
        )


def _refuse_ungathered(shapes: kinds.Shapes) -> None:
    """Refuse a checkpoint whose weights were left on other processes: their places are empty."""
    empty = next((name for name, shape in shapes.items() if shape == (0,) and name.endswith(".weight")), None)
    if empty is not None:
        raise UnsupportedError(
            f"{shown(empty)}: is empty ([0]), as a trainer (ZeRO-3) leaves weights that it did not gather; gather and save"
            " again"
        )


def refuse_foreign(checkpoint: Checkpoint) -> None:
    """Refuse weights that only another tool's loader can read.

    Raises:
        UnsupportedError: it names the tensor and the tool.
    """
    shapes = checkpoint.shapes
    scales: dict[str, str] = {}
    for name in shapes:
        parent, _, last = name.rpartition(".")
        if SCALES.search(last):
            scales.setdefault(parent, last)
    for name, (info, _) in checkpoint.tensors.items():
        parent, _, last = name.rpartition(".")
        tools = _tools(last) + (_tools("quant_state") if parent.endswith(".quant_state") else ())
        if last in AMBIGUOUS and not _in_place_of_weight(name, last, shapes):
            tools = ()
        integers = last != "weight" and not SCALES.search(last) and info.code in INTEGERS and len(info.shape) >= 2
        if not tools and integers and parent in scales:
            tools = (f"a tool that stores integers beside {shown(scales[parent])}",)
        if tools:
            raise UnsupportedError(
                f"{shown(name)}: {info.code} {list(info.shape)} is written by {tools[0]}, which packing cannot read; start from"
                " a checkpoint with plain weights"
            )


@lru_cache(maxsize=1 << 12)
def _tools(last: str) -> tuple[str, ...]:
    """The tools that write tensors with this last part of a name."""
    return tuple(tool for pattern, tool in FOREIGN if pattern.fullmatch(last))


def _in_place_of_weight(name: str, hit: str, shapes: kinds.Shapes) -> bool:
    """Whether a tensor with an ambiguous last part takes the place of a matrix: X.weight_v without X.weight."""
    head = name[: name.rindex(hit)].rstrip(".")
    module = head.removesuffix(".weight").removesuffix(".parametrizations")
    return len(shapes[name]) == 2 and min(shapes[name]) > 1 and f"{module}.weight" not in shapes
