"""transformers, on the CPU: its models multiply the experts along the axis that we pack, and load what we unpack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import slidesparse_nb as ss
from slidesparse_nb.checkpoint import Checkpoint, read_stacked
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import BFLOAT16, INT8, DType
from slidesparse_nb.core.pattern import Pattern
from slidesparse_nb.core.scheme import Scheme

E, D, F = 4, 64, 48
SIZES = {
    "vocab_size": 512, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "num_experts_per_tok": 2, "pad_token_id": 0,
}  # fmt: skip
DBRX = {
    "vocab_size": 512, "d_model": D, "n_heads": 4, "n_layers": 1, "max_seq_len": 64, "tie_word_embeddings": False,
    "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
    "ffn_config": {"ffn_hidden_size": F, "moe_num_experts": E, "moe_top_k": 2},
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "qwen3_moe": ("qwen3_moe", {**SIZES, "num_experts": E, "moe_intermediate_size": F, "intermediate_size": 3 * F}, False),
    "mixtral": ("mixtral", {**SIZES, "num_local_experts": E}, False),
    "gpt_oss": ("gpt_oss", {**SIZES, "num_local_experts": E}, True),
    "gpt_oss, square": ("gpt_oss", {**SIZES, "num_local_experts": E, "intermediate_size": D}, True),
    "llama4": (
        "llama4_text",
        {**SIZES, "num_local_experts": E, "intermediate_size_mlp": 3 * F, "moe_layers": [0], "interleave_moe_layer_step": 1},
        True,
    ),
    "granitemoe": ("granitemoe", {**SIZES, "num_local_experts": E}, True),
    "granitemoe, renamed": ("granitemoe", {**SIZES, "num_local_experts": E}, False),
    "dbrx": ("dbrx", DBRX, True),
}
"""Name -> model type, config, and whether to save under the names of the type's first checkpoints."""

IDS = torch.arange(1, 25)[None] * 17
GATE_UP = {"gate_up_proj", "input_linear", "w1", "v1"}


@pytest.fixture(scope="module", params=MODELS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model of random weights, and the folder that it saved."""
    kind, sizes, original = MODELS[request.param]
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes, dtype="bfloat16")
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
            if parameter.dim() == 1:
                parameter += 1
    model.save_pretrained(folder, save_original_format=original)
    return model, folder


def experts_of(model: Any) -> Any:
    (found,) = (module for module in model.modules() if type(module).__name__.endswith("Experts"))
    return found


def parameter_of(model: Any, tensor: str) -> Any:
    """The parameter that a tensor of the file became."""
    last = {"input_linear": "gate_up_proj", "output_linear": "down_proj"}
    parts = tensor.removesuffix(".weight").split(".")
    (found,) = (p for n, p in experts_of(model).named_parameters() if n.split(".")[-1] == last.get(parts[-1], parts[-1]))
    return found


def bits(parameter: Any) -> np.ndarray:
    return np.asarray(parameter.detach().float().numpy()).astype(BFLOAT16.numpy)


def stacks(folder: Path) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """Modules, their dense tensors and shapes, of a packed folder."""
    packed = ss.load(folder)
    with Checkpoint.open(folder) as checkpoint:
        for name, entry in read_stacked(checkpoint).items():
            yield name, entry, packed[name].shape  # type: ignore[misc]


def test_k_is_the_axis_that_the_model_sums_over(source: tuple[Any, Path], tmp_path: Path) -> None:
    """Of an input that is zero but in column j, gradients reach column j of gate and up alone; of output i, row i of down."""
    model, folder = source
    ss.pack_checkpoint(folder, tmp_path / "packed", ss.Options(prune="magnitude"))
    i, j = 5, 11
    outputs: list[Any] = []

    def one_hot(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        only = torch.zeros_like(hidden)
        only[..., j] = 1
        return (only, *args[1:]), kwargs

    experts = experts_of(model)
    handles = [
        experts.register_forward_pre_hook(one_hot, with_kwargs=True),
        experts.register_forward_hook(lambda module, args, out: outputs.append(out)),
    ]
    model.zero_grad()
    model(IDS)
    outputs[0][..., i].float().sum().backward()
    for handle in handles:
        handle.remove()
    seen = 0
    for name, entry, shape in stacks(tmp_path / "packed"):
        grad = bits(parameter_of(model, entry.tensor).grad).astype(np.float32)
        assert grad.shape == entry.dense_shape(shape)
        _, rows, columns = np.nonzero(entry.matrices(grad, shape))
        assert rows.size
        if name.rpartition(".")[2] in GATE_UP:
            assert set(columns) == {j}
            assert len(set(rows)) > 1
        else:
            assert set(rows) == {i}
            assert len(set(columns)) > 1
        seen += 1
    assert seen >= 2


@pytest.mark.parametrize("dtype", [BFLOAT16, INT8], ids=str)
@pytest.mark.parametrize("way", ["dense", "unpacked"])
def test_a_stock_model_of_unpacked_experts(source: tuple[Any, Path], tmp_path: Path, dtype: DType, way: str) -> None:
    """Its logits are those of the model whose experts the reference pruned and quantized."""
    model, folder = source
    targets = r"re:.*(experts\.(mlp\.)?\w+|put_linear)$"
    options = {"scheme": Scheme.of(dtype).name, "prune": "magnitude", "targets": (targets,)}
    ss.pack_checkpoint(folder, tmp_path / "packed", ss.Options(**options))  # type: ignore[arg-type]
    ss.verify_checkpoint(tmp_path / "packed", folder)
    if way == "dense":
        ss.pack_checkpoint(folder, tmp_path / "out", ss.Options(**options, format="dense"))  # type: ignore[arg-type]
    else:
        ss.unpack_checkpoint(tmp_path / "packed", tmp_path / "out")
    loaded, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    wanted = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for _, entry, shape in stacks(tmp_path / "packed"):
        parameter = parameter_of(wanted, entry.tensor)
        w = entry.matrices(bits(parameter), shape)
        pruned = reference.prune(w.reshape(-1, shape[-1]), Pattern(6, 8))
        made = reference.pack(pruned, Pattern(6, 8), dtype)
        dense = reference.dequantize(reference.unpack(made), made.scale).reshape(w.shape).astype(BFLOAT16.numpy)
        if entry.transposed:
            dense = dense.transpose(0, 2, 1)
        values = np.ascontiguousarray(dense.astype(np.float32)).reshape(parameter.shape)
        assert bits(parameter_of(loaded, entry.tensor)).tobytes() == values.astype(BFLOAT16.numpy).tobytes()
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(values))
    with torch.no_grad():
        got, want, before = (m(IDS).logits.float() for m in (loaded.eval(), wanted.eval(), model))
    assert got.isfinite().all()
    assert (got - want).abs().max() <= 2e-2 * want.abs().max()
    assert (got - before).abs().max() > (got - want).abs().max()
