"""The decoder that Llama, Mistral and Qwen share: pre-norm attention and a gated MLP."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from octavo.models.builder import ModelBuilder
from octavo.models.config import DecoderConfig, read_decoder_config
from octavo.models.layers import AttentionLayer, Linear, Ops, StepContext, Wanted


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer. x is what the last layer added, residual the sum of all before it in float32.

    A 16-bit sum would round away what each of many layers adds: near ties between tokens would fall either way.
    """

    input_norm: torch.Tensor
    qkv: Linear
    attention: AttentionLayer
    output: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear
    ops: Ops
    eps: float

    @property
    def kind(self) -> tuple[type, ...]:
        """The matmuls of its products: layers of one kind run the same kernels."""
        linears = (self.qkv, self.output, self.gate_up, self.down)
        return tuple(type(matmul) for linear in linears for matmul, _ in linear.parts)

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None, step: StepContext, wanted: Wanted | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, residual) [T, H] of this layer -> those of the next, or of the tokens `wanted` [S] alone."""
        ops = self.ops
        if residual is None:
            residual = x.float()
            x = ops.rms_norm.rms_norm(residual, self.input_norm, self.eps)
        else:
            x, residual = ops.add_rms_norm.add_rms_norm(x, residual, self.input_norm, self.eps)
        x = self.attention(self.qkv(x), step, wanted)
        if wanted is not None:
            residual = residual.index_select(0, wanted.tokens)
        x = self.output(x)
        x, residual = ops.add_rms_norm.add_rms_norm(x, residual, self.mlp_norm, self.eps)
        return self.down(ops.silu_and_mul.silu_and_mul(self.gate_up(x))), residual


class Decoder:
    """A decoder-only model. An architecture is a subclass that says how its config.json differs."""

    architecture: ClassVar[str]

    @classmethod
    def read_config(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """The model's shape. Raises CheckpointError."""
        return read_decoder_config(config)

    def __init__(self, config: DecoderConfig, build: ModelBuilder) -> None:
        self.config = config
        self.ops = build.ops
        self.embed = build.embedding("model.embed_tokens", config.vocab_size, config.hidden_size)
        self.layers = [self._build_layer(build, i) for i in range(config.num_layers)]
        self.norm = build.norm("model.norm.weight", config.hidden_size)
        if config.tie_embeddings:
            self.lm_head = build.tied_head("model.embed_tokens", self.embed)
        else:
            self.lm_head = build.head("lm_head", config.hidden_size, config.vocab_size)

    def _build_layer(self, build: ModelBuilder, index: int) -> DecoderLayer:
        c, name = self.config, f"model.layers.{index}"
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        q, kv, inner = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.intermediate_size
        norms = None
        if c.qk_norm:
            q_norm, k_norm = (build.norm(f"{attention}.{x}_norm.weight", c.head_dim) for x in "qk")
            norms = (q_norm, k_norm)
        return DecoderLayer(
            input_norm=build.norm(f"{name}.input_layernorm.weight", c.hidden_size),
            qkv=build.column(
                [(f"{attention}.q_proj", q), (f"{attention}.k_proj", kv), (f"{attention}.v_proj", kv)],
                c.hidden_size,
                c.attention_bias,
            ),
            attention=build.attention(index, norms),
            output=build.row(f"{attention}.o_proj", q, c.hidden_size, c.output_bias),
            mlp_norm=build.norm(f"{name}.post_attention_layernorm.weight", c.hidden_size),
            gate_up=build.column([(f"{mlp}.gate_proj", inner), (f"{mlp}.up_proj", inner)], c.hidden_size, c.mlp_bias),
            down=build.row(f"{mlp}.down_proj", inner, c.hidden_size, c.mlp_bias),
            ops=build.ops,
            eps=c.norm_eps,
        )

    def forward(self, step: StepContext) -> torch.Tensor:
        """Hidden states of the step's tokens [T, H], or of those wanted [S, H], after the last norm."""
        x, residual = self.embed(step.batch.token_ids), None
        for layer in self.layers[:-1]:
            x, residual = layer(x, residual, step)
        x, residual = self.layers[-1](x, residual, step, step.wanted)
        return self.ops.add_rms_norm.add_rms_norm(x, residual, self.norm, self.config.norm_eps)[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's part of the vocabulary: hidden [S, H] -> [S, V / ranks].

        A GPU's are float32: in 16 bits, steps of 0.125 between 16 and 32 would decide which of two tokens is likelier.
        On a CPU they are as its products are, since writing twice the bytes takes longer than all else there.
        """
        out = None
        if hidden.is_cuda:
            vocabulary = self.embed.weight.shape[0]  # the head's share is as large as the embedding's
            out = torch.empty(hidden.shape[0], vocabulary, dtype=torch.float32, device=hidden.device)
        return self.lm_head(hidden, out)
