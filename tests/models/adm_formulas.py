"""ADM's U-Net as the authors of consistency models and of trajectory models wrote it, for tests.

UNetModel of openai/consistency_models, cm/unet.py, and, with a second time, of sony/ctm, code/cm/unet.py (training_mode="ctm").
"""

import numpy as np
import torch
import torch.nn.functional as F


class Authors:
    """A network of one time, or of two: names and shapes of its tensors, and what it computes in float64."""

    def __init__(self, config, *, further=False):
        self.config, self.shapes, self.suffixes = config, {}, ("", "_s") if further else ("",)
        width, dim = config.widths[0], 4 * config.widths[0]
        for name in (f"time_embed{suffix}" for suffix in self.suffixes):
            self._add(f"{name}.0", dim, width)
            self._add(f"{name}.2", dim, dim)
        self.shapes["label_emb.weight"] = (config.num_classes, dim)
        self._add("input_blocks.0.0", width, config.in_channels, 3, 3)
        channels, kept = width, [width]
        for level, (out, attended) in enumerate(zip(config.widths, config.attention, strict=True)):
            for _ in range(config.layers):
                channels = self._block(f"input_blocks.{len(kept)}", channels, out, attended)
                kept.append(channels)
            if level < len(config.widths) - 1:
                self._resblock(f"input_blocks.{len(kept)}.0", channels, channels)
                kept.append(channels)
        for part in (0, 2):
            self._resblock(f"middle_block.{part}", channels, channels)
        self._attention("middle_block.1", channels)
        count = 0
        for level, (out, attended) in reversed(list(enumerate(zip(config.widths, config.attention, strict=True)))):
            for i in range(config.layers + 1):
                channels = self._block(f"output_blocks.{count}", channels + kept.pop(), out, attended)
                if level and i == config.layers:
                    self._resblock(f"output_blocks.{count}.{1 + attended}", channels, channels)
                count += 1
        self._add("out.0", channels)
        self._add("out.2", config.in_channels, channels, 3, 3)

    def _add(self, name, *shape):
        self.shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    def _resblock(self, name, channels, out):
        self._add(f"{name}.in_layers.0", channels)
        self._add(f"{name}.in_layers.2", out, channels, 3, 3)
        for suffix in self.suffixes:
            self._add(f"{name}.emb_layers{suffix}.1", 2 * out, 4 * self.config.widths[0])
        self._add(f"{name}.out_layers.0", out)
        self._add(f"{name}.out_layers.3", out, out, 3, 3)
        if out != channels:
            self._add(f"{name}.skip_connection", out, channels, 1, 1)

    def _attention(self, name, channels):
        self._add(f"{name}.norm", channels)
        self._add(f"{name}.qkv", 3 * channels, channels, 1, 1)
        self._add(f"{name}.proj_out", channels, channels, 1, 1)

    def _block(self, name, channels, out, attended):
        self._resblock(f"{name}.0", channels, out)
        if attended:
            self._attention(f"{name}.1", out)
        return out

    def state(self, seed):
        """Random weights, float32, in the authors' names."""
        drawn = {
            name: np.random.Generator(np.random.PCG64((seed, i))).standard_normal(shape)
            for i, (name, shape) in enumerate(self.shapes.items())
        }
        fan = {name: np.prod(shape[1:]) if len(shape) > 1 else 16 for name, shape in self.shapes.items()}
        return {name: torch.from_numpy((value / fan[name] ** 0.5).astype("float32")) for name, value in drawn.items()}

    def forward(self, state, x, y, *times):
        """F of scaled pictures x (B, C, H, W) of the classes y (B,) at what the sinusoids are of, each (B,), in float64."""
        state = {name: value.double() for name, value in state.items()}

        def linear(name, h):
            return F.linear(h, state[f"{name}.weight"], state[f"{name}.bias"])

        def convolve(name, h):
            weight = state[f"{name}.weight"]
            return F.conv2d(h, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)

        def norm(name, h):
            return F.group_norm(h, self.config.norm_groups, state[f"{name}.weight"], state[f"{name}.bias"])

        def embed(name, time):
            angles = time[:, None] * 10000.0 ** (-torch.arange(self.config.widths[0] // 2) / (self.config.widths[0] // 2)).double()
            return linear(f"{name}.2", F.silu(linear(f"{name}.0", torch.cat([angles.cos(), angles.sin()], 1))))

        def resblock(name, h, resize=lambda h: h):
            inside = convolve(f"{name}.in_layers.2", resize(F.silu(norm(f"{name}.in_layers.0", h))))
            emb_out = sum(linear(f"{name}.emb_layers{suffix}.1", F.silu(emb)) for suffix, emb in embedded.items())
            scale, shift = emb_out[..., None, None].chunk(2, 1)
            inside = norm(f"{name}.out_layers.0", inside) * (1 + scale) + shift
            h = resize(h)
            beside = convolve(f"{name}.skip_connection", h) if f"{name}.skip_connection.weight" in state else h
            return beside + convolve(f"{name}.out_layers.3", F.silu(inside))

        def attention(name, h):
            q, k, v = convolve(f"{name}.qkv", norm(f"{name}.norm", h)).flatten(2).unflatten(1, (3, -1, self.config.head_dim)).unbind(1)
            weights = torch.softmax(q.mT @ k / self.config.head_dim**0.5, -1)  # (B, heads, to, from)
            return h + convolve(f"{name}.proj_out", (v @ weights.mT).reshape(h.shape))

        def block(name, h, resize):
            """One of the numbered blocks: the parts that have weights."""
            for part in range(3):
                if f"{name}.{part}.qkv.weight" in state:
                    h = attention(f"{name}.{part}", h)
                elif f"{name}.{part}.in_layers.0.weight" in state:
                    h = resblock(f"{name}.{part}", h, resize if resize is halve or part else lambda h: h)
            return h

        def halve(h):
            return F.avg_pool2d(h, 2)

        def double(h):
            return h.repeat_interleave(2, 2).repeat_interleave(2, 3)

        embedded = {suffix: embed(f"time_embed{suffix}", time) for suffix, time in zip(self.suffixes, times, strict=True)}
        embedded[""] = embedded[""] + state["label_emb.weight"][y]
        maps = [convolve("input_blocks.0.0", x)]
        each = self.config.layers + 1
        for i in range(1, each * len(self.config.widths)):
            maps.append(block(f"input_blocks.{i}", maps[-1], halve if i % each == 0 else None))
        h = block("middle_block", maps[-1], lambda h: h)
        for i in range(each * len(self.config.widths)):
            h = block(f"output_blocks.{i}", torch.cat([h, maps.pop()], 1), double)
        assert not maps
        return convolve("out.2", F.silu(norm("out.0", h)))
