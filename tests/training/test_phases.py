"""What becomes of phases, on folders written by hand."""

import json
import re
import shutil

import pytest
from etils import epath

from user_llm.common.checksums import write_manifest
from user_llm.training.identity import FILE, Identity, read_identity
from user_llm.training.phases import decide, drop_results, has_results, settle

A = Identity({"data/a.csv": "1"}, {"p.steps": 4})
OTHER_SETTINGS = Identity(A.inputs, {"p.steps": 5})
OTHER_FILES = Identity({"data/a.csv": "2"}, A.settings)
BUILT = Identity(A.inputs, A.settings, {"q": "abc"})
REMEDY = r"choose another --workdir, or keep what is finished by --config\.data\.accept_changes=True\.$"


def _make(folder, identity, *, finished=True, content="params"):
    """A phase, finished or with one saved step."""
    (folder / "checkpoints" / "2").mkdir(parents=True)
    (folder / "checkpoints" / "2" / "state").write_text(content)
    (folder / "params").mkdir()
    (folder / "params" / "w").write_text(content)
    (folder / "values").mkdir()
    (folder / "values" / "t.m.npz").write_text(content)
    write_manifest(folder / "params")
    if identity is not None:
        identity.write(epath.Path(folder))
    if finished:
        (folder / "results.json").write_text(json.dumps([content]))
    return folder


def _settled(workdir, wanted, *, runs=(), accept=False):
    """Return (what stands in the phase's folder: its content or None, what is set aside, the identity that later phases see)."""
    part = decide(epath.Path(workdir), "p", wanted, runs=[epath.Path(run) for run in runs], accept=accept)
    settle(epath.Path(workdir), part)
    assert read_identity(epath.Path(workdir / "p")) == part.identity
    params = workdir / "p" / "params" / "w"
    return (
        params.read_text() if params.exists() else None,
        sorted(path.name for path in workdir.glob("earlier/*")),
        part.identity,
    )


@pytest.mark.parametrize("finished", [True, False])
def test_a_phase_of_the_same_identity_stays(tmp_path, finished):
    _make(tmp_path / "p", A, finished=finished)
    assert _settled(tmp_path, A) == ("params", [], A)


def test_nothing_there_begins(tmp_path):
    assert _settled(tmp_path, A) == (None, [], A)
    assert _settled(tmp_path, OTHER_FILES) == (None, [], OTHER_FILES)  # it had not begun


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("wanted", [OTHER_SETTINGS, BUILT])
def test_other_settings_set_a_phase_aside_and_the_old_ones_take_it_back(tmp_path, finished, wanted):
    _make(tmp_path / "p", A, finished=finished)
    assert _settled(tmp_path, wanted) == (None, [f"p-{A.hash}"], wanted)
    _make_begun(tmp_path / "p")
    stands, aside, identity = _settled(tmp_path, A)
    assert (stands, aside, identity) == ("params", [f"p-{wanted.hash}"], A)
    assert (tmp_path / "p" / "checkpoints" / "2").exists() and (tmp_path / "p" / "results.json").exists() == finished


GUIDED = Identity(A.inputs, {"p.steps": 4, "p.eval.guide": [0.5]})
WRITING = Identity(A.inputs, {"p.steps": 4, "p.eval.generate_users": 9})
HEADED, HEADED_WRITING = (Identity(A.inputs, {"p.loss.catalogue": 1.0, "p.eval.generate_users": users}) for users in (0, 9))
OWN, OWN_OTHER = (Identity(A.inputs, {"p.encoder.options.transitions": own}) for own in (1, 2))


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("before, wanted", [(A, GUIDED), (GUIDED, A), (HEADED, HEADED_WRITING)])
def test_other_settings_of_the_test_alone_keep_the_parameters_and_measure_again(tmp_path, finished, before, wanted):
    _make(tmp_path / "p", before, finished=finished)
    for _ in range(2):  # the same command again changes nothing
        assert _settled(tmp_path, wanted) == ("params", [], wanted)
        assert not has_results(epath.Path(tmp_path / "p")) and (tmp_path / "p" / "checkpoints" / "2").exists()
        assert read_identity(epath.Path(tmp_path / "p")).trained == before.hash
    # Results are there until measuring begins, and hold again for the settings of before.
    assert _settled(tmp_path, before) == ("params", [], before)
    assert has_results(epath.Path(tmp_path / "p")) == finished
    assert read_identity(epath.Path(tmp_path / "p")).first == ""


def test_results_that_measuring_has_replaced_are_not_those_of_before(tmp_path):
    _make(tmp_path / "p", A)
    _settled(tmp_path, GUIDED)
    drop_results(epath.Path(tmp_path / "p"))
    (tmp_path / "p" / "results.json").write_text("[]")
    assert has_results(epath.Path(tmp_path / "p")) and _settled(tmp_path, GUIDED)[2] == GUIDED
    assert has_results(epath.Path(tmp_path / "p"))
    _settled(tmp_path, A)
    assert not has_results(epath.Path(tmp_path / "p"))


def test_a_copy_of_a_phase_that_was_measured_again_says_how_it_was_trained(tmp_path):
    _make(tmp_path / "run" / "p", A)
    _settled(tmp_path / "run", GUIDED)
    drop_results(epath.Path(tmp_path / "run" / "p"))
    (tmp_path / "run" / "p" / "results.json").write_text("[]")
    (tmp_path / "other").mkdir()
    assert _settled(tmp_path / "other", GUIDED, runs=[tmp_path / "run"])[2].trained == A.hash


def test_a_phase_that_others_start_from_stays_as_it_was_measured(tmp_path):
    _make(tmp_path / "p", A)
    part = decide(epath.Path(tmp_path), "p", GUIDED, runs=[], accept=False, runs_it=False)
    settle(epath.Path(tmp_path), part)
    assert part.identity == read_identity(epath.Path(tmp_path / "p")) == A and has_results(epath.Path(tmp_path / "p"))


@pytest.mark.parametrize("before, wanted", [(A, WRITING), (OWN, OWN_OTHER)])
def test_what_training_depends_on_as_well_trains_again(tmp_path, before, wanted):
    """Without an item head, titles are written on validation, which chooses the best step; and options of one's own may be of anything."""
    _make(tmp_path / "p", before)
    assert _settled(tmp_path, wanted) == (None, [f"p-{before.hash}"], wanted)


def test_what_has_no_checkpoint_cannot_be_measured(tmp_path):
    shutil.rmtree(_make(tmp_path / "p", A) / "checkpoints")
    assert _settled(tmp_path, GUIDED) == (None, [f"p-{A.hash}"], GUIDED)


def _make_begun(folder):
    (folder / "checkpoints" / "1").mkdir(parents=True)


@pytest.mark.parametrize("finished", [True, False])
def test_other_files_are_refused_and_nothing_is_changed(tmp_path, finished):
    _make(tmp_path / "p", A, finished=finished)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=rf"^p in {tmp_path} was trained on other files \(data/a\.csv changed\): {REMEDY}"):
        decide(epath.Path(tmp_path), "p", OTHER_FILES, runs=[], accept=False)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_accepted_changes_keep_what_is_finished_under_its_own_identity(tmp_path):
    _make(tmp_path / "p", A)
    assert _settled(tmp_path, OTHER_FILES, accept=True) == ("params", [], A)
    assert json.loads((tmp_path / "p" / FILE).read_text())["accepted"] == ["data/a.csv changed"]
    with pytest.raises(ValueError, match="was trained on other files"):
        _settled(tmp_path, OTHER_FILES)


def test_accepted_changes_begin_again_what_is_not_finished(tmp_path):
    _make(tmp_path / "p", A, finished=False)
    assert _settled(tmp_path, OTHER_FILES, accept=True) == (None, [f"p-{A.hash}"], OTHER_FILES)


def test_a_phase_that_does_not_say_what_it_was_trained_on_is_refused_or_accepted(tmp_path):
    _make(tmp_path / "p", None)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/p does not say what it was trained on, for want of {FILE}: {REMEDY}"):
        _settled(tmp_path, A)
    assert _settled(tmp_path, A, accept=True) == ("params", [], A)


def test_a_finished_phase_of_another_run_is_copied_by_its_identity(tmp_path):
    _make(tmp_path / "one" / "p", OTHER_FILES, content="other")
    source = _make(tmp_path / "two" / "p", A, content="mine")
    runs = [tmp_path / "one", tmp_path / "two"]
    workdir = tmp_path / "run"
    assert _settled(workdir, A, runs=runs) == ("mine", [], A)
    assert json.loads((workdir / "p" / FILE).read_text())["reused_from"] == str(source)
    copied = {str(path.relative_to(workdir / "p")) for path in (workdir / "p").rglob("*") if path.is_file()}
    assert copied == {"identity.json", "params/w", "params/checksums.json", "results.json", "values/t.m.npz"}
    assert (source / "checkpoints" / "2" / "state").exists()  # it is a copy
    assert _settled(workdir, A, runs=runs) == ("mine", [], A)


def test_what_another_run_has_not_finished_or_set_aside_is_told_apart(tmp_path):
    other = tmp_path / "other"
    _make(other / "p", A, finished=False)
    assert _settled(tmp_path / "run", A, runs=[other]) == (None, [], A)
    _make(other / "earlier" / f"p-{A.hash}", A, content="earlier")
    assert _settled(tmp_path / "run", A, runs=[other]) == ("earlier", [], A)


def test_damaged_parameters_of_another_run_are_not_taken(tmp_path):
    source = _make(tmp_path / "other" / "p", A)
    (source / "params" / "w").write_text("paramt")
    with pytest.raises(ValueError, match=re.escape(f"{source}/params/w is damaged")):
        _settled(tmp_path / "run", A, runs=[tmp_path / "other"])
    assert not (tmp_path / "run" / "p" / "results.json").exists()
