"""A pass over vLLM's compiled graphs: a norm or an activation that only packed linears read writes their operand directly.

    h, r = fused_add_rms_norm(x, residual, gamma, epsilon);  y = linear(h, weight)
    q, scale, r = rms_norm_quantize(x, residual, gamma, epsilon, weight);  y = product(q, scale, weight)

It runs where vLLM lets a user's pass run, before vLLM lowers its own operators (`vllm_ir`). What it does not know stays as it
is: two launches more, and the same result.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import sys
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from vllm.compilation.passes.inductor_pass import InductorPass

from .. import operators

HOOK = "post_grad_custom_post_pass"
SLIDESPARSE = torch.ops.slidesparse
LINEAR, PRODUCT = SLIDESPARSE.linear.default, SLIDESPARSE.product.default
GATES = {
    "_C.silu_and_mul.default": ("silu_and_mul", SLIDESPARSE.silu_and_mul_quantize.default),
    "_C.gelu_tanh_and_mul.default": ("gelu_and_mul", SLIDESPARSE.gelu_and_mul_quantize.default),
}
"""Operators of vLLM -> the name of the operation, which vLLM would write out in PyTorch's, where nothing finds it; and ours."""


def install(config: Any) -> None:
    """Make vLLM run the pass on the model that it is about to build, unless the user has given a pass of his own."""
    compilation = config.compilation_config
    if HOOK in compilation.inductor_compile_config:
        return
    compilation.inductor_compile_config[HOOK] = FuseOperands()
    for name, _ in GATES.values():
        if not {f"+{name}", f"-{name}"} & set(compilation.custom_ops):
            compilation.custom_ops.append(f"+{name}")


class FuseOperands(InductorPass):
    """The pass. vLLM hashes what `uuid` names into the keys of its compile cache."""

    def uuid(self) -> str:
        return str(self.hash_source(inspect.getsource(sys.modules[__name__]), inspect.getsource(operators)))

    def __call__(self, graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            if node.op == "call_function" and (found := _match(node)) is not None:
                _replace(graph, node, *found)


def _match(node: fx.Node) -> tuple[Any, tuple[Any, ...], fx.Node, dict[fx.Node, int]] | None:
    """What replaces `node` and a quantization, if anything: an operator, its first arguments, the node whose value it
    quantizes, and of other nodes which of its results they are."""
    name = str(node.target)
    parts = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    if node.target is auto_functionalized and (gate := GATES.get(str(node.args[0]))) is not None and 1 in parts:
        return gate[1], (node.kwargs["input"],), parts[1], {}
    if name == "vllm_ir.rms_norm.default":
        x, gamma, epsilon, *part = node.args
        first, value, others = (x, None, gamma, epsilon), node, {}
    elif name == "vllm_ir.fused_add_rms_norm.default" and 0 in parts:
        x, residual, gamma, epsilon, *part = node.args
        first, value, others = (x, residual, gamma, epsilon), parts[0], {parts[1]: 2} if 1 in parts else {}
    else:
        return None
    if gamma is None or any(part) or node.kwargs:
        return None
    return SLIDESPARSE.rms_norm_quantize.default, first, value, others


def _replace(
    graph: fx.Graph, node: fx.Node, target: Any, first: tuple[Any, ...], value: fx.Node, others: dict[fx.Node, int]
) -> None:
    """Put `target` and products in the place of `node` and the linears that read what it makes, if nothing else reads it."""
    linears, tensor = list(value.users), value.meta["val"]
    if not linears or any(user.target is not LINEAR or user.args[0] is not value for user in linears) or tensor.dim() != 2:
        return
    if len({user.args[4:] for user in linears}) != 1:  # k and facts
        return
    _, weight, _, *shape = linears[0].args
    with graph.inserting_before(node):
        fused = _call(graph, target, *first, weight, *shape)
        operand, scale = (_call(graph, operator.getitem, fused, i) for i in range(2))
        for other, i in others.items():
            other.replace_all_uses_with(_call(graph, operator.getitem, fused, i))
    for linear in linears:
        _, weight, bias, *shape = linear.args
        with graph.inserting_before(linear):
            linear.replace_all_uses_with(_call(graph, PRODUCT, operand, scale, weight, bias, tensor.dtype, *shape))
        graph.erase_node(linear)


def _call(graph: fx.Graph, target: Any, *arguments: Any) -> fx.Node:
    """A new node, with the value that compilers expect of it."""
    made = graph.call_function(target, arguments)
    given = fx.map_arg(arguments, lambda node: node.meta["val"])
    with detect_fake_mode(given) or contextlib.nullcontext():
        made.meta["val"] = target(*given)
    return made
