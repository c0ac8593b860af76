"""What all phases of a run share: the data, the seed, the mesh, the directory, and the tokenizer."""

import dataclasses
import json

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.common.checkpoint import load_params
from user_llm.common.trees import Params, Rules
from user_llm.data.splits import Split
from user_llm.data.timelines import Timelines
from user_llm.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from user_llm.evals.ranking import Ranks, breakdown


@dataclasses.dataclass(frozen=True)
class Context:
    """One run.

    Attributes:
      workdir: holds one directory per phase.
      row_facts: columns that every result row of this run shares.
    """

    config: ConfigDict
    timelines: Timelines
    split: Split
    mesh: Mesh
    workdir: epath.Path
    row_facts: dict

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def process(self) -> tuple[int, int]:
        """(index, count) of this process, for sharing out data."""
        return jax.process_index(), jax.process_count()

    def tokenizer(self) -> Tokenizer:
        """Return the LLM's tokenizer: the checkpoint's own, or BPE trained once on this dataset's titles and genres."""
        if self.config.llm.checkpoint:
            return load_tokenizer(self.config.llm.checkpoint)
        path = self.workdir / "tokenizer"
        if not path.exists():
            phases = [self.config[name] for name in self.config.phases]
            instructions = [phase.prompt.instruction + "\n" for phase in phases if "prompt" in phase]
            # Often enough for byte-pair merges to make whole words of them: every prompt starts with one.
            train_bpe(catalogue_lines(self.timelines) + 100 * instructions, self.config.llm.vocab_size, path)
        return load_tokenizer(path)

    def save_breakdown(self, phase: str, method: str, ranks: Ranks) -> None:
        """Write recall by history length and by tie at the split boundary, for the report."""
        path = self.workdir / phase / "breakdown.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(breakdown(method, ranks, self.timelines), indent=1))

    def load(self, params: Params, rules: Rules) -> Params:
        """Replace parameters by what earlier phases saved.

        Args:
          rules: to the name of a phase, whose own tree is that below the path's first part, or `fresh` to keep the value.
        """
        sources = trees.match(rules, params)
        one = meshes.replicated(self.mesh)
        for phase in sorted(set(trees.flatten(sources).values()) - {"fresh"}):
            chosen, rest = trees.partition(jax.tree.map(lambda source, phase=phase: source == phase, sources), params)
            like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one), chosen)
            for root, subtree in like.items():
                chosen[root] = load_params(self.workdir / phase / "params", subtree)
            params = trees.combine(chosen, rest)
        return params


def catalogue_lines(timelines: Timelines) -> list[str]:
    """Return one line of text per item: its title, then its genres where it has any."""
    catalogue = timelines.catalogue
    lines = []
    for item in range(1, len(catalogue.titles)):
        bags = [", ".join(catalogue.vocab[name][i] for i in bag[item] if i) for name, bag in sorted(catalogue.multi.items())]
        lines.append(" | ".join(filter(None, [catalogue.titles[item], *bags])) + "\n")
    return lines
