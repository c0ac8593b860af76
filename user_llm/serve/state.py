"""What the routes of a server share."""

import dataclasses
import time

from user_llm.serve.engine import Engine
from user_llm.serve.items import Items
from user_llm.serve.limits import Limits
from user_llm.serve.metrics import Metrics
from user_llm.serve.states import States
from user_llm.serve.store import Store
from user_llm.serve.users import Users


@dataclasses.dataclass(eq=False)
class State:
    """What the routes of a server share.

    Attributes:
      name: the model's name in OpenAI's API.
      engine: the engine that answers at this moment; another one takes its place when a model is loaded again.
      answer_tokens: the most tokens of an answer in a conversation, where the request names no limit.
      begun: when the server was started, in seconds since 1970.
    """

    name: str
    engine: Engine
    store: Store
    limits: Limits
    metrics: Metrics
    answer_tokens: int = 256
    begun: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.items = Items(self.store, lambda: self.engine, self.limits)
        self.states = States(
            self.store, lambda: self.engine, self.limits.cached, self.metrics.encodings.inc, current=self.items.current
        )
        self.users = Users(self.store, self.states, lambda: self.engine.model.vocabulary, self.limits)
