"""Fused attention, for rows that attend to themselves: splash attention on TPUs (pallas), cuDNN's on GPUs.

Scores stay on the chip, block by block, in the backward pass too, and blocks that nobody sees are skipped. Both know a mask by
its description, and are shared out over the mesh: rows over `data` and `fsdp`, heads over `tensor`.
Left out: biases, caches and keys of another length than the queries; `attention` computes these itself.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from user_llm.common.mesh import BATCH_AXES
from user_llm.nn.visibility import SelfMask

KERNELS = ("auto", "reference", "splash", "cudnn")
# How the names of the devices begin that a kernel is for.
HOMES = {"splash": "TPU", "cudnn": "NVIDIA"}

LANES = 128  # the width of a TPU's registers, of which blocks are multiples
BLOCK = 512  # the largest, as in MaxText's defaults; others have not been measured
# The softmax's sums are written LANES wide for each query: for so few keys the scores themselves are no larger.
SPLASH_LENGTH = 2 * LANES


def at_home(kernel: str) -> bool:
    """Say whether a kernel is for what is compiled for: the mesh's devices, which need not be here, or else JAX's first."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return device.device_kind.startswith(HOMES[kernel])


def choose(
    kernel: str, mask: SelfMask, *, length: int, head_dim: int, dtype: DTypeLike, biased: bool, capped: bool = False
) -> str:
    """Say what computes the attention of rows to themselves: `splash`, `cudnn` or `reference`; all is known at trace time.

    `auto` is the devices' own kernel, where it pays. A kernel that is named is taken wherever it can serve; on other devices its
    stand-in runs (splash interpreted, XLA for cuDNN), which is for tests: slow, or no better than the reference.

    Args:
      kernel: one of KERNELS.
      length, head_dim, dtype: of the queries.
      biased: whether scores have a bias, which no kernel knows.
      capped: whether scores have a soft cap, which cuDNN's does not know.

    Raises:
      ValueError: another kernel.
    """
    if kernel not in KERNELS:
        raise ValueError(f"Unknown attention_kernel {kernel!r}: choose one of {', '.join(KERNELS)}.")
    wanted = next(filter(at_home, HOMES), "reference") if kernel == "auto" else kernel
    if biased or wanted == "reference":
        return "reference"
    if wanted == "splash":
        serves = kernel == "splash" or length >= SPLASH_LENGTH
    else:
        # What cuDNN takes: half precision, heads up to 128 in steps of 8, even lengths, no window that looks ahead.
        half = dtype in (jnp.bfloat16, jnp.float16)
        serves = (
            not capped
            and half
            and head_dim <= 128
            and head_dim % 8 == 0
            and length % 2 == 0
            and (mask.causal or mask.window is None)
        )
    return wanted if serves else "reference"


def fused(
    kernel: str,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    mask: SelfMask,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Attend by the kernel that `choose` named; rows without a visible key are exactly 0.

    Raises:
      ValueError: a soft cap, and cuDNN's kernel, which knows none.
    """
    if kernel == "cudnn" and softcap is not None:
        raise ValueError("cuDNN's attention has no soft cap of scores: compute it by the reference.")
    compute = functools.partial(_splash, softcap=softcap) if kernel == "splash" else _cudnn
    seeing = lambda window: functools.partial(compute, causal=mask.causal, window=window, scale=scale)  # noqa: E731

    def attend(q, k, v, segments, windowed):
        if windowed is None:
            out = seeing(mask.window)(q, k, v, segments)
        else:
            out = jax.lax.cond(windowed, seeing(mask.window), seeing(None), q, k, v, segments)
        # To a kernel padding is a segment like others, for a softmax over nothing is undefined to it.
        return out if segments is None else jnp.where((segments > 0)[..., None, None], out, 0)

    return _over_mesh(attend)(q, k, v, mask.segments, mask.windowed)


def _over_mesh(attend: Callable) -> Callable:
    """Run `attend` on every device's rows and heads; what the mesh does not divide stays whole."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend

    def shared_out(q, k, v, segments, windowed):
        rows = BATCH_AXES if q.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
        heads = "tensor" if k.shape[1] % mesh.shape["tensor"] == 0 else None
        queries, keys = PartitionSpec(rows, None, heads), PartitionSpec(rows, heads)
        specs = (queries, keys, keys, PartitionSpec(rows), PartitionSpec())
        return jax.shard_map(attend, in_specs=specs, out_specs=queries, check_vma=False)(q, k, v, segments, windowed)

    return shared_out


def _splash(
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    *,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Array:
    batch, length, heads, _ = q.shape
    q = (q * scale).swapaxes(1, 2)
    # As few blocks as may be, all alike.
    count = -(-length // BLOCK)
    block = -(-length // (count * LANES)) * LANES
    padded = count * block
    if more := padded - length:  # filled up with padding, which no query before it sees
        q, k, v = (jnp.pad(a, ((0, 0), (0, 0), (0, more), (0, 0))) for a in (q, k, v))
        if segments is None and not causal:
            segments = jnp.ones((batch, length), jnp.int32)
        if segments is not None:
            segments = jnp.pad(segments, ((0, 0), (0, more)))
    seen: splash_attention.Mask
    if window is not None:
        seen = splash_attention.LocalMask((padded, padded), (window - 1, 0 if causal else None), 0)
    else:
        seen = (splash_attention.CausalMask if causal else splash_attention.FullMask)((padded, padded))
    attend = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([seen] * heads),
        block_sizes=splash_attention.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
        attn_logits_soft_cap=softcap,
        interpret=not at_home("splash"),
    )
    ids = None if segments is None else splash_attention.SegmentIds(segments, segments)
    return jax.vmap(attend)(q, k, v, ids)[:, :, :length].swapaxes(1, 2)


def _cudnn(q: Array, k: Array, v: Array, segments: Array | None, *, causal: bool, window: int | None, scale: float) -> Array:
    # Segments are drawn, once for all heads; the scores of no head are.
    same = None if segments is None else segments[:, None, :, None] == segments[:, None, None, :]
    return jax.nn.dot_product_attention(
        q,
        k.swapaxes(1, 2),
        v.swapaxes(1, 2),
        mask=same,
        scale=scale,
        is_causal=causal,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn" if at_home("cudnn") else "xla",
    )
