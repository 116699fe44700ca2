"""Adapters for `torch.nn`: multi-head attention and the transformer layers built on it.

In evaluation `nn.TransformerEncoderLayer` has a fast path of its own that never calls its
attention, and `nn.TransformerEncoder` packs padded sequences for it: both are replaced too, or a
swapped attention would not run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.transformer import _detect_is_causal_mask, _get_seq_len

from ..modules.fused import add_then_norm, inactive, normalise, project
from ..modules.multihead_attention import MultiheadAttention
from ..modules.state import FastLayer
from .adapters import Adapter


class _FastTransformerLayer(FastLayer):
    """The feed-forward part and the sums that encoder and decoder layers have in common."""

    linear1: Any
    linear2: Any
    dropout: Any
    activation: Any

    def _feed_forward(self, x: Tensor, drop: nn.Module, residual: Tensor | None = None) -> Tensor:
        """`drop(linear2(dropout(activation(linear1(x))))) + residual`."""
        hidden = project(self, x, self.linear1, activation=self.activation)
        if not inactive(self.dropout):
            hidden = self.dropout(hidden)
        if inactive(drop):
            return project(self, hidden, self.linear2, residual=residual)
        out = drop(project(self, hidden, self.linear2))
        return out if residual is None else residual + out


class FastTransformerEncoderLayer(_FastTransformerLayer, nn.TransformerEncoderLayer):
    """`nn.TransformerEncoderLayer` that always runs its own attention module."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        self._count_call()
        if src.is_nested:
            self._count_fallback("nested_tensor")
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        masks = (src_mask, src_key_padding_mask)
        if self.norm_first:
            normalised = normalise(self, src, self.norm1)
            branch = self._sa_block(normalised, *masks, is_causal=is_causal)
            total, normalised = add_then_norm(self, src, branch, self.norm2)
            return self._feed_forward(normalised, self.dropout2, residual=total)
        branch = self._sa_block(src, *masks, is_causal=is_causal)
        _, x = add_then_norm(self, src, branch, self.norm1)
        _, x = add_then_norm(self, x, self._feed_forward(x, self.dropout2), self.norm2)
        return x


class FastTransformerDecoderLayer(_FastTransformerLayer, nn.TransformerDecoderLayer):
    """`nn.TransformerDecoderLayer` with sums and normalisations in one op."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        self._count_call()
        own = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        of_memory = (memory_mask, memory_key_padding_mask, memory_is_causal)
        if self.norm_first:
            branch = self._sa_block(normalise(self, tgt, self.norm1), *own)
            x, normalised = add_then_norm(self, tgt, branch, self.norm2)
            branch = self._mha_block(normalised, memory, *of_memory)
            x, normalised = add_then_norm(self, x, branch, self.norm3)
            return self._feed_forward(normalised, self.dropout3, residual=x)
        _, x = add_then_norm(self, tgt, self._sa_block(tgt, *own), self.norm1)
        _, x = add_then_norm(self, x, self._mha_block(x, memory, *of_memory), self.norm2)
        _, x = add_then_norm(self, x, self._feed_forward(x, self.dropout3), self.norm3)
        return x


class FastTransformerEncoder(FastLayer, nn.TransformerEncoder):
    """`nn.TransformerEncoder` that never packs: its layers see padded sequences and masks.

    Where the parent would have packed, the padded places of the result are 0 as there.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        self._count_call()
        if src.is_nested:
            self._count_fallback("nested_tensor")
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        first: Any = self.layers[0]
        causal = _detect_is_causal_mask(
            None if mask is None else _additive(mask, src.dtype),
            is_causal,
            _get_seq_len(src, first.self_attn.batch_first),
        )
        output = src
        for layer in self.layers:
            output = layer(
                output,
                src_mask=mask,
                is_causal=causal,
                src_key_padding_mask=src_key_padding_mask,
            )
        if src_key_padding_mask is not None and self._parent_packs(src, mask, src_key_padding_mask):
            hidden = _additive(src_key_padding_mask, src.dtype) != 0
            output = output.masked_fill(hidden[..., None], 0.0)
        return output if self.norm is None else normalise(self, output, self.norm)

    def _parent_packs(self, src: Tensor, mask: Tensor | None, padding: Tensor) -> bool:
        """Whether `nn.TransformerEncoder` would go by nested tensors, which zeroes padding."""
        first: Any = self.layers[0]
        if (
            not torch.backends.mha.get_fastpath_enabled()
            or not getattr(self, "use_nested_tensor", False)
            or first.training
            or src.dim() != 3
            or mask is not None
            or torch.is_autocast_enabled()
        ):
            return False
        if torch.is_grad_enabled() and (
            src.requires_grad or any(p.requires_grad for p in first.parameters())
        ):
            return False
        if not getattr(self, "mask_check", True):
            return True
        if torch.compiler.is_compiling():
            return False
        hidden = _additive(padding, src.dtype) != 0
        return bool((hidden[:, 1:] >= hidden[:, :-1]).all())  # padding only at the end


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as torch's own layers pass it on: floats, -inf where bool is True."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)


ADAPTERS = (
    Adapter(nn.MultiheadAttention, MultiheadAttention, "attention"),
    Adapter(nn.TransformerEncoderLayer, FastTransformerEncoderLayer, "layer"),
    Adapter(nn.TransformerDecoderLayer, FastTransformerDecoderLayer, "layer"),
    Adapter(nn.TransformerEncoder, FastTransformerEncoder, "layer"),
)
