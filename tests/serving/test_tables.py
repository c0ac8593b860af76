"""Functions of tables, as data engines call them."""

import pickle

import pyarrow as pa
import pytest

from user_llm.serving.tables import RANKINGS, STATES, Encode, Recommend


def test_a_function_of_tables_travels_to_workers(make_model):
    """As the engines send it: pickled, before and after the first call; a table in, a table of its schema out."""
    known = make_model("cross")
    rows = pa.Table.from_pylist(known.rows(1) + known.rows(2))
    for function, schema in ((Encode(str(known.directory)), STATES), (Recommend(str(known.directory), 2), RANKINGS)):
        found = function(rows)
        assert found.schema == schema == function.schema and set(found["user"].to_pylist()) == {"u1", "u2"}
        assert pickle.loads(pickle.dumps(function))(rows).select(["user"]) == found.select(["user"])
        with pytest.raises(TypeError, match="name its directory"):
            pickle.dumps(type(function)(function.model))
        assert function(rows.slice(0, 0)).num_rows == 0
