"""What a server measures, in the format of Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from user_llm.serve.store import Counts

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        of = self.registry = CollectorRegistry()
        self.requests = Counter("user_llm_requests", "Requests that were answered.", ["route", "status"], registry=of)
        self.seconds = Histogram("user_llm_request_seconds", "Seconds of a request.", ["route"], buckets=SECONDS, registry=of)
        self.first = Histogram(
            "user_llm_time_to_first_token_seconds", "Seconds until a text begins.", buckets=SECONDS, registry=of
        )
        self.refused = Counter("user_llm_refused", "Requests that were refused since the queue was full.", registry=of)
        self.tokens = Counter("user_llm_tokens", "Tokens that were written.", registry=of)
        self.step = Histogram("user_llm_step_seconds", "Seconds of a step of all rows.", buckets=SECONDS, registry=of)
        self.batch = Histogram(
            "user_llm_questions_batch", "Questions that were answered together.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=of
        )
        self.encodings = Counter("user_llm_encodings", "States that were computed from events.", registry=of)
        self.queue = Gauge("user_llm_queue", "Requests that wait for a row.", registry=of)
        self.rows = Gauge("user_llm_rows_in_use", "Rows in which a text is written.", registry=of)
        self.store = Gauge(
            "user_llm_store", "What the store holds; missing where the store does not answer.", ["what"], registry=of
        )
        self.store_up = Gauge("user_llm_store_up", "1 where the store answers, 0 where it does not.", registry=of)

    def observe(self, name: str, value: float) -> None:
        """Take what an `Engine` measures."""
        match name:
            case "tokens":
                self.tokens.inc(value)
            case "step":
                self.step.observe(value)
            case "batch":
                self.batch.observe(value)

    def stored(self, counts: Counts | None) -> None:
        """Take what the store holds; None where it does not answer."""
        self.store_up.set(counts is not None)
        self.store.clear()  # numbers of before would look like numbers of now
        for what, count in ({} if counts is None else counts._asdict()).items():
            self.store.labels(what).set(count)

    def text(self) -> bytes:
        """Return all metrics as text."""
        return generate_latest(self.registry)
