"""Amazon's reviews as DEP has them: profiles and the review that is written after them."""

import json

import numpy as np
import pytest

from user_llm.data import amazon, prepare
from user_llm.data.splits import leave_last_out


def review(asin, day, rating=5, text=""):
    return {
        "asin": asin,
        "rating": float(rating),
        "title": f"On {asin}",
        "text": text,
        "timestamp": 1_600_000_000_000 + day * 86_400_000,
    }


R = [review(f"B{n}", n, 1 + n % 5, f"text {n}<br />&amp; more") for n in range(6)]
LINES = {
    "train": [{"user_id": "u", "profile": R[:2], "data": R[2]}, {"user_id": "v", "profile": R[1:3], "data": R[4]}],
    "val": [{"user_id": "u", "profile": R[:3], "data": R[3]}],
    "test": [{"user_id": "u", "profile": R[:4], "data": R[5]}],
}
PRODUCTS = [
    {"asin": "B0", "title": "Emma &amp; Co", "description": "A book."},
    {"asin": "B9", "title": "Nobody's", "description": ""},
]


@pytest.fixture
def folder(tmp_path):
    for part, lines in LINES.items():
        write(tmp_path / f"Books_{part}.jsonl", lines)
    write(tmp_path / "Books_meta.jsonl", PRODUCTS)
    return tmp_path


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_events_are_the_reviews_of_all_lines_and_each_counts_once(folder, tmp_path):
    timelines = prepare.load(amazon.find(folder, "Books"), tmp_path / "prepared", min_events=1)
    assert timelines.name == "dep-Books" and timelines.user_keys == ["u", "v"]
    keys = [timelines.catalogue.keys[item] for item in timelines.item]
    assert keys == ["B0", "B1", "B2", "B3", "B5", "B1", "B2", "B4"]
    np.testing.assert_array_equal(timelines.columns["rating"], [1, 2, 3, 4, 1, 2, 3, 5])
    np.testing.assert_array_equal(timelines.columns["timestamp"][:2], [1_600_000_000, 1_600_086_400])
    assert timelines.columns["summary"].tolist()[0] == "On B0"
    assert timelines.columns["review"].tolist()[4] == "text 5 & more"
    titles = dict(zip(timelines.catalogue.keys, timelines.catalogue.titles, strict=True))
    assert titles["B0"] == "Emma & Co" and titles["B1"] == "B1"


def test_the_review_to_write_of_the_test_split_is_the_target(folder, tmp_path):
    timelines = prepare.load(amazon.find(folder, "Books"), tmp_path / "prepared", min_events=1)
    users, ends = leave_last_out(timelines).targets["test"]
    events = timelines.offsets[users] + ends
    assert timelines.columns["review"][events].tolist()[0] == "text 5 & more" and timelines.fields.item == "asin"


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ({"user_id": "u", "data": R[0]}, "no 'profile'"),
        ({"user_id": "u", "profile": "none", "data": R[0]}, "a profile that is no list of reviews, or data that are no review"),
        ({"user_id": "u", "profile": [R[0]], "data": None}, "a profile that is no list of reviews, or data that are no review"),
        ({"profile": [R[0]], "data": R[1]}, "no 'user_id'"),
        ({"user_id": "u", "profile": [R[0] | {"rating": 6}], "data": R[1]}, "rating"),
    ],
)
def test_a_bad_line_is_refused_by_its_number_or_left_out_whole(folder, tmp_path, line, fault):
    write(folder / "Books_val.jsonl", [LINES["val"][0], line])
    with pytest.raises(ValueError, match=r"Books_val\.jsonl, line 2: ") as refused:
        prepare.load(amazon.find(folder, "Books"), tmp_path / "refused", min_events=1)
    assert fault in str(refused.value)
    left = prepare.load(amazon.find(folder, "Books", bad_rows="skip"), tmp_path / "skipped", min_events=1)
    assert len(left.item) == 8


def test_a_category_in_two_forms_is_refused(folder):
    write(folder / "Books.jsonl", [R[0] | {"user_id": "u", "parent_asin": "B0"}])
    with pytest.raises(ValueError, match=r"holds Books\.jsonl and Books_train\.jsonl and "):
        amazon.find(folder, "Books")
