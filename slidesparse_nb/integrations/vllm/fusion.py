"""A pass over vLLM's compiled graphs: a norm or an activation that only a packed linear reads writes its operand directly.

    h, r = fused_add_rms_norm(x, residual, gamma, epsilon);  y = linear(h, weight)
    y, r = rms_norm_linear(x, residual, gamma, epsilon, weight)

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
LINEAR = SLIDESPARSE.linear.default
GATES = {
    "_C.silu_and_mul.default": ("silu_and_mul", SLIDESPARSE.silu_and_mul_linear.default),
    "_C.gelu_tanh_and_mul.default": ("gelu_and_mul", SLIDESPARSE.gelu_and_mul_linear.default),
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


def _match(node: fx.Node) -> tuple[Any, tuple[Any, ...], fx.Node, fx.Node | None] | None:
    """What replaces `node` and a linear, if anything: an operator, its first arguments, the node whose value the linear reads,
    and that of the sum which a norm keeps."""
    name = str(node.target)
    parts = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    if node.target is auto_functionalized and (gate := GATES.get(str(node.args[0]))) is not None and 1 in parts:
        return gate[1], (node.kwargs["input"],), parts[1], None
    if name == "vllm_ir.rms_norm.default":
        x, gamma, epsilon, *part = node.args
        first, value, kept = (x, None, gamma, epsilon), node, None
    elif name == "vllm_ir.fused_add_rms_norm.default" and 0 in parts:
        x, residual, gamma, epsilon, *part = node.args
        first, value, kept = (x, residual, gamma, epsilon), parts[0], parts.get(1)
    else:
        return None
    if gamma is None or any(part) or node.kwargs:
        return None
    return SLIDESPARSE.rms_norm_linear.default, first, value, kept


def _replace(graph: fx.Graph, node: fx.Node, target: Any, first: tuple[Any, ...], value: fx.Node, kept: fx.Node | None) -> None:
    """Put `target` in the place of `node` and of the linear that reads what it makes, if nothing else reads it."""
    linear, *others = value.users
    if others or linear.target is not LINEAR or linear.args[0] is not value or value.meta["val"].dim() != 2:
        return
    with graph.inserting_before(node):
        made = _call(graph, target, *first, *linear.args[1:])
        y = made if isinstance(made.meta["val"], torch.Tensor) else _call(graph, operator.getitem, made, 0)
        if kept is not None:
            kept.replace_all_uses_with(_call(graph, operator.getitem, made, 1))
    linear.replace_all_uses_with(y)
    graph.erase_node(linear)


def _call(graph: fx.Graph, target: Any, *arguments: Any) -> fx.Node:
    """A new node, with the value that compilers expect of it."""
    made = graph.call_function(target, arguments)
    given = fx.map_arg(arguments, lambda node: node.meta["val"])
    with detect_fake_mode(given) or contextlib.nullcontext():
        made.meta["val"] = target(*given)
    return made
