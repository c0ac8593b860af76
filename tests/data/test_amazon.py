"""Amazon Review in its three layouts, and Google Local Review, which is read alike."""

import gzip
import json

import numpy as np
import pytest

from user_llm.data import amazon, google_local, prepare, reviews
from user_llm.data.audits import audit
from user_llm.data.raw import clean
from user_llm.data.splits import leave_last_out

REVIEWS = [  # user, product, rating, seconds, summary, text
    ("A1", "B001", 5, 1_300_000_000, "Five &amp; a half", "It <br /> works"),
    ("A1", "B002", 2, 1_300_086_400, "No", ""),
    ("A1", "B003", 1, 1_300_172_800, "Why", "Broken"),
    ("A2", "B001", 4, 1_300_000_000, "Fine", "Good"),
    ("A2", "B001", 4, 1_300_000_000, "Fine", "Good"),  # twice
    ("A2", "B002", 3, 1_300_000_001, "", "So so"),
    ("A2", "B003", 3, 1_300_000_002, "Hm", "Hm"),
]
PRODUCTS = [("B001", "Kettle &quot;One&quot;", ["Home", "Kitchen"]), ("B002", "<span>Cup</span>", ["Home"])]
OLD = ("reviewerID", "asin", "overall", "unixReviewTime", "summary", "reviewText")
LAYOUTS = {
    "2014": ("reviews_Home_5.json.gz", "meta_Home.json.gz", OLD, lambda path: {"categories": [path, ["Other"]]}, repr, "asin"),
    "2018": ("Home_5.json.gz", "meta_Home.json.gz", OLD, lambda path: {"category": path}, json.dumps, "asin"),
    "2023": (
        "Home.jsonl", "meta_Home.jsonl.gz", ("user_id", "parent_asin", "rating", "timestamp", "title", "text"),
        lambda path: {"categories": path}, json.dumps, "parent_asin",
    ),
}  # fmt: skip


def write(path, rows, form):
    text = "".join(form(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.fixture(params=LAYOUTS)
def release(request, tmp_path):
    """Write a category in a layout; return (folder, reviews file, how a row is written, names)."""
    reviews, products, names, path_of, form, key = LAYOUTS[request.param]
    scale = 1000 if request.param == "2023" else 1
    rows = [dict(zip(names, (u, p, float(r), t * scale, s, x), strict=True)) for u, p, r, t, s, x in REVIEWS]
    write(tmp_path / reviews, rows, form)
    write(tmp_path / products, [{key: p, "title": title, **path_of(path)} for p, title, path in PRODUCTS], form)
    return tmp_path, tmp_path / reviews, form, rows


def test_every_layout_gives_the_same_timelines(release, tmp_path):
    timelines = prepare.load(amazon.find(release[0], "Home"), tmp_path / "prepared")
    assert timelines.name == "amazon-Home"
    assert timelines.user_keys == ["A1", "A2"]
    np.testing.assert_array_equal(timelines.item, [1, 2, 3, 1, 2, 3])
    np.testing.assert_array_equal(timelines.columns["rating"], [5, 2, 1, 4, 3, 3])
    np.testing.assert_array_equal(timelines.columns["timestamp"][:2], [1_300_000_000, 1_300_086_400])
    assert timelines.columns["summary"].tolist() == ["Five & a half", "No", "Why", "Fine", "", "Hm"]
    assert timelines.columns["review"].tolist() == ["It works", "", "Broken", "Good", "So so", "Hm"]
    catalogue = timelines.catalogue
    assert catalogue.titles == ["", 'Kettle "One"', "Cup", "B003"]
    assert catalogue.vocab == {"categories": ["", "Home", "Kitchen"]}
    np.testing.assert_array_equal(catalogue.multi["categories"], [[0, 0], [1, 2], [1, 0], [0, 0]])
    facts = audit(timelines, leave_last_out(timelines))
    assert (facts["duplicates_dropped"], facts["untitled_items"], facts["events"]) == (1, 1, 6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rating": 6.0, "overall": 6.0}, "is no whole number from 1 to 5"),
        ({"timestamp": "soon", "unixReviewTime": "soon"}, "soon"),
        ({"parent_asin": None, "asin": None}, "no (parent_)?asin"),
    ],
)
def test_a_bad_review_is_refused_naming_file_and_line(release, tmp_path, changes, words):
    folder, file, form, rows = release
    rows[2] |= {name: value for name, value in changes.items() if name in rows[2]}
    write(file, rows, form)
    with pytest.raises(ValueError, match=rf"{file.name}, line 3: .*{words}"):
        prepare.load(amazon.find(folder, "Home"), tmp_path / "prepared")


def test_a_line_that_is_cut_off_is_named(release, tmp_path):
    folder, file, form, rows = release
    text = "".join(form(row) + "\n" for row in rows)[:-20].encode()
    file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)
    with pytest.raises(ValueError, match=rf"{file.name}, line 7: .* is no JSON object"):
        prepare.load(amazon.find(folder, "Home"), tmp_path / "prepared")
    if file.suffix == ".gz":
        file.write_bytes(file.read_bytes()[:-30])
        with pytest.raises(ValueError, match=rf"{file.name}, (after )?line .*(cut off|JSON)"):
            prepare.load(amazon.find(folder, "Home"), tmp_path / "prepared")


def test_a_category_that_is_not_there_or_twice_is_refused(release):
    folder, file, *_ = release
    with pytest.raises(ValueError, match="has none of reviews_Books_5.json"):
        amazon.find(folder, "Books")
    (folder / ("Home_5.json" if "reviews" in file.name else "reviews_Home_5.json")).write_text("")
    with pytest.raises(ValueError, match="name the folder and the category"):
        amazon.find(folder, "Home")


def test_pieces_of_pages_are_no_titles(tmp_path):
    reviews, products, names, _, form, _ = LAYOUTS["2018"]
    write(tmp_path / reviews, [dict(zip(names, ("A", "B", 5.0, i, "", ""), strict=True)) for i in range(3)], form)
    write(tmp_path / products, [{"asin": "B", "title": "var aPageStart = 5;", "category": ["x" * 99, "Cups"]}], form)
    catalogue = prepare.load(amazon.find(tmp_path, "Home"), tmp_path / "prepared").catalogue
    assert catalogue.titles[1] == "B" and catalogue.vocab["categories"] == ["", "Cups"]


def test_html_is_cleaned():
    text = "A &lt;b&gt;bold&lt;/b&gt; <script>var x = '<p>';</script>  5 &gt; 3 &amp; 1 < 2<br/>end"
    assert clean(text) == "A bold 5 > 3 & 1 < 2 end"
    assert clean(None) == ""


LINES = {  # of reviews of 2018, and whether they can be read at once
    "plain": ([{}, {"summary": None, "overall": 5}, {"reviewText": "ünïcode", "other": [{"a": None}]}], True),
    "white space": ([{"summary": f"a{space}b{space}"} for space in filter(str.isspace, map(chr, range(0x3001)))], True),
    "html": ([{"summary": "<b>a</b> &amp; b", "reviewText": "<script>x</script> y"}, {"summary": ""}], True),
    "times": ([{"unixReviewTime": time} for time in (-1, 0, 10**11, -(10**11))], True),
    "numbers as text": ([{"overall": "5"}], False),
    "text first": ([{"summary": 1.50}, {"summary": "1.50"}], False),
    "ids as numbers": ([{"reviewerID": "7"}, {"reviewerID": 7}, {"asin": 7.10}], False),
    "times with decimals": ([{"unixReviewTime": 5.0}, {"unixReviewTime": "6"}], False),
}


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("kind", LINES)
def test_many_lines_at_once_mean_what_each_means(tmp_path, monkeypatch, kind, ending):
    names, (changes, at_once) = LAYOUTS["2018"][2], LINES[kind]
    rows = [dict(zip(names, ("A", "B", 5.0, 1, "s", "t"), strict=True)) | change for change in changes]
    (tmp_path / "Home_5.json").write_bytes("".join(json.dumps(row) + ending for row in rows).encode())
    raw = amazon.find(tmp_path, "Home")
    found = [batch.to_pylist() for batch in raw.events()]
    lines = (tmp_path / "Home_5.json").read_bytes().splitlines(keepends=True)
    assert (reviews._columns(lines, amazon.LAYOUTS, raw.event_schema) is not None) == at_once
    monkeypatch.setattr(reviews, "_columns", lambda *args: None)
    assert found == [batch.to_pylist() for batch in raw.events()]


BAD = ['{"a": 1}', '{"reviewerID": "A"', "[]", "", '{"reviewerID": "A"}{"reviewerID": "B"}']


@pytest.mark.parametrize("change", [{"overall": 4.5}, {"overall": 0}, {"asin": " "}, {"asin": None}, {"unixReviewTime": None},
                                    {"unixReviewTime": 10**11 + 1}, {"overall": None}, *BAD])  # fmt: skip
def test_what_may_be_bad_is_read_line_by_line(tmp_path, change):
    raw = amazon.of_lines("a", ([], amazon.LAYOUTS), ([], amazon._product), texts=("summary", "review"), bad_rows="refuse")
    good = dict(zip(LAYOUTS["2018"][2], ("A", "B", 5.0, 1, "s", "t"), strict=True))
    lines = [json.dumps(good), change if isinstance(change, str) else json.dumps(good | change), json.dumps(good)]
    assert reviews._columns([f"{line}\n".encode() for line in lines], amazon.LAYOUTS, raw.event_schema) is None


def test_the_real_samples_are_read_whole(data_dir, tmp_path):
    gifts = prepare.load(amazon.find(data_dir / "amazon", "Gift_Cards"), tmp_path / "prepared")
    assert (len(gifts), gifts.schema.num_items, gifts.facts["rows"]) == (458, 148, 2972)
    music = prepare.load(amazon.find(data_dir / "amazon", "Musical_Instruments"), tmp_path / "prepared")
    assert (len(music), music.schema.num_items, len(music.item)) == (1429, 900, 10_261)
    assert music.catalogue.titles == music.catalogue.keys  # there is no metadata


def _place(name, state="Ohio"):
    return {"gmap_id": f"0x1:{name}", "name": name, "category": ["Cafe", "Bar"] if name == "One" else None}


def _visit(user, place, time, text=None):
    return {"user_id": user, "gmap_id": f"0x1:{place}", "time": time * 1000 + 7, "rating": 4, "text": text, "pics": None}


@pytest.fixture
def states(tmp_path):
    """Write two states; one place lies in both files."""
    for state, places in (("Ohio", ("One", "Two")), ("Iowa", ("One", "Three"))):
        visits = [_visit("117", place, i, "Nice") for i, place in enumerate(places)]
        write(tmp_path / f"review-{state}_10.json.gz", visits, json.dumps)
        write(tmp_path / f"meta-{state}.json.gz", [_place(name) for name in places], json.dumps)
    write(tmp_path / "review-Iowa_10.json.gz", [_visit("117", "Three", 9), _visit("117", "Four", 10)], json.dumps)
    return tmp_path


def test_several_states_make_one_dataset(states, tmp_path):
    timelines = prepare.load(google_local.find(states, ("Ohio", "Iowa")), tmp_path / "prepared")
    assert timelines.name == "google-local-Ohio-Iowa" and timelines.user_keys == ["117"]
    titles = [timelines.catalogue.titles[item] for item in timelines.item]
    assert titles == ["One", "Two", "Three", "0x1:Four"]
    assert timelines.columns["review"].tolist() == ["Nice", "Nice", "", ""]
    assert timelines.catalogue.vocab["categories"] == ["", "Bar", "Cafe"]


def test_the_audit_counts_places_without_metadata_and_places_of_dropped_users(states, tmp_path):
    visits = [_visit("117", place, i) for i, place in enumerate(("One", "Two", "Nowhere"))]
    write(states / "review-Ohio_10.json.gz", [*visits, _visit("118", "Shed", 1), _visit("119", "Two", 1)], json.dumps)
    timelines = prepare.load(google_local.find(states, ("Ohio",)), tmp_path / "prepared")
    facts = audit(timelines, leave_last_out(timelines))
    assert (facts["users_before_min_events"], facts["users"]) == (3, 1)
    assert (facts["items"], facts["items_of_dropped_users"]) == (4, 1)  # Shed, which is ranked all the same
    assert (facts["untitled_items"], facts["untitled_events"]) == (2, 1)  # Nowhere and Shed


def test_states_that_are_not_there_are_named(states):
    with pytest.raises(ValueError, match="No state named"):
        google_local.find(states, ())
    with pytest.raises(ValueError, match="no review-Utah_10.json.gz"):
        google_local.find(states, ("Ohio", "Utah"))
    (states / "meta-Iowa.json.gz").unlink()
    with pytest.raises(ValueError, match="no meta-Iowa.json.gz"):
        google_local.find(states, ("Ohio", "Iowa"))


def test_the_real_sample_of_places_is_read_whole(data_dir, tmp_path):
    raw = google_local.find(data_dir / "google_local", ("Sample",))
    assert sum(len(piece) for piece in raw.events()) == 30_143
    assert sum(len(piece) for piece in raw.items()) == 546
