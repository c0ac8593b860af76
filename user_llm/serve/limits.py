"""What a server allows at most."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of a server.

    Attributes:
      rows: the number of texts that are written at the same time.
      context: the most tokens of a prompt and its answer together, a soft prompt included.
      queue: the most requests that wait for a row, and the most questions (encodings, recommendations) that wait for an answer.
      batch: the most users that are encoded, or recommended to, in one call of the model.
      seconds: the time after which a request is given up.
      body_bytes: the largest body of a request.
      bodies_bytes: the most bytes of the bodies of all requests that have not been answered yet. A body that says how large it is
        takes its room before it comes.
      small_body_bytes: the size up to which a body is read even where those bytes are taken.
      body_seconds: the time in which a body must come, so that a slow one gives its room back.
      events: the most events of one request, and the most items of one request to `/v1/items`.
      user_events: the most events of one user; further ones are refused. What a request for a user costs grows with the user's events.
      event_bytes: the most bytes of an event, or of an added item, as JSON.
      k: the most items of one answer.
      items: the most items that may be added to the model's own.
      cached: the number of users whose states are kept in memory, besides the store.

    Raises:
      ValueError: a limit is below 1, or `bodies_bytes` is below `body_bytes`.
    """

    rows: int = 8
    context: int = 1024
    queue: int = 64
    batch: int = 8
    seconds: float = 120.0
    body_bytes: int = 8 << 20
    bodies_bytes: int = 64 << 20
    small_body_bytes: int = 64 << 10
    body_seconds: float = 20.0
    events: int = 10_000
    user_events: int = 50_000
    event_bytes: int = 64 << 10
    k: int = 1000
    items: int = 1_000_000
    cached: int = 10_000

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"The limit {name}={value} must be at least 1.")
        if self.bodies_bytes < self.body_bytes:
            raise ValueError(f"The limit bodies_bytes={self.bodies_bytes} must be at least body_bytes={self.body_bytes}.")
