"""What an audit counts, and that every planted defect stops it."""

import dataclasses
import json

import numpy as np
import pytest

from user_llm.data import audits, movielens
from user_llm.data.audits import audit
from user_llm.data.prepare import load
from user_llm.data.splits import Split, global_time, leave_last_out, make_split


def test_facts_by_hand(make_timelines):
    timelines = make_timelines([[1, 2, 3, 4], [2, 3, 5], [1, 2, 6]], [[1, 1, 2, 2], [1, 2, 3], [7, 8, 8]], num_items=9)
    facts = audit(timelines, leave_last_out(timelines))
    assert facts["users"] == 3
    assert (facts["items"], facts["items_of_dropped_users"]) == (9, 3)  # 7, 8, 9
    assert facts["events"] == 10
    assert facts["train_events"] == 4  # items 1, 2, 2, 1
    assert facts["validation_users"] == facts["test_users"] == 3
    assert (facts["shortest"], facts["length_q50"], facts["longest"]) == (3, 3, 4)
    assert facts["cold_test_share"] == 1
    assert facts["tie_share"] == pytest.approx(3 / 7)
    assert facts["tied_at_test_share"] == pytest.approx(2 / 3)
    assert facts["users_52"] == facts["windows_52"] == 0


def test_known_test_items_are_not_cold(make_timelines):
    timelines = make_timelines([[1, 2, 3, 4], [4, 3, 2, 9]])
    facts = audit(timelines, leave_last_out(timelines))
    assert facts["cold_test_share"] == 0.5
    assert facts["tie_share"] == 0


def test_windows_by_the_papers_threshold(make_timelines):
    timelines = make_timelines([list(range(1, n + 1)) for n in (51, 52, 60)])
    facts = audit(timelines, leave_last_out(timelines))
    assert facts["users_52"] == 2
    assert facts["windows_52"] == 8


@pytest.fixture
def toy(make_timelines):
    return make_timelines([[1, 2, 3, 4], [2, 3, 5, 1]])


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_target_seen_in_training_is_a_leak(toy, part):
    split = leave_last_out(toy)
    users, positions = split.targets[part]
    stop = split.train_stop.copy()
    stop[1] = positions[1] + 1
    with pytest.raises(ValueError, match=r"toy: the \w+ target of user u1 lies within its training events"):
        audit(toy, dataclasses.replace(split, train_stop=stop))
    moved = {**split.targets, part: (users, positions - 2)}
    with pytest.raises(ValueError, match=f"the {part} target of user u0"):
        audit(toy, dataclasses.replace(split, targets=moved))


def test_a_target_beyond_its_timeline_is_refused(toy):
    split = leave_last_out(toy)
    beyond = Split("bad", split.train_stop, {**split.targets, "validation": (np.array([0]), np.array([4]))})
    with pytest.raises(ValueError, match="validation target lies outside"):
        audit(toy, beyond)


def test_an_event_in_validation_and_test_is_refused(toy):
    split = leave_last_out(toy)
    test = split.targets["test"]
    same = dataclasses.replace(split, targets={"validation": (test[0][1:], test[1][1:]), "test": test})
    with pytest.raises(ValueError, match=r"a target of user u1 is in validation and test \(1 such"):
        audit(toy, same)


def test_a_cut_at_another_time_for_one_user_is_a_leak(make_timelines):
    """Its own targets stay behind its training events, but these are of the time of the others' targets."""
    timelines = make_timelines([[1, 2, 3, 4]] * 3, [[1, 2, 8, 10], [1, 3, 8, 9], [2, 7, 9, 10]])
    split = global_time(timelines, validation=0.5, test=0.75)
    audit(timelines, split)
    assert split.train_stop[2] == 2
    stop = split.train_stop.copy()
    stop[2] = 3
    targets = {part: (users[users < 2], positions[users < 2]) for part, (users, positions) in split.targets.items()}
    with pytest.raises(ValueError, match=r"toy: user u2 has training events that are not older .* \(1 such events\)"):
        audit(timelines, dataclasses.replace(split, train_stop=stop, targets=targets))


def test_empty_timelines_are_refused(make_timelines):
    timelines = make_timelines([[1, 2, 3], [], [4, 5, 6]])
    with pytest.raises(ValueError, match="timeline of user u1 is empty"):
        audit(timelines, leave_last_out(timelines))
    nobody = dataclasses.replace(timelines, user_keys=[], offsets=np.zeros(1, int), item=timelines.item[:0])
    with pytest.raises(ValueError, match="timeline of every user is empty"):
        audit(nobody, leave_last_out(nobody))


@pytest.mark.parametrize("wrong", [-1, 0, 6])
def test_item_ids_out_of_range_are_refused(toy, wrong):
    item = toy.item.copy()
    item[5] = wrong
    with pytest.raises(ValueError, match=r"event 1 of user u1 has an id of item outside 1\.\.5 \(1 such"):
        audit(dataclasses.replace(toy, item=item), leave_last_out(toy))


@pytest.mark.parametrize("wrong", [0, 11])
def test_feature_ids_out_of_range_are_refused(toy, wrong):
    rating = toy.columns["rating"].copy()
    rating[3] = wrong
    bad = dataclasses.replace(toy, columns={**toy.columns, "rating": rating})
    with pytest.raises(ValueError, match=r"event 3 of user u0 has an id of rating outside 1\.\.10"):
        audit(bad, leave_last_out(toy))


def test_wrong_order_is_refused(make_timelines):
    timelines = make_timelines([[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [3, 5, 4]])
    with pytest.raises(ValueError, match="event 2 of user u1 is older"):
        audit(timelines, leave_last_out(timelines))


def test_users_may_start_earlier_than_the_user_before(make_timelines):
    timelines = make_timelines([[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [1, 2, 3]])
    audit(timelines, leave_last_out(timelines))


def test_duplicates_are_refused_also_where_another_event_lies_between(make_timelines):
    timelines = make_timelines([[1, 2, 3], [4, 5, 4, 6]], [[7, 8, 9], [3, 3, 3, 5]])
    with pytest.raises(ValueError, match=r"user u1 has the event 'Film 4 \(2000\)' twice \(1 such"):
        audit(timelines, leave_last_out(timelines))


def test_the_same_item_at_another_time_or_of_another_user_is_no_duplicate(make_timelines):
    timelines = make_timelines([[1, 2, 1], [1, 5, 6]], [[7, 8, 9], [9, 9, 10]])
    audit(timelines, leave_last_out(timelines))


def test_without_times_a_repeat_in_a_row_is_a_duplicate(make_timelines):
    def timeless(items):
        timelines = make_timelines(items).select(("item", "genres"))
        return dataclasses.replace(timelines, columns={})

    good = timeless([[1, 2, 1], [1, 5, 6]])
    assert "tie_share" not in audit(good, leave_last_out(good))
    bad = timeless([[1, 2, 3], [5, 5, 6]])
    with pytest.raises(ValueError, match="user u1 has the event"):
        audit(bad, leave_last_out(bad))


@pytest.fixture
def stored(write_release, tmp_path):
    """Return `open(**protocol)`: the timelines of a tiny release, which are stored once."""
    raw = movielens.find(write_release(tmp_path / "release"), tmp_path)
    return lambda **protocol: load(raw, tmp_path / "prepared", **{"min_events": 1, **protocol})


@pytest.fixture
def computed(monkeypatch):
    """Return a list that grows with each audit that reads events."""
    calls, compute = [], audits._audit
    monkeypatch.setattr(audits, "_audit", lambda *args: calls.append(args) or compute(*args))
    return calls


def test_a_second_start_takes_the_audit_of_the_same_data_and_split(stored, computed, monkeypatch):
    first = audit(stored(), leave_last_out(stored()))
    assert audit(stored(), leave_last_out(stored())) == first and len(computed) == 1
    monkeypatch.setattr(audits, "VERSION", audits.VERSION + 1)
    assert audit(stored(), leave_last_out(stored())) == first and len(computed) == 2


@pytest.mark.parametrize("change", ["split", "withhold", "target", "seed", "min_events", "data", "copy"])
def test_no_audit_of_anything_else_is_taken(stored, computed, write_release, tmp_path, change):
    timelines = stored()
    split = leave_last_out(timelines)
    audit(timelines, split)
    if change == "split":
        split = global_time(timelines, validation=0.3, test=0.6)
    elif change == "withhold":
        split = make_split(timelines, "leave_last_out", withhold=0.9)
    elif change == "target":
        split = dataclasses.replace(split, targets={**split.targets, "test": (np.array([0]), np.array([2]))})
    elif change in ("seed", "min_events"):
        timelines = stored(**{change: 4})
        split = leave_last_out(timelines)
    elif change == "data":
        ratings = [(4, movie, 3, time) for time, movie in enumerate((2, 3, 7, 40))]
        timelines = load(movielens.find(write_release(tmp_path / "release", ratings=ratings), tmp_path), tmp_path / "prepared")
        split = leave_last_out(timelines)
    else:
        timelines = dataclasses.replace(timelines, item=np.asarray(timelines.item) + 90)
        with pytest.raises(ValueError, match="outside"):
            audit(timelines, split)
        return
    assert audit(timelines, split) == audits._audit(timelines, split)
    assert len(computed) == 3  # two of them here


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff", b"[" * 100_000, "changed", "cut", "foreign"], ids=lambda c: str(c)[:9]
)
def test_a_kept_audit_that_is_damaged_or_of_other_data_is_computed_again(stored, computed, content):
    timelines = stored()
    facts = audit(timelines, leave_last_out(timelines))
    (path,) = timelines.origin.folder.glob("audit-*.json")
    sound = path.read_bytes()
    if content == "foreign":
        audit(timelines, make_split(timelines, "leave_last_out", withhold=0.9))
        (other,) = set(timelines.origin.folder.glob("audit-*.json")) - {path}
        content = other.read_bytes()
    elif content == "changed":
        content = json.dumps(json.loads(sound) | {"facts": facts | {"users": 3}}).encode()
    elif content == "cut":
        content = sound[:-5]
    path.write_bytes(content)
    before = len(computed)
    assert audit(timelines, leave_last_out(timelines)) == facts and len(computed) == before + 1
    assert path.read_bytes() == sound


def test_a_folder_that_keeps_nothing_is_no_error(stored, computed, monkeypatch):
    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr(audits, "whole", refuse)
    timelines = stored()
    assert audit(timelines, leave_last_out(timelines)) == audit(timelines, leave_last_out(timelines))
    assert len(computed) == 2 and not [*timelines.origin.folder.glob("audit-*")]


def test_facts_of_the_real_union_set(data_dir, tmp_path):
    timelines = load(movielens.find(data_dir / "movielens" / "ml-latest-union", tmp_path), tmp_path)
    facts = audit(timelines, leave_last_out(timelines))
    assert timelines.name == "ml-latest-union"
    assert (facts["events"], facts["users"], facts["items"]) == (297_710, 1_972, 13_004)
    assert (facts["shortest"], facts["longest"]) == (20, 2_698)
    assert [facts[f"length_q{q}"] for q in (25, 50, 75)] == [35, 69.5, 162.25]
    assert facts["tie_share"] == pytest.approx(0.197, abs=0.001)
    assert facts["cold_test_share"] == pytest.approx(0.016, abs=0.001)
    audit(timelines, global_time(timelines))
