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

    What the phase does not train stays in `loop.dtype`, which is what it is computed with; of an open LLM it stays as the checkpoint holds
    it if that takes fewer bytes. What trains and what is drawn has the types of `shapes`.

    Args:
      rules: as in `init`.

    Raises:
      ValueError: a quantised weight that would be drawn.
    """
    phase, held = run.config.contextual(name), shapes
    if run.config.llm.checkpoint:
        stored = pretrained.in_stored_types(run.checkpoint, shapes["decoder"], decoder_config(run, 0), run.kinds.families)
        held = {**shapes, "decoder": stored}
    narrow = trees.flatten(cast(held, jnp.dtype(phase.loop.dtype)))
    starts = trees.flatten(sources(run, rules, shapes))
    if drawn := [path for path, source in starts.items() if path.endswith("/codes") and source == "fresh"]:
        raise ValueError(
            f"{name}.load: {drawn[0]} cannot start fresh, with llm.quantize={run.config.llm.quantize}: load the checkpoint."
        )
    trains = trees.flatten(trees.match(run.config.trainable(name), shapes))
    frozen = {path for path, source in starts.items() if source != "fresh" and not trains[path]}
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
