"""Faults of DiT."""

import numpy as np

from . import Graph, fault, flip_first

M = "dit-tiny"


@fault("one weight has the wrong sign", model=M, module="blocks.1.mlp.fc1")
def _(graph: Graph) -> None:
    graph.change("blocks.1.mlp.fc1.weight.T", flip_first)


@fault("the modulation's scale is dropped", model=M, module="blocks.0")
def _(graph: Graph) -> None:
    graph.bypass("blocks.0/mul", 0)


@fault("shift and scale are exchanged", model=M, module="blocks.1")
def _(graph: Graph) -> None:
    graph.swap("blocks.1/split")


@fault("the layer norm has another epsilon", model=M, module="blocks.0.norm2")
def _(graph: Graph) -> None:
    graph.set("blocks.0.norm2/layer_norm", epsilon=1e-3)


@fault("the layer norm is over the tokens", model=M, module="blocks.1.norm1")
def _(graph: Graph) -> None:
    name = "blocks.1.norm1/layer_norm"
    ones = graph.constant(np.ones(16, np.float32), f"{name}/ones")
    graph.node(name).replace_input_with(1, ones)
    graph.before(name, 0, "Transpose", perm=[0, 2, 1])
    graph.after(name, "Transpose", perm=[0, 2, 1])


@fault("tokens and channels of the heads are exchanged", model=M, module="blocks.1.attn")
def _(graph: Graph) -> None:
    graph.set("blocks.1.attn/permute", perm=[2, 0, 3, 4, 1])  # both are 16


@fault("GELU is the erf form, not the tanh form", model=M, module="blocks.0.mlp.act")
def _(graph: Graph) -> None:
    graph.set("blocks.0.mlp.act/gelu", approximate="none")


@fault("the residual around the attention is missing", model=M, module="blocks.0")
def _(graph: Graph) -> None:
    graph.bypass("blocks.0/add_2", 1)


@fault("the residual around the MLP skips the attention", model=M, module="blocks.1")
def _(graph: Graph) -> None:
    graph.rewire("blocks.1/add_5", 0, "blocks.0/add_5")


@fault("the MLP's gate is dropped", model=M, module="blocks.1")
def _(graph: Graph) -> None:
    graph.bypass("blocks.1/mul_3", 1)


@fault("the attention's scores are scaled by 1 / d, not by 1 / sqrt(d)", model=M, module="blocks.0.attn")
def _(graph: Graph) -> None:
    graph.set("blocks.0.attn/scaled_dot_product_attention", scale=1 / 16)


@fault("queries and keys are exchanged", model=M, module="blocks.1.attn")
def _(graph: Graph) -> None:
    graph.rewire("blocks.1.attn/scaled_dot_product_attention", 0, "blocks.1.attn/unbind/Gather_1")
    graph.rewire("blocks.1.attn/scaled_dot_product_attention", 1, "blocks.1.attn/unbind/Gather")


@fault("a square weight is transposed", model=M, module="blocks.0.attn.proj")
def _(graph: Graph) -> None:
    graph.change("blocks.0.attn.proj.weight.T", np.transpose)


@fault("the position table is not added", model=M, module="")
def _(graph: Graph) -> None:
    graph.bypass("add_1", 0)


@fault("rows and columns inside a patch are exchanged", model=M, module="")
def _(graph: Graph) -> None:
    graph.set("permute", perm=[0, 5, 1, 4, 2, 3])


@fault("sines come before cosines", model=M, module="t_embedder")
def _(graph: Graph) -> None:
    graph.rewire("t_embedder/cat", 0, "t_embedder/sin")
    graph.rewire("t_embedder/cat", 1, "t_embedder/cos")


@fault("labels are off by one", model=M, module="y_embedder.embedding_table")
def _(graph: Graph) -> None:
    graph.change("y_embedder.embedding_table.weight", lambda table: np.roll(table, 1, axis=0))


@fault("a bias is dropped", model=M, module="final_layer.linear")
def _(graph: Graph) -> None:
    graph.bypass("final_layer.linear/linear", 0)


@fault("an activation is missing", model=M, module="t_embedder.mlp.1")
def _(graph: Graph) -> None:
    graph.bypass("t_embedder.mlp.1/silu", 0)


@fault("an activation's FP8 scale saturates", model=M, module="blocks.0.mlp.fc1", precision="fp8")
def _(graph: Graph) -> None:
    graph.change_at("blocks.0/add_4.quantized", 1, lambda scale: scale / scale.dtype.type(16))
    graph.rewire("blocks.0/add_4.dequantized", 1, "blocks.0/add_4.quantized/fault")


@fault("a weight's FP8 scale is applied twice", model=M, module="blocks.1.mlp.fc2", precision="fp8")
def _(graph: Graph) -> None:
    graph.change_at("blocks.1.mlp.fc2.weight.T.dequantized", 1, lambda scale: scale * scale.dtype.type(2))


@fault("the scales of a weight's channels are off by one", model=M, module="blocks.1.attn.qkv", precision="fp8")
def _(graph: Graph) -> None:
    graph.change_at("blocks.1.attn.qkv.weight.T.dequantized", 1, lambda scale: np.roll(scale, 1))


@fault("the softmax's FP8 scale is that of values up to 16", model=M, module="blocks.0.attn", precision="fp8")
def _(graph: Graph) -> None:
    name = "blocks.0.attn/scaled_dot_product_attention/softmax"
    graph.change_at(f"{name}.dequantized", 1, lambda scale: scale * scale.dtype.type(16))
