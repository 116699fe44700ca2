"""`nn.MultiheadAttention` around the fused core: the same parameters, arguments and results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.attention import attention
from ..ops.linear import linear
from .fused import PLAIN_TYPES, multiply_weight
from .recording import record
from .state import FastLayer, LayerState


class MultiheadAttention(FastLayer, nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention`, fast; arguments, parameters and results are its own.

    Everything that it can do is done here but what `fallback_reason` lists, which goes to the
    parent class and is counted. A row of the mask that hides every key gives 0 where the parent
    gives NaN.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first,
            device, dtype: as in the parent class.
        backend: None for the fastest, or a backend by name.
    """

    def __init__(self, *args, backend: str | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._fast = LayerState(backend)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `torch.nn.MultiheadAttention.forward`, masks included (True hides a key).

        Weights are made only when asked for: `need_weights=False` is faster.
        """
        self._count_call()
        reason = self.fallback_reason(
            query, key, value, key_padding_mask, need_weights, attn_mask, is_causal
        )
        if reason is not None:
            self._count_fallback(reason)
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        batched = query.dim() == 3
        heads = self._project_in(query, key, value, batched)
        mask = self._seen(heads[0], heads[1], key_padding_mask, attn_mask)
        if is_causal and key_padding_mask is None and not need_weights:
            mask = None  # the parent takes the hint instead of the mask in this case alone
        else:
            is_causal = False
        heads, mask = self._with_extra_keys(*heads, mask)
        dropout_p = self.dropout if self.training else 0.0
        run: dict[str, Any] = {
            "dropout_p": dropout_p,
            "is_causal": is_causal,
            "backend": self._fast.backend,
        }
        weights = None
        if need_weights:
            out, lse = attention(*heads, mask, return_lse=True, **run)
            weights = attention_weights(heads[0], heads[1], mask, lse)
            if average_attn_weights:
                weights = weights.mean(dim=1)
        else:
            out = attention(*heads, mask, **run)
        record(self, heads[0], heads[1], mask, is_causal, None)
        result = multiply_weight(
            self, out.transpose(1, 2).flatten(2), self.out_proj, self.out_proj.bias
        )
        if not batched:
            return result[0], None if weights is None else weights[0]
        return (result if self.batch_first else result.transpose(0, 1)), weights

    def fallback_reason(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> str | None:
        """Why a call goes to the parent class, as a code for reports; None where it does not."""
        if query.is_nested or key.is_nested or value.is_nested:
            return "nested_tensor"
        tensors = (query, key, value, key_padding_mask, attn_mask, *self._parameters.values())
        if any(t is not None and _overrides_torch(t) for t in tensors):
            return "tensor_subclass"
        if need_weights and self.training and self.dropout > 0.0:
            return "weights_with_dropout"
        if is_causal and attn_mask is None:
            return "causal_without_mask"  # the parent's error says what is missing
        if is_causal and (self.bias_k is not None or self.add_zero_attn):
            return "causal_with_extra_keys"
        if not self._well_formed(query, key, value, key_padding_mask, attn_mask):
            return "malformed"  # the parent's errors say how
        return None

    def _well_formed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> bool:
        dims = query.dim()
        if dims not in (2, 3) or key.dim() != dims or value.dim() != dims:
            return False
        if (query.shape[-1], key.shape[-1], value.shape[-1]) != (
            self.embed_dim,
            self.kdim,
            self.vdim,
        ):
            return False
        batch, rows = self._sizes(query)
        if self._sizes(key) != self._sizes(value) or self._sizes(key)[0] != batch:
            return False
        keys = self._sizes(key)[1]
        if key_padding_mask is not None:
            expected = (batch, keys) if dims == 3 else (keys,)
            if tuple(key_padding_mask.shape) != expected or not _is_mask(key_padding_mask):
                return False
        if attn_mask is None:
            return True
        shapes = ((rows, keys), (batch * self.num_heads, rows, keys))
        return tuple(attn_mask.shape) in shapes and _is_mask(attn_mask)

    def _sizes(self, x: Tensor) -> tuple[int, int]:
        """(batch, tokens)."""
        if x.dim() == 2:
            return 1, x.shape[0]
        return (x.shape[0], x.shape[1]) if self.batch_first else (x.shape[1], x.shape[0])

    def _project_in(
        self, query: Tensor, key: Tensor, value: Tensor, batched: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value `[B, H, N, D]`, as views of as few products as the inputs allow."""
        dim, bias = self.embed_dim, self.in_proj_bias
        if self.in_proj_weight is not None and query is key and key is value:
            packed = self._product(query, self.in_proj_weight, bias)
            parts = packed.chunk(3, dim=-1)
        elif self.in_proj_weight is not None and key is value:
            first = self._product(query, self.in_proj_weight[:dim], _part(bias, 0, dim))
            packed = self._product(key, self.in_proj_weight[dim:], _part(bias, dim, 3 * dim))
            parts = (first, *packed.chunk(2, dim=-1))
        else:
            weights: tuple[Tensor, ...] = (
                self.q_proj_weight,
                self.k_proj_weight,
                self.v_proj_weight,
            )
            if self.in_proj_weight is not None:
                weights = self.in_proj_weight.chunk(3)
            parts = tuple(
                self._product(x, weight, _part(bias, i * dim, (i + 1) * dim))
                for i, (x, weight) in enumerate(zip((query, key, value), weights, strict=True))
            )
        return tuple(self._split_heads(x, batched) for x in parts)  # type: ignore[return-value]

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, weight, bias, backend=self._backend("linear"))

    def _split_heads(self, x: Tensor, batched: bool) -> Tensor:
        heads = x.unflatten(-1, (self.num_heads, self.head_dim))
        if not batched:
            return heads.transpose(0, 1)[None]
        return heads.transpose(1, 2) if self.batch_first else heads.permute(1, 2, 0, 3)

    def _seen(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> Tensor | None:
        """Both masks as one for `attention`, 4-D: bool (True attends) or added to the scores."""
        masks = []
        batch, heads, rows, _ = query.shape
        if attn_mask is not None:
            shape = (1, 1) if attn_mask.dim() == 2 else (batch, heads)
            masks.append(attn_mask.reshape(*shape, rows, key.shape[2]))
        if key_padding_mask is not None:
            masks.append(key_padding_mask.reshape(batch, 1, 1, key.shape[2]))
        if all(mask.dtype == torch.bool for mask in masks):
            seen = [~mask for mask in masks]
            return None if not seen else seen[0] if len(seen) == 1 else seen[0] & seen[1]
        added = [_additive(mask, query.dtype) for mask in masks]
        return added[0] if len(added) == 1 else added[0] + added[1]

    def _with_extra_keys(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
        """The key and value biases, and the key of zeros, that everybody sees, after the others."""
        extra = 0
        batch = query.shape[0]
        if self.bias_k is not None and self.bias_v is not None:
            shape = (1, self.num_heads, 1, self.head_dim)
            one = (batch, -1, -1, -1)
            key = torch.cat((key, self.bias_k.to(key.dtype).view(shape).expand(one)), dim=2)
            value = torch.cat((value, self.bias_v.to(key.dtype).view(shape).expand(one)), dim=2)
            extra += 1
        if self.add_zero_attn:
            zeros = key.new_zeros(batch, self.num_heads, 1, self.head_dim)
            key, value = torch.cat((key, zeros), dim=2), torch.cat((value, zeros), dim=2)
            extra += 1
        if extra and mask is not None:
            mask = nn.functional.pad(mask, (0, extra), value=mask.dtype == torch.bool)
        return (query, key, value), mask


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None, lse: Tensor) -> Tensor:
    """The weights `[B, H, Nq, Nk]` of an attention whose log-sum-exp is known; no second softmax.

    A row that sees nothing has weights 0.
    """
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if mask is not None:
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        else:
            scores = scores + mask
    shift = lse.masked_fill(lse == -torch.inf, 0.0)[..., None]
    return (scores - shift).exp().to(query.dtype)


def _overrides_torch(tensor: Tensor) -> bool:
    """Whether a tensor's class handles torch's functions itself.

    `torch.overrides.has_torch_function` says so of plain tensors too wherever a mode is on, such as
    `torch.set_default_device`.
    """
    cls = type(tensor)
    return (
        cls not in PLAIN_TYPES
        and cls.__torch_function__ is not torch._C._disabled_torch_function_impl
    )


def _part(bias: Tensor | None, begin: int, end: int) -> Tensor | None:
    return None if bias is None else bias[begin:end]


def _is_mask(mask: Tensor) -> bool:
    return mask.dtype == torch.bool or mask.is_floating_point()


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of torch's kind (True hides) as a term of the scores."""
    if mask.dtype == torch.bool:
        zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        return zeros.masked_fill(mask, -torch.inf)
    return mask if mask.dtype in (dtype, torch.float32) else mask.to(dtype)
