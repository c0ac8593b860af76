"""Stored users as the arrays that a predictor takes.

Batches have one of few sizes and histories one of few lengths, because each shape compiles a program of its own.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from user_llm.common import mesh as meshes
from user_llm.data.pipeline import length_batches
from user_llm.models import user as decoder_users
from user_llm.models.user_llm import UserTokens
from user_llm.serving.predictor import Predictor
from user_llm.serving.user import User


def rows(predictor: Predictor, count: int) -> int:
    """Return the number of rows of a batch for `count` users: the next power of 2, but at most the model's batch size."""
    return min(1 << max(count - 1, 0).bit_length(), predictor.batch_size)


def read_events(predictor: Predictor, user: User) -> int:
    """Return how many of a user's events the encoder reads; they are the latest ones."""
    return min(len(user.events), max(predictor.max_events, 1))


def histories(
    predictor: Predictor, those: Sequence[User], padded: int
) -> tuple[Int[np.ndarray, "B E A"], Int[np.ndarray, " B"]]:
    """Return the events that the encoder reads, one row a user, and the number of real events in each row.

    Args:
      padded: the number of events to which each row is right-padded with zeros.
    """
    lengths = np.array([read_events(predictor, user) for user in those], np.int64)
    events = np.zeros((len(those), padded, those[0].events.shape[1]), np.int32)
    for row, user in enumerate(those):
        events[row, : lengths[row]] = user.events[len(user.events) - lengths[row] :]
    return events, lengths


def present(predictor: Predictor, those: Sequence[User | None]) -> decoder_users.User | None:
    """Return what the decoder reads of users; None for a model without an encoder.

    Args:
      those: the user of each row. A row without a user (None) gives the decoder nothing to read, as a user without events does.
    """
    encoder = predictor.config.encoder
    if encoder is None:
        return None
    counts = np.array([0 if user is None else len(user.tokens) for user in those], np.int32)
    each = predictor.bucket
    most = predictor.config.num_tokens or int(-(-max(counts.max(), 1) // each) * each)
    tokens = np.zeros((len(those), most, encoder.width), np.float32)
    for row, user in enumerate(those):
        if user is not None and len(user.tokens):
            tokens[row, : counts[row]] = user.tokens
    return predictor.present(UserTokens(*meshes.put_rows((tokens, counts), predictor.mesh)))


def batches(
    predictor: Predictor, those: Sequence[User]
) -> Iterator[tuple[Int[np.ndarray, " n"], list[User], decoder_users.User | None]]:
    """Yield users in batches of users with similar numbers of user tokens.

    Yields:
      The places of a batch's users in `those`; the users, with the last one repeated until the batch is full; and what the decoder
      reads of them.
    """
    lengths = np.array([len(user.tokens) for user in those], np.int64)
    for indices, numbers, _ in length_batches(lengths, rows(predictor, len(those))):
        chosen = [those[number] for number in numbers]
        yield indices, chosen, present(predictor, chosen)
