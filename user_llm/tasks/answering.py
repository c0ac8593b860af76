"""Answers of a contextualized LLM, and how each task measures them.

| task | answer | metrics |
|---|---|---|
| `next_item` | all items ranked by the item head; method `/generate`: titles written by beam search in a trie | ranks |
| `favorite`, `favorite_future` | the likeliest class's name, among all, by beam search in a trie | accuracy |
| `review` | a text written greedily | ROUGE |
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.common.trees import Params
from user_llm.data.pipeline import BUCKET, ExampleConfig, HistoryBatch, history_batches
from user_llm.data.prompts.base import Prompts, pad_rows
from user_llm.data.prompts.favorite import Favorite
from user_llm.data.prompts.next_item import NextItem
from user_llm.data.prompts.review import Review
from user_llm.evals.evaluator import rank_listed, rank_targets
from user_llm.evals.measured import Measured
from user_llm.evals.ranking import Ranks
from user_llm.evals.rouge import rouge
from user_llm.models.beam_search import beam_search
from user_llm.models.generate import abstract_programs, generate
from user_llm.models.prefill import bucket
from user_llm.models.trie import Trie
from user_llm.models.user import User, embed_prompts
from user_llm.nn.cross_attention import UserKV
from user_llm.tasks.context import Context
from user_llm.training.task import Program


@functools.partial(jax.jit, static_argnums=0)
def encode_users(graphdef: nnx.GraphDef, params: Params, events: Int[Array, "B E A"], lengths: Int[Array, " B"]) -> User:
    """Return the users of whole histories: what a server stores of them."""
    model = trees.merge(graphdef, params)
    return model.user(model.encode(events, lengths[:, None]))


@functools.partial(jax.jit, static_argnums=0)
def score_catalogue(
    graphdef: nnx.GraphDef, params: Params, text: Array, lengths: Array, user: User | None = None, leading: int = 0
) -> Float[Array, "B V"]:
    """Score all items at the end of each right-padded prompt."""
    model = trees.merge(graphdef, params)
    hidden = model.hidden(text, lengths, user=user, leading=leading)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return model.score(model.item_query(last))


@functools.partial(jax.jit, static_argnums=0)
def attended_events(
    graphdef: nnx.GraphDef, params: Params, events: Int[Array, "B E A"], lengths: Int[Array, " B"]
) -> Float[Array, "B E"]:
    """Return by how much the user tokens of whole histories see each event."""
    model = trees.merge(graphdef, params)
    return model.attended(model.encode(events, lengths[:, None]))


@dataclasses.dataclass(frozen=True)
class Predictor:
    """Answers prompts with a contextualized LLM.

    Attributes:
      leading: how many tokens of each task's prompts stand in front of a soft prompt.
      resamples: whether user tokens are a resampler's, which has looked at the events.
      ranks: whether the item head has been trained to rank items; without it the next item is measured by writing titles alone.
      pad_whole: whether all histories are padded to `max_events` and all prompts to their task's `max_tokens`, so that one program
        serves every batch, and not to one of several lengths: for accelerators, where compiling takes longer than padding.
    """

    graphdef: nnx.GraphDef
    context: Context
    examples: ExampleConfig
    batch_size: int
    leading: Mapping[str, int]
    resamples: bool = False
    ranks: bool = True
    pad_whole: bool = False

    @property
    def max_events(self) -> int:
        """Events of a history that are read."""
        return max(self.examples.max_events, 1)

    @property
    def bucket(self) -> int:
        """Of how many events the padded length of a history is a multiple."""
        return self.max_events if self.pad_whole else BUCKET

    def read(self, params: Params, prompts: Prompts, batch: HistoryBatch) -> tuple[Array, Array, User | None]:
        """Return a batch's right-padded prompts, their lengths, and its users; few different widths."""
        rows = [prompts.prompt(int(user), int(end)) for user, end in zip(batch.users, batch.positions, strict=True)]
        lengths = np.array([len(row) for row in rows], np.int32)
        longest, alike = int(lengths.max()), not self.examples.text_items and lengths.min() == lengths.max()
        most = max(prompts.max_tokens, longest)
        width = longest if alike else most if self.pad_whole else min(most, bucket(longest))
        text, sizes = meshes.put_rows((pad_rows(rows, width), lengths), self.context.mesh)
        return text, sizes, self.user(params, batch)

    def embed(
        self, params: Params, task: str, prompts: Prompts, batch: HistoryBatch
    ) -> tuple[tuple[nnx.GraphDef, Params], Array, Int[Array, " B"], UserKV | None]:
        """Return the decoder, and a batch's prompts as embeddings, their lengths and its users' K/V, for generation."""
        text, lengths, user = self.read(params, prompts, batch)
        decoder = trees.split(trees.merge(self.graphdef, params).decoder)
        inputs, sizes = embed_prompts(*decoder, text, lengths, user=user, leading=self.leading[task])
        return decoder, inputs, sizes, user and user.kv

    def user(self, params: Params, batch: HistoryBatch) -> User | None:
        """Return the batch's users, or None without an encoder."""
        if not self.examples.max_events:
            return None
        return encode_users(self.graphdef, params, *meshes.put_rows((batch.events, batch.lengths), self.context.mesh))

    def attended(self, params: Params, batch: HistoryBatch) -> Float[np.ndarray, "B E"]:
        """Return by how much the batch's user tokens see each event."""
        rows = meshes.put_rows((batch.events, batch.lengths), self.context.mesh)
        return meshes.fetch(attended_events(self.graphdef, params, *rows))

    def users(self, params: Params, count: int) -> User | None:
        """Return the first `count` test users, over again where there are fewer."""
        users, positions = (np.resize(part, count) for part in self.context.split.targets["test"])
        [(_, batch)] = self.batches(users, positions, batch_size=count)
        return self.user(params, batch)

    def programs(self, params: Params, prompts: Mapping[str, Prompts]) -> dict[str, Program]:
        """Return what answering compiles for the longest prompts, on shapes alone; beam search, which takes a catalogue's titles, is left out."""
        mesh, rows = self.context.mesh, self.batch_size
        ints = lambda *shape: meshes.rows_like(jax.ShapeDtypeStruct(shape, jnp.int32), mesh)  # noqa: E731
        found: dict[str, Program] = {}
        user, lengths = None, ints(rows)
        if self.examples.max_events:
            events = ints(rows, self.max_events, self.context.timelines.schema.width)
            found["encode"] = encode_users, (self.graphdef, params, events, lengths)
            shapes = jax.eval_shape(functools.partial(encode_users, self.graphdef), params, events, lengths)
            kv = shapes.kv and meshes.rows_like(shapes.kv, mesh, axis=1)._replace(mask=meshes.rows_like(shapes.kv.mask, mesh))
            user = User(kv, meshes.rows_like(shapes.prompt, mesh))
        task, asked = max(prompts.items(), key=lambda pair: pair[1].max_tokens)
        text = ints(rows, bucket(asked.max_tokens))
        found["score"] = score_catalogue, (self.graphdef, params, text, lengths, user, self.leading[task])
        graphdef, decoder = trees.split(trees.merge(self.graphdef, params).decoder)
        embed = functools.partial(embed_prompts, graphdef, leading=self.leading[task])
        inputs = meshes.rows_like(jax.eval_shape(embed, decoder, text, lengths, user=user)[0], mesh)
        return found | abstract_programs(graphdef, decoder, inputs, user and user.kv, bucket(1), mesh)

    def batches(self, users: np.ndarray, ends: np.ndarray, batch_size: int = 0) -> Iterator[tuple[np.ndarray, HistoryBatch]]:
        """Yield (indices into `users`, batch)."""
        size = batch_size or self.batch_size
        return history_batches(
            self.context.timelines, users, ends, max_events=self.max_events, batch_size=size, bucket=self.bucket
        )

    def score(self, params: Params, task: str, prompts: Prompts, batch: HistoryBatch) -> Float[Array, "B V"]:
        """Score all items by the item head."""
        text, lengths, user = self.read(params, prompts, batch)
        return score_catalogue(self.graphdef, params, text, lengths, user, self.leading[task])

    def rank(self, params: Params, task: str, prompts: Prompts, part: str, limit: int | None) -> Ranks:
        """Rank all items by the item head."""
        return rank_targets(
            lambda batch: self.score(params, task, prompts, batch), self.context.timelines, self.context.split, part,
            max_events=self.max_events, batch_size=self.batch_size, limit=limit, bucket=self.bucket,
        )  # fmt: skip

    def rank_written(self, params: Params, task: str, prompts: NextItem, part: str, limit: int | None, *, beams: int) -> Ranks:
        """Rank items by beam search over the titles of the catalogue; what is not among the beams is not found."""
        trie = Trie.build(prompts.lines.titles_as_targets())

        def propose(batch: HistoryBatch) -> np.ndarray:
            return self.choose(params, task, prompts, batch, trie, beams)

        return rank_listed(
            propose, self.context.timelines, self.context.split, part,
            max_events=self.max_events, batch_size=self.batch_size, limit=limit, bucket=self.bucket,
        )  # fmt: skip

    def choose(
        self, params: Params, task: str, prompts: Prompts, batch: HistoryBatch, trie: Trie, beams: int
    ) -> Int[np.ndarray, "B beams"]:
        """Return the ids of the likeliest texts of a trie, best first."""
        decoder, inputs, sizes, kv = self.embed(params, task, prompts, batch)
        return meshes.fetch(beam_search(*decoder, inputs, sizes, trie, beams=beams, user=kv)[0])

    def favorites(
        self, params: Params, task: str, prompts: Favorite, users: np.ndarray, ends: np.ndarray, beams: int
    ) -> Int[np.ndarray, " n"]:
        """Return the likeliest class of each history."""
        trie, best = Trie.build(prompts.names), np.zeros(len(users), np.int64)
        for indices, batch in self.batches(users, ends):
            best[indices] = self.choose(params, task, prompts, batch, trie, min(len(prompts.names), beams))[: batch.count, 0]
        return best

    def write(self, params: Params, task: str, prompts: Review, users: np.ndarray, ends: np.ndarray) -> list[str]:
        """Write an answer to each prompt, greedily, one line."""
        tokenizer, out = prompts.lines.tokenizer, [""] * len(users)
        for indices, batch in self.batches(users, ends):
            decoder, inputs, sizes, kv = self.embed(params, task, prompts, batch)
            found = generate(
                *decoder, inputs, lengths=meshes.fetch(sizes).tolist(), max_tokens=prompts.max_target_tokens,
                stop_ids=[prompts.lines.end_id], user=kv,
            )  # fmt: skip
            for index, row in zip(indices, found.rows(), strict=False):
                out[index] = tokenizer.decode(row).strip()
        return out


@dataclasses.dataclass(frozen=True)
class Found:
    """What one way of answering a task was worth.

    Attributes:
      suffix: of the method's name.
    """

    measured: Measured
    suffix: str = ""


def measure_next_item(
    predictor: Predictor, params: Params, task: str, prompts: NextItem, part: str, limit: int | None, settings: ConfigDict
) -> list[Found]:
    """Rank the next item: by the item head, and in the test part also by writing titles; by writing alone without a trained head.

    Raises:
      ValueError: no way to rank is left.
    """
    written = settings.generate_users if part == "test" or not predictor.ranks else 0
    if not (predictor.ranks or written):
        raise ValueError("With loss.catalogue=0 no item head is trained, so titles must be written: set eval.generate_users.")
    found = []
    if predictor.ranks:
        found.append(Found(predictor.rank(params, task, prompts, part, limit).measured()))
    if written:
        ranks = predictor.rank_written(params, task, prompts, part, written, beams=settings.beams)
        found.append(Found(ranks.measured(), "/generate"))
    return found


def measure_favorite(
    predictor: Predictor, params: Params, task: str, prompts: Favorite, part: str, limit: int | None, settings: ConfigDict
) -> list[Found]:
    """Say how often the likeliest class is the label."""
    users, ends = (array[:limit] for array in prompts.targets(part))
    best = predictor.favorites(params, task, prompts, users, ends, settings.beams)
    labels = [prompts.asked.label(int(user), int(end)) for user, end in zip(users, ends, strict=True)]
    correct = (best == labels).astype(np.float64)
    return [Found(Measured(users, ends, {"accuracy": correct}))]


def measure_review(
    predictor: Predictor, params: Params, task: str, prompts: Review, part: str, limit: int | None, settings: ConfigDict
) -> list[Found]:
    """Compare what is written with what the user wrote, for the first `review_users`."""
    users, ends = (array[: min(limit or len(array), settings.review_users)] for array in prompts.targets(part))
    targets = [prompts.answer(int(user), int(end)) for user, end in zip(users, ends, strict=True)]
    scores = rouge(targets, predictor.write(params, task, prompts, users, ends))
    return [Found(Measured(users, ends, scores))]


MEASURES: dict[str, Callable[..., list[Found]]] = {
    "next_item": measure_next_item,
    "favorite": measure_favorite,
    "favorite_future": measure_favorite,
    "review": measure_review,
}
