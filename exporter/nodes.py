"""What the nodes of a traced program are called."""

from __future__ import annotations

from torch.fx import Node


def name_of(node: Node) -> str:
    """The operator that a node calls, without its overload: `linear`; for a placeholder its name."""
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]


def module_of(node: Node) -> str:
    """The path of the PyTorch module that a call is from, such as `blocks.0.mlp.fc1`; empty for the outermost."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return path.removeprefix("L['self'].").removeprefix("L['self']").lstrip(".")
