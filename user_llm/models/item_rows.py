"""The rows of a model's items: which parameters hold them, and the same model with rows for more items.

The number of rows is part of the shape of every compiled program that scores items. Rows are therefore added many at a time.

Axis letters: V rows of the item table, D width of an item's vector, X features of an item, n further items.
"""

import dataclasses

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from user_llm.common import trees
from user_llm.common.mesh import fetch
from user_llm.common.trees import Params
from user_llm.data.schema import Schema
from user_llm.data.timelines import Catalogue
from user_llm.models.encoder import item_features
from user_llm.models.user_encoder import UserEncoderConfig, padded_rows
from user_llm.models.user_llm import UserLLM, UserLLMConfig

TOWER = "encoder/tower/catalogue"  # of an encoder with an item tower: the features of each item


def table_path(config: UserLLMConfig) -> str:
    """Return the path of the parameter that has a row for each item.

    Raises:
      ValueError: the encoder is not one of ours, and nothing says where its items are.
    """
    if config.encoder is None:
        return "items"
    if not isinstance(config.encoder, UserEncoderConfig):
        raise ValueError(f"The encoder {config.encoder.kind} is not one of this package: no items can be added to it.")
    return "encoder/item"


def resized(config: UserLLMConfig, items: int) -> UserLLMConfig:
    """Return the sizes of the same model with more items than it was trained with."""
    encoder = config.encoder
    if isinstance(encoder, UserEncoderConfig):
        encoder = dataclasses.replace(
            encoder, schema=encoder.schema.with_items(items), trained_items=encoder.trained_items or config.num_items
        )
    return dataclasses.replace(config, encoder=encoder, table_rows=padded_rows(items + 1), num_items=items)


def roomy(config: UserLLMConfig, items: int) -> UserLLMConfig:
    """Return the sizes of the same model with room for so many items.

    If the rows are enough, their number stays. Otherwise there are an eighth more than needed. In both cases `num_items` becomes the number
    of rows - 1: rows that hold no item yet count as items too, and the caller must leave them out of rankings.
    """
    if items <= config.num_items:
        return config
    rows = items + 1 if items < config.table_rows else items + items // 8 + 1
    return resized(config, padded_rows(rows) - 1)


def abstract(config: UserLLMConfig) -> tuple[nnx.GraphDef, Params]:
    """Return the structure of a model and the shapes of its parameters."""
    return trees.abstract(lambda: UserLLM(config, rngs=nnx.Rngs(params=0)))


def with_rows(
    config: UserLLMConfig, params: Params, first: int, vectors: Float[np.ndarray, "n D"], features: Int[np.ndarray, "n X"]
) -> Params:
    """Return the parameters of a model with rows for further items.

    Args:
      config: the sizes of the result.
      params: the parameters of the model before; they have at most as many rows.
      first: the number of the first further item. Rows from there on are replaced.
      vectors, features: a row for each further item.
    """
    path = table_path(config)
    flat, fresh = trees.flatten(params), {path: vectors}
    if TOWER in flat:
        fresh[TOWER] = features
    for name, rows in fresh.items():
        old = fetch(flat[name])
        table = np.zeros((config.table_rows, old.shape[1]), old.dtype)
        table[:first] = old[:first]
        table[first : first + len(rows)] = rows
        flat[name] = jax.make_array_from_callback(table.shape, flat[name].sharding, table.__getitem__)
    return trees.unflatten(flat)


def features_of(schema: Schema | None, catalogue: Catalogue, first: int = 0) -> Int[np.ndarray, "n X"]:
    """Return the features of the items from number `first` on, as an item tower reads them.

    Args:
      schema: the features of an event; None for items that have nothing but their numbers.
    """
    numbers = np.arange(first, len(catalogue.keys), dtype=np.int32)[:, None]
    bags = [catalogue.multi[feature.name][first:] for feature in item_features(schema).features[1:]] if schema else []
    return np.concatenate([numbers, *bags], axis=1, dtype=np.int32)
