"""The models of benchmark.py in PyTorch: the same sizes, losses, optimizer and batches, as plain as they are usually written.

Attention is `scaled_dot_product_attention`, softmaxes are over all logits at once, the LLM is transformers' own class (sdpa); where the
benchmark says bfloat16, autocast computes in it and parameters stay float32. Left out on both sides: dropout, features of an event
other than the item. Imports nothing of ours, so that the memory of a process is that of the reference alone.

    python launch/torch_reference.py WORKDIR PART STEPS torch|torch_compiled

WORKDIR is what benchmark.py has filled; prints one line of JSON.
"""

import contextlib
import json
import pathlib
import re
import sys
import time
from collections.abc import Mapping

import numpy as np
import torch
import transformers
import turns
from torch import Tensor, nn
from torch.nn import functional

WARM_UP = 2  # steps
NOT_DECAYED = re.compile(r"norm|gate$|item\.|embed|latents")


def linear(inputs: int, outputs: int) -> nn.Linear:
    """Return a product without bias."""
    return nn.Linear(inputs, outputs, bias=False)


class RMSNorm(nn.RMSNorm):
    """The norm in its input's type: autocast leaves its scale float32, for which there is no fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def heads_first(x: Tensor, heads: int) -> Tensor:
    """Return [B, T, N H] as [B, N, T, H]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return attention of heads [B, N, T, H] as [B, T, N H]."""
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class GatedMLP(nn.Module):
    """down(silu(gate_proj(x)) * up(x))."""

    def __init__(self, width: int, mlp_width: int):
        super().__init__()
        self.gate_proj, self.up, self.down = linear(width, mlp_width), linear(width, mlp_width), linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate_proj(x)) * self.up(x))


class Block(nn.Module):
    """A pre-norm layer with rotary positions."""

    def __init__(self, width: int, heads: int, mlp_width: int):
        super().__init__()
        self.heads = heads
        self.attn_norm, self.mlp_norm = RMSNorm(width, eps=1e-6), RMSNorm(width, eps=1e-6)
        self.q, self.k, self.v, self.o = (linear(width, width) for _ in range(4))
        self.mlp = GatedMLP(width, mlp_width)

    def forward(self, x: Tensor, mask: Tensor, rotate: tuple[Tensor, Tensor]) -> Tensor:
        normed = self.attn_norm(x)
        q, k, v = (heads_first(project(normed), self.heads) for project in (self.q, self.k, self.v))
        x = x + self.o(attend(turn(q, rotate), turn(k, rotate), v, mask))
        return x + self.mlp(self.mlp_norm(x))


def turn(x: Tensor, rotate: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + H/2) of [B, N, T, H]."""
    (cos, sin), (first, second) = rotate, x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Encoder(nn.Module):
    """Item ids to states; the item table is its output table, too."""

    def __init__(self, sizes: Mapping):
        super().__init__()
        block = sizes["encoder"]["block"]
        width, self.head_dim, self.items = block["width"], block["head_dim"], sizes["items"]
        self.item = nn.Embedding(self.items + 1, width)
        nn.init.normal_(self.item.weight, std=0.02)
        self.project = linear(width, width)
        layers = range(sizes["encoder"]["num_layers"])
        self.blocks = nn.ModuleList(Block(width, block["heads"], block["mlp_width"]) for _ in layers)
        self.norm = RMSNorm(width, eps=1e-6)

    def forward(self, items: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Encode [B, E] to states [B, E, D]; `mask` [B, E, E] is True where an event may be seen."""
        frequencies = 10_000.0 ** -(torch.arange(0, self.head_dim, 2, device=items.device) / self.head_dim)
        angle = positions[:, None, :, None] * frequencies
        x, rotate = self.project(self.item(items)), (angle.cos(), angle.sin())
        # Padding sees itself: a softmax over nothing is no number.
        mask = (mask | torch.eye(items.shape[1], dtype=torch.bool, device=items.device))[:, None]
        for block in self.blocks:
            x = block(x, mask, rotate)
        return self.norm(x)

    def item_loss(self, queries: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy of items [...] from [..., D]; target 0 is padding."""
        logits = queries.flatten(0, -2) @ self.item.weight[1:].T
        return functional.cross_entropy(logits.float(), targets.flatten() - 1, ignore_index=-1)


class Pretraining(Encoder):
    """The next event at every position of packed histories."""

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the mean over real events."""
        segments = batch["segments"]
        mask = (segments[:, :, None] == segments[:, None, :]).tril() & (segments > 0)[:, :, None]
        return self.item_loss(self(batch["events"][..., 0], mask, batch["positions"]), batch["next"][..., 0])


class Resampler(nn.Module):
    """A Perceiver of one layer: latents see the events before an end, and each other."""

    def __init__(self, width: int, sizes: Mapping):
        super().__init__()
        self.heads = sizes["heads"]
        inner = self.heads * sizes["head_dim"]
        self.latents = nn.Parameter(0.02 * torch.randn(sizes["num_latents"], width))
        self.event_norm, self.latent_norm, self.mlp_norm, self.norm = (RMSNorm(width, eps=1e-6) for _ in range(4))
        self.q, self.k, self.v, self.o = (*(linear(width, inner) for _ in range(3)), linear(inner, width))
        self.mlp = GatedMLP(width, sizes["mlp_width"])

    def forward(self, states: Tensor, ends: Tensor) -> Tensor:
        """Resample states [B, E, D] to the user tokens [B J, M, D] at ends [B, J]."""
        (rows, events, width), (count, _) = states.shape, self.latents.shape
        latents = self.latents.expand(rows, ends.shape[1], -1, -1).flatten(1, 2)
        own = self.latent_norm(latents)
        seen = torch.cat([self.event_norm(states), own], dim=1)
        ends = ends.repeat_interleave(count, dim=1)
        end = torch.arange(ends.shape[1], device=ends.device) // count
        before = torch.arange(events, device=ends.device) < ends[..., None]
        mask = torch.cat([before, (end[:, None] == end).expand(rows, -1, -1)], dim=2)[:, None]
        q, k, v = (heads_first(x, self.heads) for x in (self.q(own), self.k(seen), self.v(seen)))
        latents = latents + self.o(attend(q, k, v, mask))
        return self.norm(latents + self.mlp(self.mlp_norm(latents))).reshape(-1, count, width)


class CrossAttention(nn.Module):
    """x + tanh(gate) * attention(norm(x), user tokens); rows without a user stay as they are."""

    def __init__(self, width: int, user_width: int, eps: float, sizes: Mapping):
        super().__init__()
        self.heads = sizes["heads"]
        inner = self.heads * sizes["head_dim"]
        self.norm, self.gate = RMSNorm(width, eps=eps), nn.Parameter(torch.zeros(()))
        self.q, self.k, self.v, self.o = (
            linear(width, inner),
            linear(user_width, inner),
            linear(user_width, inner),
            linear(inner, width),
        )

    def forward(self, x: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
        q, k, v = (heads_first(part, self.heads) for part in (self.q(self.norm(x)), self.k(tokens), self.v(tokens)))
        return x + torch.tanh(self.gate) * self.o(attend(q, k, v)) * real[:, None, None]


class WithUser(nn.Module):
    """A layer of transformers' Llama or Qwen3 with cross-attention between its attention and its MLP."""

    def __init__(self, layer: nn.Module, cross: CrossAttention, user: dict):
        super().__init__()
        self.layer, self.cross, self.user = layer, cross, user

    def forward(self, hidden_states: Tensor, **how) -> Tensor:
        layer = self.layer
        x = hidden_states + layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **how)[0]
        x = self.cross(x, **self.user)
        return x + layer.mlp(layer.post_attention_layernorm(x))


class Adapted(nn.Module):
    """A frozen product and its low-rank adapter."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.a, self.b = linear(base.in_features, rank), linear(rank, base.out_features)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x) * self.scale)


class Contextualization(nn.Module):
    """Encoder, resampler, LLM with cross-attention, and the item head."""

    def __init__(self, sizes: Mapping):
        super().__init__()
        self.catalogue, width = sizes["catalogue"], sizes["encoder"]["block"]["width"]
        settings = transformers.AutoConfig.for_model(**sizes["llm"])
        self.llm = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa")
        if sizes["strategy"] == "lora":
            self.llm.requires_grad_(False)
            for module in [module for name, module in self.llm.named_modules() if name.endswith(("self_attn", "mlp"))]:
                for name, base in list(module.named_children()):
                    if isinstance(base, nn.Linear):
                        setattr(module, name, Adapted(base, sizes["lora"]["rank"], sizes["lora"]["alpha"]))
        self.user: dict[str, Tensor] = {}  # of the step
        layers, every = self.llm.model.layers, sizes["cross"]["every"]
        for number in range(every - 1, len(layers), every):
            cross = CrossAttention(settings.hidden_size, width, settings.rms_norm_eps, sizes["cross"])
            layers[number] = WithUser(layers[number], cross, self.user)
        self.encoder, self.resampler = Encoder(sizes), Resampler(width, sizes["resampler"])
        self.item_norm = RMSNorm(settings.hidden_size, eps=settings.rms_norm_eps)
        self.item_head = linear(settings.hidden_size, width)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of the losses of the answer's tokens and of ranking the item."""
        events, ends = batch["events"][..., 0], batch["prefix"]
        place = torch.arange(events.shape[1], device=events.device)
        mask = ((place < ends.max(1).values[:, None])[:, None, :] & torch.ones_like(place, dtype=torch.bool)[:, None]).tril()
        states = self.encoder(events, mask, place.expand_as(events))
        self.user.update(tokens=self.resampler(states, ends), real=ends.flatten() > 0)

        tokens, lengths, answers = (
            batch["text"].flatten(0, 1),
            batch["text_lengths"].reshape(-1, 1),
            batch["answers"].reshape(-1, 1),
        )
        hidden = self.llm.model(tokens, use_cache=False).last_hidden_state  # padding stands behind what is causal
        place = torch.arange(tokens.shape[1] - 1, device=tokens.device)
        asked = (place >= answers) & (place + 1 < lengths) & (answers > 0)
        logits = self.llm.lm_head(hidden[:, :-1]).flatten(0, 1)
        text = functional.cross_entropy(logits.float(), tokens[:, 1:].where(asked, -100).flatten())
        query = self.item_head(self.item_norm(hidden[torch.arange(len(hidden), device=tokens.device), answers[:, 0]]))
        item = self.encoder.item_loss(query, batch["items"])
        return self.catalogue * item + batch["text_weight/next_item"][0] * text


def make_optimizer(model: nn.Module, sizes: Mapping) -> torch.optim.Optimizer:
    """Return AdamW of what trains, without decay of norms, gates and tables."""
    chosen = sizes["optimizer"]
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if bool(NOT_DECAYED.search(name)) == bare], "weight_decay": decay}
        for bare, decay in ((False, chosen["weight_decay"]), (True, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=chosen["learning_rate"], betas=(chosen["b1"], chosen["b2"]), fused=True)


def load_batch(path: pathlib.Path, device: str) -> dict[str, Tensor]:
    """Return a batch that benchmark.py has written."""
    with np.load(path) as arrays:
        whole = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    return {name: (a.long() if a.dtype == torch.int32 else a).to(device) for name, a in whole.items()}


def time_training(workdir: pathlib.Path, part: str, steps: int, *, compiled: bool) -> dict:
    """Train for `steps` steps after those that warm up."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = json.loads((workdir / f"{part}.json").read_text())
    batches = [load_batch(path, device) for path in sorted(workdir.glob(f"{part}-*.npz"))]
    on_cpu = device == "cpu"
    before = turns.resident_bytes() if on_cpu else 0
    torch.manual_seed(0)
    model = (Pretraining if part == "encoder" else Contextualization)(sizes).to(device)
    optimizer = make_optimizer(model, sizes)
    loss_of = torch.compile(model.loss) if compiled else model.loss
    trained = [p for p in model.parameters() if p.requires_grad]
    low = sizes["dtype"] == "bfloat16"

    def train(count: int) -> float:
        for number in range(count):
            with torch.autocast(device, torch.bfloat16) if low else contextlib.nullcontext():
                loss = loss_of(batches[number % len(batches)])
            loss.backward()
            nn.utils.clip_grad_norm_(trained, sizes["optimizer"]["clip_norm"])
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()  # waits for the device

    start = time.monotonic()
    first = train(1)
    compile_s = time.monotonic() - start
    train(WARM_UP - 1)
    most = turns.peak_resident_bytes if on_cpu else torch.cuda.max_memory_allocated
    peak = most()
    (turns.forget_peak if on_cpu else torch.cuda.reset_peak_memory_stats)()
    start = time.monotonic()
    train(steps)
    seconds = time.monotonic() - start
    of_steps = most()
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {
        "step_s": seconds / steps, "compile_s": compile_s if compiled else None, "peak_bytes": max(peak, of_steps),
        "step_bytes": of_steps - before, "loss": first, "device": name,
    }  # fmt: skip


if __name__ == "__main__":
    given, part, steps, side = sys.argv[1:]
    print(json.dumps(time_training(pathlib.Path(given), part, int(steps), compiled=side == "torch_compiled")))
