"""What all phases of a run share: the data, the seed, the mesh, the directory, and the tokenizer."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import grain
import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.common.checkpoint import load_params
from user_llm.common.distributed import is_first
from user_llm.common.files import local_folder, lock, make_once
from user_llm.common.trees import Params, Rules
from user_llm.common.workdir import path_part
from user_llm.data import amazon, event_files, google_local, movielens, prepare, synthetic_files
from user_llm.data.mapped import Column, filled
from user_llm.data.raw import Raw
from user_llm.data.splits import Split, make_split, train_counts
from user_llm.data.streams import Streams
from user_llm.data.timelines import Chunk, Timelines
from user_llm.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from user_llm.evals.measured import Measured
from user_llm.evals.ranking import result_rows, target_numbers
from user_llm.models import pretrained
from user_llm.models.decoder import DecoderConfig
from user_llm.nn.transformer import BlockConfig
from user_llm.tasks import inputs
from user_llm.training.optimizer import OptimizerConfig

CORPUS_TEXTS = 50_000


@dataclasses.dataclass(frozen=True)
class Context:
    """One run.

    Attributes:
      workdir: holds one directory per phase.
      row_facts: columns that every result row of this run shares.
      data_files: content hashes of the dataset's files, by name.
    """

    config: ConfigDict
    timelines: Timelines
    split: Split
    mesh: Mesh
    workdir: epath.Path
    row_facts: dict
    data_files: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def local(self) -> Path:
        """Where this machine keeps what it makes of the data."""
        return local_folder(self.workdir)

    def of(self, identity: str) -> "Context":
        """Return the run as a phase of an identity sees it: its result rows say so."""
        return dataclasses.replace(self, row_facts=self.row_facts | {"config_hash": identity})

    def streams(self, make: Callable[[tuple[int, int], int], grain.IterDataset], rows: int) -> Streams:
        """Return batches of `rows` rows, of which this process reads its share; `make((number, count), rows)` returns a stream.

        Raises:
          ValueError: streams that do not divide the rows, or processes that do not divide the streams.
        """
        share = meshes.row_share(self.mesh)
        count = self.config.data.streams or share.count
        if count % share.count or rows % count:
            raise ValueError(
                f"{rows} rows from {count} streams cannot be shared evenly by {share.count} processes: change the batch, or "
                "data.streams."
            )
        each = count // share.count
        return Streams({n: make((n, count), rows // count) for n in range(share.index * each, (share.index + 1) * each)})

    @functools.cached_property
    def checkpoint(self) -> Path:
        """The directory of the open LLM, downloaded if need be."""
        return pretrained.find_checkpoint(self.config.llm.checkpoint)

    def decoder_config(self, vocab_size: int) -> DecoderConfig:
        """Return the LLM as it comes: the checkpoint's own, or a small one to train from scratch."""
        llm = self.config.llm
        if llm.checkpoint:
            found = pretrained.decoder_config(self.checkpoint, unroll=llm.unroll, remat=llm.remat)
        else:
            found = DecoderConfig(
                vocab_size=vocab_size, num_layers=llm.num_layers, block=BlockConfig(**llm.block), tie_embeddings=True,
                unroll=llm.unroll, remat=llm.remat,
            )  # fmt: skip
        return dataclasses.replace(found, block=dataclasses.replace(found.block, attention_kernel=llm.attention_kernel))

    def optimizer_config(self, name: str) -> OptimizerConfig:
        """Return the optimizer of a phase, which trains what the phase's strategy says."""
        phase = self.config[name]
        return OptimizerConfig(**phase.optimizer, trainable=self.config.strategies[phase.strategy].trainable)

    def tokenizer(self) -> Tokenizer:
        """Return the LLM's tokenizer: the checkpoint's own, or BPE trained once on this dataset's titles and genres."""
        if self.config.llm.checkpoint:
            return load_tokenizer(self.checkpoint)

        def train(path: Path) -> None:
            phases = [self.config[name] for name in self.config.phases]
            # Often enough for byte-pair merges to make whole words of them: every prompt starts with one.
            asked = [line + "\n" for phase in phases if "prompts" in phase for line in templates(phase.prompts)]
            train_bpe(self.corpus() + 100 * asked, self.config.llm.vocab_size, path)
            inputs.tokenizer_identity(self.config, self.data_files).write(epath.Path(path))

        return load_tokenizer(make_once(self.local / "tokenizer", train))

    def corpus(self) -> list[str]:
        """Return what the small LLM learns from: a line per item, and of what users wrote in training, at most CORPUS_TEXTS lines."""
        timelines = self.timelines
        lines = catalogue_lines(timelines)
        for _, column in sorted(timelines.columns.items()):
            if column.dtype.kind == "T":
                lines += [text + "\n" for text in self._written(column)]
        return lines

    def _written(self, column: np.ndarray | Column) -> list[str]:
        """Return at most CORPUS_TEXTS texts of training events, drawn from all those that are not empty."""

        def rows(chunk: Chunk) -> np.ndarray:
            trains = chunk.positions < self.split.train_stop[chunk.users]
            return chunk.events.start + np.flatnonzero(trains & filled(column, chunk.events))

        total = sum(len(rows(chunk)) for chunk in self.timelines.chunks())
        # Their numbers among these texts; where they are a small share, in memory for them alone.
        drawn = np.random.default_rng(self.seed).choice(total, min(total, CORPUS_TEXTS), replace=False)
        texts, first = np.empty(len(drawn), object), 0
        for chunk in self.timelines.chunks():
            written = rows(chunk)
            here = np.flatnonzero((drawn >= first) & (drawn < first + len(written)))
            texts[here] = column[written[drawn[here] - first]]
            first += len(written)
        return texts.tolist()

    @functools.cached_property
    def train_counts(self) -> np.ndarray:
        """Each item's events in training."""
        return train_counts(self.timelines, self.split)

    def record(self, phase: str, task: str, method: str, measured: Measured) -> list[dict]:
        """Return the result rows of what was measured; leave each target's values for the report."""
        if task == "next_item":
            numbers = target_numbers(self.timelines, measured.users, measured.positions, self.train_counts)
            measured = dataclasses.replace(measured, numbers=numbers)
        if is_first():
            measured.save(self.workdir / phase / "values", task, method)
        return result_rows(measured.metrics, len(measured), **self.row_facts, task=task, method=method)

    def sources(self, rules: Rules, shapes: Params) -> Params:
        """Return where each parameter starts from; where a checkpoint is configured it stands in for `pretrain_lm`."""
        instead = {"pretrain_lm": "checkpoint"} if self.config.llm.checkpoint else {}
        return jax.tree.map(lambda source: instead.get(source, source), trees.match(rules, shapes))

    def init(self, create: Callable[[], nnx.Module], rules: Rules, place: Callable[[Params], Params]) -> Params:
        """Return a model's parameters, those that start from elsewhere read straight into their shardings.

        Args:
          rules: to the name of a phase, whose own tree is that below the path's first part; to `checkpoint` for the weights
            of the open LLM below `decoder`; or to `fresh`. See `sources`.
          place: maps a tree of shapes to one of shardings.
        """
        shapes = trees.abstract(create)[1]
        sources = self.sources(rules, shapes)
        chosen = lambda name: jax.tree.map(lambda source: source == name, sources)  # noqa: E731
        params = trees.init(create, place, chosen("fresh"))
        where = place(shapes)
        for source in sorted(set(trees.flatten(sources).values()) - {"fresh"}):
            for root, shardings in trees.partition(chosen(source), where)[0].items():
                if source == "checkpoint":
                    config = pretrained.decoder_config(self.checkpoint)
                    found = pretrained.load_decoder(self.checkpoint, config, shardings=shardings)
                else:
                    wanted = trees.partition(chosen(source), shapes)[0][root]
                    found = load_params(self.workdir / source / "params", meshes.placed(wanted, shardings))
                params = trees.combine(params, {root: found})
        return params


def open_context(config: ConfigDict, workdir: epath.Path, config_hash: str) -> Context:
    """Read or prepare the dataset of a run, split it, and put up the mesh.

    Raises:
      ValueError: no data given, bad data, or a mesh that does not fit the devices.
    """
    raw = open_raw(config, workdir)
    hashes = inputs.data_files(raw.files, local_folder(workdir) / "data")
    timelines, split = read_data(config, workdir, raw)
    facts = {"dataset": timelines.name, "seed": config.seed, "split": split.name, "config_hash": config_hash}
    return Context(config, timelines, split, meshes.make_mesh(**config.mesh), workdir, facts, hashes)


def load_data(config: ConfigDict, workdir: epath.Path) -> tuple[Timelines, Split]:
    """Read or prepare the dataset and split it.

    Raises:
      ValueError: no data given, bad data, or a leak between the parts of the split.
    """
    return read_data(config, workdir, open_raw(config, workdir))


def open_raw(config: ConfigDict, workdir: epath.Path) -> Raw:
    """Return the dataset as published, downloaded or written if need be, by one of a machine's processes.

    Raises:
      ValueError: no data given, or none of its kind there.
    """
    folder = local_folder(workdir)
    with lock(folder / "data"):
        return find_data(config, folder)


def read_data(config: ConfigDict, workdir: epath.Path, raw: Raw) -> tuple[Timelines, Split]:
    """Prepare a dataset if need be, read it, and split it.

    Raises:
      ValueError: bad data, or a leak between the parts of the split.
    """
    data = config.data
    prepared = local_folder(workdir) / "data" / f"read-{_digest(inputs.reading_settings(config))}"
    timelines = prepare.load(raw, prepared, ties=data.ties, seed=config.seed, min_events=data.min_events)
    return timelines, make_split(timelines, data.split, withhold=data.withhold)


def _digest(settings: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def find_data(config: ConfigDict, keep: Path) -> Raw:
    """Return the dataset as published; `keep` is for downloads, and for a synthetic world, which is written first.

    Raises:
      ValueError: no data given, or none of its kind there.
    """
    data = config.data
    source, folder, category, states, columns = data.source, data.dir, data.category, data.states, dict(data.columns)
    if source == "synthetic":
        source, columns = data.synthetic.layout, synthetic_files.COLUMNS
        category, states = synthetic_files.NAME, (synthetic_files.NAME,)
        world = lambda path: synthetic_files.write(path, seed=config.seed, **data.synthetic)  # noqa: E731
        # Its name is the dataset's; worlds of other settings stand beside it.
        folder = make_once(keep / "data" / f"world-{_digest(inputs.reading_settings(config))}" / "synthetic", world)
    for key, values in (("category", (category,)), ("states", states), ("name", (data.name,))):
        if inputs.OF_SOURCE[key] == source:
            for value in values:
                path_part(value, f"data.{key}")
    find = {
        "movielens": lambda: movielens.find(folder, keep / "data", bad_rows=data.bad_rows),
        "amazon": lambda: amazon.find(folder, category, bad_rows=data.bad_rows),
        "google_local": lambda: google_local.find(folder, states, bad_rows=data.bad_rows),
        "events": lambda: event_files.find(str(folder), event_files.Columns(**columns), name=data.name, bad_rows=data.bad_rows),
    }
    if source not in find:
        raise ValueError(f"Unknown data.source {source!r}: choose synthetic, {', '.join(find)}.")
    if not folder:
        raise ValueError(
            "No data: name where it is by --config.data.dir=... (for MovieLens also a zip or a release to download), or take "
            "the config's :synthetic variant, which makes its own."
        )
    return find[source]()


def templates(prompts: ConfigDict) -> list[str]:
    """Return the instructions and questions of a phase's tasks."""
    asked = [task for task in prompts.values() if isinstance(task, ConfigDict) and task.weight]
    return [task[part] for task in asked for part in ("instruction", "question") if task.get(part)]


def catalogue_lines(timelines: Timelines) -> list[str]:
    """Return one line of text per item: its title, then its genres where it has any."""
    catalogue = timelines.catalogue
    lines = []
    for item in range(1, len(catalogue.titles)):
        bags = [", ".join(catalogue.vocab[name][i] for i in bag[item] if i) for name, bag in sorted(catalogue.multi.items())]
        lines.append(" | ".join(filter(None, [catalogue.titles[item], *bags])) + "\n")
    return lines
