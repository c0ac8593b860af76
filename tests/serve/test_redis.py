"""A store in a real Redis: what its log and its messages say, what is left after a deletion, and what survives a kill."""

import pytest

from user_llm.serve.store import Counts, Event, StoreError, open_store

redis = pytest.importorskip("redis", reason="the extra `redis` is not installed")
from user_llm.serve import redis as redis_store

SAFE = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction", "maxmemory": 0, "requirepass": ""}


@pytest.fixture
def client(redis_url):
    """A client of an empty Redis, whose settings the test may change."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
        yield client
        for name, value in SAFE.items():
            client.config_set(name, value)


def events(*keys: str) -> list[Event]:
    return [Event(key, {"movie": key}) for key in keys]


def test_a_deletion_leaves_no_key_and_no_value(client, redis_url, opened):
    store = opened(redis_url)
    added = store.add({"<ann>": events("<a>", "<b>"), "bob": events("c")})
    store.keep("model", {user: (one.version, b"<state>") for user, one in added.items()})
    store.delete("bob")
    before = everything(client)
    store.delete("<ann>")
    assert b"<ann>" in before and b"<a>" in before and b"<state>" in before
    assert everything(client) == b"user_llm:events0user_llm:states0"


def everything(client) -> bytes:
    """Return all keys and values, joined."""
    read = {b"string": lambda key: [client.get(key)], b"list": lambda key: client.lrange(key, 0, -1), b"set": client.smembers,
            b"hash": lambda key: [word for pair in client.hgetall(key).items() for word in pair]}  # fmt: skip
    return b"".join(b"".join([key, *read[client.type(key)](key)]) for key in sorted(client.scan_iter()))


def test_what_was_acknowledged_survives_a_kill_of_redis(redis_server, tmp_path, opened):
    with redis_server(tmp_path) as url:
        store = opened(url)
        added = store.add({"ann": events("a", "b")})
    with pytest.raises(StoreError, match=f"The store in Redis at {tmp_path}/s failed: ") as lost:
        store.ping()
    assert "\n" not in str(lost.value)
    with redis_server(tmp_path):
        assert store.versions(["ann"]) == {"ann": added["ann"].version}  # the same store connects again
        assert [row["movie"] for row in store.histories(["ann"])["ann"].rows] == ["a", "b"]


def test_many_events_travel_in_several_commands_of_one_transaction(client, redis_url, opened, monkeypatch):
    monkeypatch.setattr(redis_store, "CHUNK", 3)
    store, keys = opened(redis_url), [str(number) for number in range(10)]
    added = store.add({"ann": events(*keys), "bob": [], "eve": events("a")})
    assert {user: one[:2] for user, one in added.items()} == {"ann": (10, 0), "bob": (0, 0), "eve": (1, 0)}
    assert [row["movie"] for row in store.histories(["ann"])["ann"].rows] == keys
    again = store.add({"ann": events(*keys, "10")})["ann"]
    assert again == (1, 10, [], store.versions(["ann"])["ann"]) and again.version.epoch == added["ann"].version.epoch


@pytest.mark.parametrize(
    ("name", "value", "warning"),
    [
        ("appendonly", "no", "may lose events when it stops: set `appendonly yes`"),
        ("appendfsync", "everysec", "may lose the last second's events"),
        ("maxmemory-policy", "allkeys-lru", "may drop events when its memory is full"),
        ("maxmemory-policy", "volatile-lru", ""),
    ],
)
def test_settings_that_lose_events_are_warned_of(client, redis_url, opened, caplog, name, value, warning):
    opened(redis_url)
    assert not caplog.messages
    client.config_set(name, value)
    opened(redis_url)
    assert len(caplog.messages) == bool(warning)
    assert warning in "".join(caplog.messages)


def test_settings_that_may_not_be_read_are_unknown(client, redis_url, opened, caplog):
    client.acl_setuser(
        "app", enabled=True, passwords=["+s3cret"], keys=["user_llm:*"], categories=["+@all"], commands=["-config"]
    )
    store = opened(redis_url.replace("unix://", "unix://app:s3cret@"))
    assert len(caplog.messages) == 1 and "whether it keeps events on disk is unknown" in caplog.messages[0]
    assert "s3cret" not in caplog.text
    assert store.add({"ann": events("a")})["ann"].stored == 1 and store.delete("ann")  # all its keys begin as it says


def test_a_password_is_needed_and_never_shown(client, redis_url, opened):
    client.config_set("requirepass", "s3cret")
    assert opened(redis_url.replace("unix://", "unix://:s3cret@")).counts() == Counts(0, 0, 0)
    for wrong in (redis_url, redis_url.replace("unix://", "unix://:s3cretive@")):
        with pytest.raises(StoreError, match="(?i)auth|password") as refused:
            open_store(wrong)
        assert "s3cret" not in str(refused.value) and "\n" not in str(refused.value)


def test_a_full_redis_is_named_without_the_events_and_still_reads_and_deletes(client, redis_url, opened):
    store = opened(redis_url)
    version = store.add({"ann": events("a")})["ann"].version
    store.keep("model", {"ann": (version, b"state")})
    client.config_set("maxmemory", 1)
    for call in (lambda: store.add({"ann": events("<b>")}), lambda: store.add_items([{"id": "<b>"}])):
        with pytest.raises(StoreError, match="failed: .*maxmemory") as refused:
            call()
        assert "<b" not in str(refused.value) and "\n" not in str(refused.value)
    assert store.histories(["ann"]) == {"ann": (version, [{"movie": "a"}])} and store.versions(["ann"]) == {"ann": version}
    assert store.states(["ann"], "model") == {"ann": b"state"} and store.items() == []
    assert store.counts() == Counts(1, 1, 1)
    assert store.delete("ann") and not store.delete("ann")
    assert store.counts() == Counts(0, 0, 0)


def test_a_message_does_not_quote_the_command_that_failed(client, redis_url, opened):
    store = opened(redis_url)
    client.set("user_llm:states:<ann>", "no hash")
    with pytest.raises(StoreError, match=r"/s failed: WRONGTYPE [^<]*\.$"):
        store.states(["<ann>"], "model")


@pytest.mark.parametrize(
    "url",
    [
        "redis://:s3/cret@host:1/0", "redis://:s3cret@host:99999", "redis://host/s3cret", "unix://", "redis://host?s3cret=1",
        "redis://host:1?socket_timeout=s3cret", "redis://[s3cret",
    ],
)  # fmt: skip
def test_a_url_of_another_form_is_refused_without_its_password(url):
    with pytest.raises(ValueError, match="name it as sqlite:FILE, redis://HOST") as refused:
        open_store(url)
    assert "cret" not in str(refused.value)


def test_a_redis_that_is_not_there_is_named():
    with pytest.raises(StoreError, match="The store in Redis at localhost:1 failed: .*refused") as refused:
        open_store("redis://:s3cret@localhost:1/0")
    assert "s3cret" not in str(refused.value)
