"""The layers of the patch transformer in plain eager PyTorch.

Pre-norm transformer layers (Vaswani et al., 2017; Dosovitskiy et al., 2020). Names of parameters
and order of constructor arguments are those of timm, so weights move by name. Sizes: B batch,
N tokens, E embedding (`dim`), H heads, D = E / H, M tokens of the memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import KeyValueCache, LayerCache
from .patches import Size2d, grid_of, pair
from .pixels import PixelStatistics


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V for query `[B, H, Nq, D]`, key and value `[B, H, Nk, D]`.

    Causal: the queries are the last Nq of the Nk positions, and each sees itself and what comes
    before it. `attn_mask`: bool (True attends) or additive, broadcastable to `[B, H, Nq, Nk]`.
    """
    new, total = query.shape[2], key.shape[2]
    if is_causal and attn_mask is None and new == total:
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout_p, is_causal=True
        )
    if is_causal and new > 1:
        past = torch.ones(new, total, dtype=torch.bool, device=query.device).tril(total - new)
        if attn_mask is None:
            attn_mask = past
        elif attn_mask.dtype == torch.bool:
            attn_mask = attn_mask & past
        else:
            attn_mask = attn_mask.masked_fill(~past, float("-inf"))
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p)


def head_dim_of(dim: int, num_heads: int) -> int:
    """D = E / H. Raises ValueError unless the heads divide the embedding."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(
            f"expected a number of heads that divides dim={dim}, got {num_heads}; "
            "choose another number of heads or another dim"
        )
    return dim // num_heads


def check_tokens(x: Tensor, dim: int, what: str = "tokens") -> None:
    """Raises ValueError unless x is `[B, N, dim]`."""
    if x.dim() != 3 or x.shape[-1] != dim:
        raise ValueError(
            f"expected {what} [B, N, {dim}], got shape {tuple(x.shape)}; "
            "images go through PatchEmbed first"
        )


def check_last(x: Tensor, dim: int) -> None:
    """Raises ValueError unless the last dimension of x is dim."""
    if x.dim() < 1 or x.shape[-1] != dim:
        raise ValueError(
            f"expected tokens [..., {dim}], got shape {tuple(x.shape)}; "
            "the last dimension holds the features"
        )


class PatchEmbed(PixelStatistics):
    """Images `[B, C, H, W]` to tokens `[B, N, E]`: one linear map applied to every patch.

    uint8 images are divided by 255; `mean` and `std`, one number per channel, normalise. The
    arithmetic before the projection is float32. `pos_embed` `[1, N, E]` is added to the patches;
    `prefix` `[1, P, E]` comes before them and gets no position. `img_size=None` takes any image
    that whole patches fill, otherwise another size raises ValueError.
    """

    def __init__(
        self,
        img_size: Size2d | None = 224,
        patch_size: Size2d = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        *,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = pair(patch_size)
        self.img_size = None if img_size is None else pair(img_size)
        self.grid_size = None if img_size is None else grid_of(img_size, patch_size)
        self.num_patches = None if self.grid_size is None else self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_size, bias=bias)
        self.set_statistics(in_chans, mean, std)

    def check(self, images: Tensor) -> None:
        """Raises ValueError for images of another shape, TypeError for another kind of number."""
        channels, sides = self.proj.in_channels, self.img_size or ("H", "W")
        if images.dim() != 4 or images.shape[1] != channels:
            raise ValueError(
                f"expected images [B, {channels}, {sides[0]}, {sides[1]}], "
                f"got shape {tuple(images.shape)}; put channels second: images.movedim(-1, 1)"
            )
        if self.img_size is None:
            grid_of((images.shape[2], images.shape[3]), self.patch_size)
        elif tuple(images.shape[2:]) != self.img_size:
            raise ValueError(
                f"expected images of {self.img_size[0]} x {self.img_size[1]}, got "
                f"{images.shape[2]} x {images.shape[3]}; resize them, or build the model for them"
            )
        if not images.is_floating_point() and images.dtype != torch.uint8:
            raise TypeError(
                f"expected floating-point or uint8 images, got {images.dtype}; "
                "convert with images.float() on the scale 0 to 1, or images.to(torch.uint8)"
            )

    def forward(
        self, images: Tensor, *, pos_embed: Tensor | None = None, prefix: Tensor | None = None
    ) -> Tensor:
        self.check(images)
        tokens = (
            self.proj(self.normalise(images, self.proj.weight.dtype)).flatten(2).transpose(1, 2)
        )
        if pos_embed is not None:
            tokens = tokens + pos_embed
        if prefix is not None:
            tokens = torch.cat((prefix.expand(len(tokens), -1, -1), tokens), dim=1)
        return tokens


class PatchUnembed(nn.Module):
    """Tokens `[B, N, E]` back to images `[B, C, H, W]`: one linear map from token to patch.

    `grid_size` is that of the images; another one can be given with the tokens.
    """

    def __init__(
        self,
        grid_size: Size2d,
        patch_size: Size2d = 16,
        out_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.grid_size = pair(grid_size)
        self.patch_size = pair(patch_size)
        self.proj = nn.ConvTranspose2d(
            embed_dim, out_chans, self.patch_size, self.patch_size, bias=bias
        )

    def grid_for(self, tokens: Tensor, grid_size: Size2d | None) -> tuple[int, int]:
        """The grid of these tokens. Raises ValueError where they do not fill it."""
        check_tokens(tokens, self.proj.in_channels)
        rows, columns = self.grid_size if grid_size is None else pair(grid_size)
        if tokens.shape[1] != rows * columns:
            raise ValueError(
                f"expected {rows * columns} tokens for a grid of {rows} x {columns}, "
                f"got {tokens.shape[1]}; drop prefix tokens, or pass grid_size"
            )
        return rows, columns

    def forward(self, tokens: Tensor, grid_size: Size2d | None = None) -> Tensor:
        grid = self.grid_for(tokens, grid_size)
        return self.proj(tokens.transpose(1, 2).unflatten(2, grid))


class Attention(nn.Module):
    """Multi-head self-attention: every token looks at all tokens, or, causal, at the past."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim_of(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Tokens `[B, N, E]` to `[B, N, E]`; with a cache, x continues what the cache holds."""
        check_tokens(x, self.num_heads * self.head_dim)
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = self.q_norm(query), self.k_norm(key)
        if cache is not None:
            key, value = cache.append(key, value)
            attn_mask = cache.seen() if attn_mask is None else attn_mask
        dropout_p = self.attn_drop.p if self.training else 0.0
        heads = attend(query, key, value, attn_mask, is_causal, dropout_p)
        return self.proj_drop(self.proj(heads.transpose(1, 2).flatten(2)))


class CrossAttention(nn.Module):
    """Multi-head attention from tokens to a memory: what the decoder asks the encoder."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        *,
        memory_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim_of(dim, num_heads)
        self.memory_dim = memory_dim or dim
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(self.memory_dim, 2 * dim, bias=qkv_bias)
        self.q_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        attn_mask: Tensor | None = None,
        *,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Tokens `[B, N, E]` and memory `[B, M, memory_dim]` to `[B, N, E]`.

        With a cache the memory is projected at the first call and taken from the cache afterwards.
        """
        check_tokens(x, self.num_heads * self.head_dim)
        query = self.q_norm(self.q(x).unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2))
        if cache is not None and cache.length > 0:
            key, value = cache.view()
        else:
            check_tokens(memory, self.memory_dim, "memory")
            kv = self.kv(memory).unflatten(2, (2, self.num_heads, self.head_dim))
            key, value = kv.permute(2, 0, 3, 1, 4).unbind(0)
            key = self.k_norm(key)
            if cache is not None:
                key, value = cache.append(key, value)
        dropout_p = self.attn_drop.p if self.training else 0.0
        heads = attend(query, key, value, attn_mask, dropout_p=dropout_p)
        return self.proj_drop(self.proj(heads.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """Two linear maps with a nonlinearity between them, applied to every token alone."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: type[nn.Module] = nn.GELU,
        bias: bool = True,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        check_last(x, self.fc1.in_features)
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class EncoderLayer(nn.Module):
    """Self-attention, then feed-forward, each on normalised tokens and added to its input."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        *,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.attn = Attention(
            dim, num_heads, qkv_bias, qk_norm, attn_drop=attn_drop, proj_drop=proj_drop
        )
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio), drop=proj_drop)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        x = x + self.attn(self.norm1(x), attn_mask, is_causal)
        x = x + self.mlp(self.norm2(x))
        return x


class DecoderLayer(nn.Module):
    """Causal self-attention over what is drawn, cross-attention to the memory, feed-forward."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        *,
        memory_dim: int | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.attn = Attention(
            dim, num_heads, qkv_bias, qk_norm, attn_drop=attn_drop, proj_drop=proj_drop
        )
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        self.cross_attn = CrossAttention(
            dim,
            num_heads,
            qkv_bias,
            qk_norm,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            memory_dim=memory_dim,
        )
        self.norm3 = nn.LayerNorm(dim, norm_eps)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio), drop=proj_drop)

    def forward(self, x: Tensor, memory: Tensor, *, cache: LayerCache | None = None) -> Tensor:
        """Tokens `[B, N, E]` and memory `[B, M, memory_dim]` to `[B, N, E]`.

        With a cache, x are the tokens that follow those already decoded.
        """
        own, of_memory = (None, None) if cache is None else cache
        x = x + self.attn(self.norm1(x), is_causal=True, cache=own)
        x = x + self.cross_attn(self.norm2(x), memory, cache=of_memory)
        x = x + self.mlp(self.norm3(x))
        return x
