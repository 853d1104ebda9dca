"""Faults of SANA."""

import numpy as np

from . import Graph, fault

M = "sana-tiny"


@fault("the caption's mask is lost", model=M, module="blocks.0.cross_attn")
def _(graph: Graph) -> None:
    graph.node("blocks.0.cross_attn/scaled_dot_product_attention").replace_input_with(3, None)


@fault("the caption's mask is the wrong way round", model=M, module="")
def _(graph: Graph) -> None:
    graph.bypass("sub", 1)


@fault("keys are not rectified", model=M, module="blocks.1.attn")
def _(graph: Graph) -> None:
    graph.bypass("blocks.1.attn/relu_1", 0)


@fault("the linear attention's epsilon is 1", model=M, module="blocks.0.attn")
def _(graph: Graph) -> None:
    graph.change_at("blocks.0.attn/add", 1, np.ones_like)


@fault("the linear attention is not normalised", model=M, module="blocks.1.attn")
def _(graph: Graph) -> None:
    graph.bypass("blocks.1.attn/div", 0)


@fault("keys and values of the caption are exchanged", model=M, module="blocks.0.cross_attn")
def _(graph: Graph) -> None:
    graph.rewire("blocks.0.cross_attn/scaled_dot_product_attention", 1, "blocks.0.cross_attn/unbind")
    graph.rewire("blocks.0.cross_attn/scaled_dot_product_attention", 2, "blocks.0.cross_attn/unbind/Gather")


@fault("a convolution is padded on one side", model=M, module="blocks.0.mlp.depth_conv")
def _(graph: Graph) -> None:
    graph.set("blocks.0.mlp.depth_conv/conv2d", pads=[0, 0, 2, 2])


@fault("a convolution's rows and columns are exchanged", model=M, module="blocks.1.mlp.depth_conv")
def _(graph: Graph) -> None:
    graph.change("blocks.1.mlp.depth_conv.weight", lambda weight: weight.transpose(0, 1, 3, 2))


@fault("a gated unit's halves are exchanged", model=M, module="blocks.1.mlp")
def _(graph: Graph) -> None:
    graph.swap("blocks.1.mlp/split")


@fault("a gate has no activation", model=M, module="blocks.0.mlp")
def _(graph: Graph) -> None:
    graph.bypass("blocks.0.mlp/silu_1", 0)


@fault("the RMS norm has another epsilon", model=M, module="attention_y_norm")
def _(graph: Graph) -> None:
    graph.set("attention_y_norm/rms_norm", epsilon=1e-2)


@fault("the table of scales and shifts is turned round", model=M, module="blocks.1")
def _(graph: Graph) -> None:
    graph.change("blocks.1.scale_shift_table", lambda table: table[::-1])


@fault("the caption's embedder has the erf form of GELU", model=M, module="y_embedder.1")
def _(graph: Graph) -> None:
    graph.set("y_embedder.1/gelu", approximate="none")
