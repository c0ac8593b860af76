"""How a User-LLM answers batches of prompts for users. Evaluation inside a run and use outside it both go this way.

    events -> user tokens -> what the decoder reads of users ┐
    prompts ----------------------------------------------------> scores of all items | the likeliest of given texts | a new text

A `Predictor` holds parameters and sizes. It holds no dataset: the caller gives it events and prompts. Histories and prompts are
padded to one of few lengths, so that few programs are compiled.

Axis letters: B rows of a batch, E events, A features of an event, T tokens, V items of the catalogue, D width of the decoder,
X tokens of the text and the soft prompt together.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from user_llm.common import mesh as meshes
from user_llm.common import trees
from user_llm.common.arrays import AnyArray
from user_llm.common.trees import Params
from user_llm.data.pipeline import BUCKET
from user_llm.data.prompts.base import Ids, Template, pad_rows
from user_llm.data.prompts.next_item import NextItem
from user_llm.models.beam_search import beam_search
from user_llm.models.generate import Program, abstract_programs, generate
from user_llm.models.prefill import bucket
from user_llm.models.score import score
from user_llm.models.transitions import Transitions
from user_llm.models.trie import Trie
from user_llm.models.user import User, embed_prompts
from user_llm.models.user_llm import UserLLMConfig, UserTokens
from user_llm.nn.cross_attention import UserKV

Decoding = tuple[nnx.GraphDef, Params]
F = TypeVar("F", bound=Callable[..., Any])


@functools.partial(jax.jit, static_argnums=0)
def encode_users(graphdef: nnx.GraphDef, params: Params, events: Int[Array, "B E A"], lengths: Int[Array, " B"]) -> UserTokens:
    """Return the user tokens of right-padded histories; `lengths` counts the real events of each."""
    model = trees.merge(graphdef, params)
    return model.user_tokens(model.encode(events, lengths[:, None]))


@functools.partial(jax.jit, static_argnums=0)
def present_users(graphdef: nnx.GraphDef, params: Params, tokens: UserTokens) -> User:
    """Return what the decoder reads of users: keys and values for cross-attention, a soft prompt, or both."""
    return trees.merge(graphdef, params).from_tokens(tokens)


@functools.partial(jax.jit, static_argnums=0)
def score_catalogue(
    graphdef: nnx.GraphDef, params: Params, text: Array, lengths: Array, user: User | None = None, leading: int = 0
) -> Float[Array, "B V"]:
    """Return the item head's scores of all items at the last token of each right-padded prompt.

    Args:
      leading: the number of a prompt's tokens that stand before the soft prompt.
    """
    model = trees.merge(graphdef, params)
    hidden = model.hidden(text, lengths, user=user, leading=leading)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return model.score(model.item_query(last, user and user.query))


@functools.partial(jax.jit, static_argnums=0)
def attended_events(
    graphdef: nnx.GraphDef, params: Params, events: Int[Array, "B E A"], lengths: Int[Array, " B"]
) -> Float[Array, "B E"]:
    """Return the attention of the user tokens to each event of right-padded histories, averaged over the user tokens."""
    model = trees.merge(graphdef, params)
    return model.attended(model.encode(events, lengths[:, None]))


def on_mesh(method: F) -> F:
    """Return a method that runs on the devices of the mesh of its object's `predictor`."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **settings: Any) -> Any:
        with jax.set_mesh(self.predictor.mesh):
            return method(self, *args, **settings)

    return run  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A User-LLM that answers.

    Attributes:
      config: the sizes of the model.
      graphdef, params: the structure and the parameters of a `UserLLM`.
      mesh: the devices that the parameters are on.
      templates: how each task is asked, by the task's name.
      max_events: how many of a history's latest events the encoder reads; 0 for a model without an encoder.
      batch_size: the number of users that are answered together.
      beams: the width of the beam search for the likeliest of given texts; at most the number of these texts.
      after_instruction: whether a soft prompt stands after the tokens that all prompts of a task start with; otherwise it stands
        before them.
      trie_softmax: whether a title is written by choosing each token among those that the catalogue's titles go on with; otherwise among all
        tokens.
      ranks: whether the item head has been trained to rank items. Without it the next item is found by writing titles.
      pad_whole: whether every history is padded to `max_events` and every prompt to its task's `max_tokens`. One program then
        serves every batch, which pays on accelerators, where compiling takes longer than computing the padding. Otherwise lengths
        are rounded up to one of several.
      transitions: what the item head's scores are added to where items are ranked; None where they rank alone.
    """

    config: UserLLMConfig
    graphdef: nnx.GraphDef
    params: Params
    mesh: Mesh
    templates: Mapping[str, Template]
    max_events: int
    batch_size: int
    beams: int = 10
    after_instruction: bool = True
    ranks: bool = True
    trie_softmax: bool = False
    pad_whole: bool = False
    transitions: Transitions | None = None

    def of(self, params: Params) -> "Predictor":
        """Return the same model with other parameters."""
        return dataclasses.replace(self, params=params)

    @property
    def bucket(self) -> int:
        """The number of events that the padded length of a history is a multiple of."""
        return max(self.max_events, 1) if self.pad_whole else BUCKET

    def leading(self, task: str) -> int:
        """Return how many tokens of a task's prompts stand before a soft prompt."""
        return self.templates[task].shared_tokens if self.after_instruction else 0

    def encode(self, events: Int[np.ndarray, "B E A"], lengths: Int[np.ndarray, " B"]) -> UserTokens | None:
        """Return the user tokens of right-padded histories; None if the model has no encoder."""
        if not self.max_events:
            return None
        return encode_users(self.graphdef, self.params, *meshes.put_rows((events, lengths), self.mesh))

    def present(self, tokens: UserTokens | None) -> User | None:
        """Return what the decoder reads of users, made from their user tokens; None for None."""
        return None if tokens is None else present_users(self.graphdef, self.params, tokens)

    def users(self, events: Int[np.ndarray, "B E A"], lengths: Int[np.ndarray, " B"]) -> User | None:
        """Return what the decoder reads of users with these histories; None if the model has no encoder."""
        return self.present(self.encode(events, lengths))

    def attended(self, events: Int[np.ndarray, "B E A"], lengths: Int[np.ndarray, " B"]) -> Float[np.ndarray, "B E"]:
        """Return the attention of each history's user tokens to each of its events.

        Raises:
          ValueError: the model has no resampler.
        """
        return meshes.fetch(attended_events(self.graphdef, self.params, *meshes.put_rows((events, lengths), self.mesh)))

    def most_soft_tokens(self) -> int:
        """Return the most tokens of a user's soft prompt; 0 for a model without one."""
        if not self.config.soft_prompt:
            return 0
        return self.max_events if self.config.num_tokens is None else self.config.num_tokens

    def padded(self, task: str, prompts: Sequence[Ids]) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
        """Return a task's prompts right-padded to one of few widths, and the number of tokens of each prompt."""
        template = self.templates[task]
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        longest, alike = int(lengths.max()), not template.lines.text_items and lengths.min() == lengths.max()
        most = max(template.max_tokens, longest)
        width = longest if alike else most if self.pad_whole else min(most, bucket(longest))
        return meshes.put_rows((pad_rows(prompts, width), lengths), self.mesh)

    def score(self, task: str, prompts: Sequence[Ids], user: User | None) -> Float[Array, "B V"]:
        """Return the item head's score of every item after each prompt of a task.

        Raises:
          ValueError: a prompt that, with its user's soft prompt, is longer than the decoder is read for.
        """
        text, lengths = self.padded(task, prompts)
        soft = 0 if user is None or user.prompt is None else meshes.fetch(user.prompt.lengths)
        self.config.decoder.check_length(int((meshes.fetch(lengths) + soft).max()))
        return score_catalogue(self.graphdef, self.params, text, lengths, user, self.leading(task))

    def ranked(
        self, task: str, prompts: Sequence[Ids], user: User | None, last: Int[np.ndarray, "B 2"]
    ) -> Float[np.ndarray, "B V"]:
        """Return the scores by which items are ranked: those of the item head, to which the transitions are added if there are any.

        Args:
          last: each user's last item and the one before; see `Transitions.scores`.
        """
        scores = meshes.fetch(self.score(task, prompts, user))
        return scores if self.transitions is None else self.transitions.sums(scores, last, [self.transitions.weight])[0]

    def decoding(
        self, text: Int[Array, "B T"], lengths: Int[Array, " B"], user: User | None, leading: int
    ) -> tuple[Decoding, Float[Array, "B X D"], Int[Array, " B"], UserKV | None]:
        """Return what generation starts from.

        Returns:
          The decoder; the prompts as right-padded embeddings, soft prompts included; the length of each; and the keys and values
          of the users for cross-attention, None for a model without it.
        """
        decoder = trees.split(trees.merge(self.graphdef, self.params).decoder)
        inputs, sizes = embed_prompts(*decoder, text, lengths, user=user, leading=leading)
        return decoder, inputs, sizes, user and user.kv

    def choose(
        self,
        task: str,
        prompts: Sequence[Ids],
        user: User | None,
        trie: Trie,
        beams: int,
        guide: Float[AnyArray, "#B V"] | None = None,
        weight: float = 0.0,
    ) -> tuple[Int[np.ndarray, "B beams"], Float[np.ndarray, "B beams"]]:
        """Return the likeliest texts of a trie after each prompt, best first.

        Args:
          guide, weight: of the beam search; see `models/beam_search.py`.

        Returns:
          The ids of the texts and their scores, which are log-probabilities at a weight of 0. Where fewer than `beams` texts are found,
          the rest has id 0 and -inf.

        Raises:
          ValueError: a prompt that, with its user's soft prompt and the longest text, is longer than the decoder is read for.
        """
        trie_softmax = self.trie_softmax and isinstance(self.templates[task], NextItem)
        decoder, inputs, sizes, kv = self.decoding(*self.padded(task, prompts), user, self.leading(task))
        self.config.decoder.check_length(int(meshes.fetch(sizes).max()) + trie.depth - 1)  # the last token is not read
        return meshes.fetch(
            beam_search(
                *decoder, inputs, sizes, trie, beams=beams, user=kv, trie_softmax=trie_softmax, guide=guide, weight=weight
            )
        )

    def likelihood(self, task: str, prompts: Sequence[Ids], user: User | None, texts: Sequence[Ids]) -> Float[np.ndarray, " B"]:
        """Return the log-probability of a text after each prompt, in nats: the sum over its tokens."""
        decoder, inputs, sizes, kv = self.decoding(*self.padded(task, prompts), user, self.leading(task))
        lengths = meshes.fetch(sizes).tolist()
        return score(*decoder, inputs, [[text.tolist()] for text in texts], lengths=lengths, user=kv)[:, 0]

    def write(self, task: str, prompts: Sequence[Ids], user: User | None, max_tokens: int) -> list[str]:
        """Return an answer of one line to each prompt. Each token is the likeliest one."""
        lines = self.templates[task].lines
        decoder, inputs, sizes, kv = self.decoding(*self.padded(task, prompts), user, self.leading(task))
        found = generate(
            *decoder, inputs, lengths=meshes.fetch(sizes).tolist(), max_tokens=max_tokens, stop_ids=[lines.end_id], user=kv
        )
        return [lines.tokenizer.decode(row).strip() for row in found.rows()]

    def programs(self, params: Params) -> dict[str, Program]:
        """Return the programs that answering the longest prompts compiles, by name.

        Only shapes are needed, no parameters. Beam search is left out, because its program depends on the catalogue's titles.
        """
        rows, user = self.batch_size, None
        ints = lambda *shape: meshes.rows_like(jax.ShapeDtypeStruct(shape, jnp.int32), self.mesh)  # noqa: E731
        found: dict[str, Program] = {}
        lengths = ints(rows)
        if self.config.encoder is not None:
            events = ints(rows, self.max_events, self.config.encoder.schema.width)
            found["encode"] = encode_users, (self.graphdef, params, events, lengths)
            tokens = jax.eval_shape(functools.partial(encode_users, self.graphdef), params, events, lengths)
            tokens = meshes.rows_like(tokens, self.mesh)
            found["present"] = present_users, (self.graphdef, params, tokens)
            shapes = jax.eval_shape(functools.partial(present_users, self.graphdef), params, tokens)
            kv = shapes.kv and meshes.rows_like(shapes.kv, self.mesh, axis=1)._replace(
                mask=meshes.rows_like(shapes.kv.mask, self.mesh)
            )
            user = User(kv, *(meshes.rows_like(part, self.mesh) for part in (shapes.prompt, shapes.query)))
        task, template = max(self.templates.items(), key=lambda pair: pair[1].max_tokens)
        text, leading = ints(rows, bucket(template.max_tokens)), self.leading(task)
        found["score"] = score_catalogue, (self.graphdef, params, text, lengths, user, leading)
        graphdef, decoder = trees.split(trees.merge(self.graphdef, params).decoder)
        embed = functools.partial(embed_prompts, graphdef, leading=leading)
        inputs = meshes.rows_like(jax.eval_shape(embed, decoder, text, lengths, user=user)[0], self.mesh)
        return found | abstract_programs(graphdef, decoder, inputs, user and user.kv, bucket(1), self.mesh)
