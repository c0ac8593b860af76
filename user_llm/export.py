"""Write a contextualized LLM for other programs: `python -m user_llm.export --run=RUN --phase=user_llm --out=DIR`.

DIR then holds the LLM as a checkpoint that `transformers` loads (or with --adapter the adapters alone, in peft's layout), its
tokenizer, and the user's side, which `load` puts back beside the LLM.
"""

import shutil
import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from user_llm.common import trees
from user_llm.common.checkpoint import load_params
from user_llm.common.files import check_regular, leads_out
from user_llm.common.printable import printable
from user_llm.common.records import read_json, text
from user_llm.common.trees import Params
from user_llm.common.workdir import check_tree, path_part
from user_llm.config.check import check as check_config
from user_llm.models import export as formats
from user_llm.models.pretrained import decoder_config, load_decoder
from user_llm.models.user_llm import UserLLM, UserLLMConfig
from user_llm.tasks.context import Context, open_context
from user_llm.tasks.contextualize import model_config

_RUN = flags.DEFINE_string("run", None, "Workdir of a finished run.")
_PHASE = flags.DEFINE_string("phase", "user_llm", "Phase whose model is written.")
_OUT = flags.DEFINE_string("out", None, "Directory to write to.")
_ADAPTER = flags.DEFINE_bool("adapter", False, "Write the adapters alone instead of the LLM with them merged.")


def open_run(run: Path, phase: str) -> tuple[Context, UserLLMConfig]:
    """Return the context of a finished run and the config of the model of one of its phases.

    Raises:
      ValueError: no finished phase of that name.
    """
    path_part(phase, "The phase")
    check_tree(epath.Path(run))
    if not (run / phase / "results.json").exists():
        raise ValueError(f"{run} holds no finished phase {phase}: run it to its end first.")
    facts = read_json(run / "config.json", {"config_hash": text, "config": {}}, "run its command again")
    config = ConfigDict(facts["config"])
    check_config(config)
    if config[phase].task != "contextualize":
        raise ValueError(f"Phase {phase} is {config[phase].task}: only contextualized LLMs are exported.")
    context = open_context(config, epath.Path(run), facts["config_hash"])
    model = model_config(config, phase, context, context.decoder_config(context.tokenizer().vocab_size))
    return context, model


def export(run: Path, phase: str, out: Path, *, adapter: bool) -> None:
    """Write the model of a finished phase to `out`, which must not exist.

    Raises:
      ValueError: no such phase, a directory that exists, or no adapters where they are asked for.
    """
    if out.exists():
        raise ValueError(f"{out} exists: choose another directory.")
    context, config = open_run(run, phase)
    params = load_params(run / phase / "params", shapes(config))
    unfinished = out.parent / f"{out.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    if adapter:
        formats.save_adapter(unfinished, params["decoder"], config.decoder, context.config.llm.checkpoint)
    else:
        formats.save_decoder(unfinished, params["decoder"], config.decoder)
    formats.save_user_side(unfinished, params)
    for file in tokenizer_files(context.checkpoint if context.config.llm.checkpoint else Path(run) / "tokenizer"):
        shutil.copy(file, unfinished / file.name)
    unfinished.rename(out)


def tokenizer_files(source: Path) -> list[Path]:
    """Return the files of a tokenizer beside a checkpoint.

    Raises:
      ValueError: a link that leads out of the checkpoint: the export would hold a file of somebody else.
    """
    files = [
        file for pattern in ("*token*", "*.jinja", "vocab*", "merges.txt") for file in source.glob(pattern) if not file.is_dir()
    ]
    # The hub's cache keeps the content of all snapshots of a model beside them.
    home = source.parent.parent if source.parent.name == "snapshots" else source
    for file in files:
        check_regular(file)
        if leads_out(file, home):
            raise ValueError(f"{file} is a link that leads out of {home}: put a copy in its place.")
    return files


def load(directory: Path, run: Path, phase: str) -> tuple[nnx.GraphDef, Params]:
    """Return the model that `export` wrote to `directory`, adapters merged, from these files alone; the run gives its sizes."""
    _, config = open_run(run, phase)
    config = formats.without_adapters(config)
    graphdef, like = trees.abstract(lambda: UserLLM(config, rngs=nnx.Rngs(params=0)))
    decoder = load_decoder(directory, decoder_config(directory))
    return graphdef, trees.combine({"decoder": decoder}, formats.load_user_side(directory, like))


def shapes(config: UserLLMConfig) -> Params:
    """Return the shapes of a model's parameters, all on the first device."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    _, like = trees.abstract(lambda: UserLLM(config, rngs=nnx.Rngs(params=0)))
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one), like)


def main(argv: list[str]) -> None:
    """Export, and end a user's mistake in one sentence."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}")
    try:
        export(Path(str(_RUN.value)), _PHASE.value, Path(str(_OUT.value)), adapter=_ADAPTER.value)
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {printable(error)}")
    logging.info("Written to %s", _OUT.value)


if __name__ == "__main__":
    flags.mark_flags_as_required(["run", "out"])
    app.run(main)
