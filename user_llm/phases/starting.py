"""Where the parameters of a phase start from: drawn, read from the open LLM's checkpoint, or those of another phase."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.common.checkpoint import load_params
from user_llm.common.trees import Params, Rules
from user_llm.models import pretrained
from user_llm.phases.llm import decoder_config
from user_llm.phases.run import Run
from user_llm.training.step import cast


def sources(run: Run, rules: Rules, shapes: Params) -> Params:
    """Return where each parameter starts from; where a checkpoint is configured it stands in for `pretrain_lm`."""
    instead = {"pretrain_lm": "checkpoint"} if run.config.llm.checkpoint else {}
    return jax.tree.map(lambda source: instead.get(source, source), trees.match(rules, shapes))


def kept(name: str, run: Run, rules: Rules, shapes: Params) -> Params:
    """Return the shapes of a phase's parameters in the types that they are kept in.

    What the phase does not train of an open LLM stays as the checkpoint holds it, or in `loop.dtype` if that takes fewer bytes. What
    starts from another phase has the types of `shapes`, since that phase may have trained it.

    Args:
      rules: as in `init`.

    Raises:
      ValueError: a quantised weight that would be drawn.
    """
    if not run.config.llm.checkpoint:
        return shapes
    phase, decoder = run.config.contextual(name), shapes["decoder"]
    stored = pretrained.in_stored_types(run.checkpoint, decoder, decoder_config(run, 0), run.kinds.families)
    narrow = trees.flatten(cast({"decoder": stored}, jnp.dtype(phase.loop.dtype)))
    starts = trees.flatten(sources(run, rules, shapes))
    if drawn := [path for path, source in starts.items() if path.endswith("/codes") and source == "fresh"]:
        raise ValueError(
            f"{name}.load: {drawn[0]} cannot start fresh, with llm.quantize={run.config.llm.quantize}: load the checkpoint."
        )
    trains = trees.flatten(trees.match(run.config.strategies[phase.strategy].trainable, shapes))
    frozen = {path for path, source in starts.items() if source == "checkpoint" and not trains[path]}
    return trees.replace(shapes, {path: narrow[path] for path in frozen})


def init(run: Run, create: Callable[[], nnx.Module], rules: Rules, shapes: Params, place: Callable[[Params], Params]) -> Params:
    """Return a model's parameters, those that start from elsewhere read straight into their shardings.

    Args:
      rules: ordered (regex, source). A source is `fresh` (drawn), `checkpoint` (the open LLM), or a phase; from a phase
        `encoder/item` reads that phase's `item`.
      shapes: from `kept`, with the types that parameters are kept in.
      place: maps a tree of shapes to one of shardings.
    """
    starts = sources(run, rules, shapes)
    chosen = lambda name: jax.tree.map(lambda source: source == name, starts)  # noqa: E731
    params = trees.init(create, place, chosen("fresh"))
    where = place(shapes)
    for source in sorted(set(trees.flatten(starts).values()) - {"fresh"}):
        for root, shardings in trees.partition(chosen(source), where)[0].items():
            like = meshes.placed(trees.partition(chosen(source), shapes)[0][root], shardings)
            if source == "checkpoint":
                config = decoder_config(run, 0)
                found = pretrained.load_decoder(run.checkpoint, config, like=like, families=run.kinds.families)
            else:
                found = load_params(run.workdir / source / "params", like)
            params = trees.combine(params, {root: found})
    return params
