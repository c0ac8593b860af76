"""Where the parameters of a phase start from: drawn, read from the open LLM's checkpoint, or those of another phase."""

from collections.abc import Callable

import jax
from flax import nnx

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.common.checkpoint import load_params
from user_llm.common.trees import Params, Rules
from user_llm.models import pretrained
from user_llm.phases.run import Run


def sources(run: Run, rules: Rules, shapes: Params) -> Params:
    """Return where each parameter starts from; where a checkpoint is configured it stands in for `pretrain_lm`."""
    instead = {"pretrain_lm": "checkpoint"} if run.config.llm.checkpoint else {}
    return jax.tree.map(lambda source: instead.get(source, source), trees.match(rules, shapes))


def init(run: Run, create: Callable[[], nnx.Module], rules: Rules, place: Callable[[Params], Params]) -> Params:
    """Return a model's parameters, those that start from elsewhere read straight into their shardings.

    Args:
      rules: ordered (regex, source). A source is `fresh` (drawn), `checkpoint` (the open LLM), or a phase; from a phase
        `encoder/item` reads that phase's `item`.
      place: maps a tree of shapes to one of shardings.
    """
    shapes = trees.abstract(create)[1]
    starts = sources(run, rules, shapes)
    chosen = lambda name: jax.tree.map(lambda source: source == name, starts)  # noqa: E731
    params = trees.init(create, place, chosen("fresh"))
    where = place(shapes)
    for source in sorted(set(trees.flatten(starts).values()) - {"fresh"}):
        for root, shardings in trees.partition(chosen(source), where)[0].items():
            if source == "checkpoint":
                config = pretrained.decoder_config(run.checkpoint, run.kinds.families)
                found = pretrained.load_decoder(run.checkpoint, config, shardings=shardings, families=run.kinds.families)
            else:
                wanted = trees.partition(chosen(source), shapes)[0][root]
                found = load_params(run.workdir / source / "params", meshes.placed(wanted, shardings))
            params = trees.combine(params, {root: found})
    return params
