"""The time left of a run, by hand."""

from user_llm.training.pace import Pace


def test_the_time_left_is_by_work_and_not_by_steps():
    """A phase of 10 units and one of 30: after 5 units in 7 s, 35 are left, and take 49 s; after 20 in 26 s, 20 take 26."""
    now = [100.0]
    pace = Pace({"encoder": 10.0, "user_llm": 30.0}, clock=lambda: now[0])
    assert pace.seconds_left() is None
    now[0] = 107.0
    pace.reach("encoder", 0.5)
    assert pace.seconds_left() == 49.0
    now[0] = 126.0
    pace.reach("encoder", 1.0)
    pace.reach("user_llm", 1 / 3)
    assert round(pace.seconds_left(), 9) == 26.0
    pace.reach("user_llm", 1.0)
    assert pace.seconds_left() == 0.0


def test_what_an_earlier_run_has_done_took_none_of_this_ones_time():
    """Of 10 units 10, and of 30 units 15 were there before: 5 units in 20 s leave 10 units, which take 40 s."""
    now = [0.0]
    pace = Pace({"encoder": 10.0, "user_llm": 30.0}, clock=lambda: now[0])
    pace.resume("encoder", 1.0)
    pace.resume("user_llm", 0.5)
    assert pace.seconds_left() is None
    now[0] = 20.0
    pace.reach("user_llm", 2 / 3)
    assert round(pace.seconds_left(), 9) == 40.0
