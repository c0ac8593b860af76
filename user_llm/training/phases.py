"""What a workdir already holds of a run's phases: kept, set aside, or taken from another run, each by its identity.

| what differs from what the phase was | finished | begun |
|---|---|---|
| nothing | kept | goes on |
| settings of the test alone | measured again | goes on |
| other settings, or a phase below it | set aside, trained again | set aside, trained again |
| files alone (data, checkpoint, tokenizer, text) | refused; kept if changes are accepted | refused; set aside if accepted |

A phase that was taken from another run has no checkpoints, which measuring starts from, so it is trained again. What is set aside
lies in `<workdir>/earlier/<phase>-<identity>`, and comes back by itself when its settings do. All decisions are made before the first
of them is carried out, so that a refusal changes nothing. Results of other settings of the test are marked as such, and are deleted
only when measuring begins.
"""

import dataclasses
from collections.abc import Callable, Sequence

from absl import logging
from etils import epath

from user_llm.common.checksums import check_manifest
from user_llm.common.files import files_below
from user_llm.config.inputs import training_settings
from user_llm.training.identity import (
    FILE,
    Identity,
    changed_inputs,
    changed_phases,
    changed_settings,
    listed,
    read_identity,
)

RESULTS = "results.json"
# A file that holds the hash of the identity by which results.json was measured, where the phase has another identity now.
OUTDATED = "results_outdated"
EARLIER = "earlier"
REMEDY = "choose another --workdir, or keep what is finished by --config.data.accept_changes=True."


@dataclasses.dataclass(frozen=True)
class Part:
    """What becomes of one phase of a run.

    Attributes:
      identity: of what will stand in the directory.
      aside: the identity of what stands there and must leave; None if nothing does.
      source: a directory that holds the phase; None if the phase stands there already, or is to be trained.
      measured: the settings of the test that differ from those by which what stands there was measured.
      accepted: what differs between the present files and those that the kept phase was trained on.
    """

    name: str
    identity: Identity
    aside: Identity | None = None
    source: epath.Path | None = None
    measured: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()
    stands: bool = False


def has_trained(directory: epath.Path) -> bool:
    """Return whether a phase was finished once, so that its parameters are there."""
    return (directory / RESULTS).exists()


def has_results(directory: epath.Path) -> bool:
    """Return whether a phase is finished: trained, and measured by its present settings."""
    return has_trained(directory) and not (directory / OUTDATED).exists()


def drop_results(directory: epath.Path) -> None:
    """Delete the results of earlier settings, before a phase is measured."""
    for name in (RESULTS, OUTDATED):
        (directory / name).unlink(missing_ok=True)


def has_begun(directory: epath.Path) -> bool:
    """Return whether a phase is finished, or has saved a step."""
    return has_results(directory) or _saved(directory)


def _saved(directory: epath.Path) -> bool:
    checkpoints = directory / "checkpoints"
    return checkpoints.exists() and any(path.name.isdigit() for path in checkpoints.iterdir())


def decide(
    workdir: epath.Path,
    name: str,
    wanted: Identity,
    *,
    runs: Sequence[epath.Path],
    accept: bool,
    runs_it: bool = True,
    finished: Callable[[epath.Path], bool] = has_results,
) -> Part:
    """Return what becomes of a phase; changes nothing.

    Args:
      wanted: the identity of the phase as config and files are now.
      runs: workdirs of other runs, whose finished phases may be taken.
      accept: whether finished phases are kept that were trained on other files.
      runs_it: whether the run has this phase. If it has not, other phases of it start from what stands there, however that was measured.

    Raises:
      ValueError: the phase was trained on other files, or nobody knows on which.
    """
    directory = workdir / name
    stored = read_identity(directory)
    if not (finished(directory) or has_begun(directory)):
        source = find_phase(workdir, name, wanted, runs, finished)
        return Part(name, _of(source) or wanted, source=source)
    if stored is None:
        if not accept:
            raise ValueError(f"{directory} does not say what it was trained on, for want of {FILE}: {REMEDY}")
        return Part(name, wanted, accepted=("what it was trained on is not known",), stands=True)
    if stored == wanted:
        return Part(name, stored, stands=True)
    files = tuple(changed_inputs(stored.inputs, wanted.inputs))
    if stored.settings == wanted.settings and stored.built_on == wanted.built_on:
        if not accept:
            raise ValueError(f"{name} in {workdir} was trained on other files ({listed(files)}): {REMEDY}")
        if finished(directory):
            return Part(name, stored, accepted=files, stands=True)
    if not runs_it and has_trained(directory) and _trained_alike(stored, wanted):
        return Part(name, stored, stands=True)
    source = find_phase(workdir, name, wanted, runs, finished)
    if runs_it and source is None and _trained_alike(stored, wanted) and _saved(directory):
        first = "" if stored.trained == wanted.hash else stored.trained
        identity = dataclasses.replace(wanted, first=first)
        return Part(name, identity, measured=tuple(changed_settings(stored.settings, wanted.settings)), stands=True)
    return Part(name, _of(source) or wanted, aside=stored, source=source)


def _of(source: epath.Path | None) -> Identity | None:
    """Return the identity of a phase that is to be taken, as it says it itself."""
    return None if source is None else read_identity(source)


def _trained_alike(one: Identity, other: Identity) -> bool:
    """Return whether two phases have the same parameters."""
    same = one.inputs == other.inputs and one.built_on == other.built_on
    return same and training_settings(one.settings) == training_settings(other.settings)


def find_phase(
    workdir: epath.Path, name: str, wanted: Identity, runs: Sequence[epath.Path], finished: Callable[[epath.Path], bool]
) -> epath.Path | None:
    """Return the directory of a phase of an identity: one that was set aside here, or a finished one of another run."""
    aside = f"{name}-{wanted.hash}"
    here = workdir / EARLIER / aside
    if (finished(here) or has_begun(here)) and read_identity(here) == wanted:
        return here
    candidates = [run / place for run in runs for place in (name, f"{EARLIER}/{aside}")]
    return next((place for place in candidates if finished(place) and read_identity(place) == wanted), None)


def settle(workdir: epath.Path, part: Part) -> None:
    """Carry out what was decided of a phase, and leave its identity.json; for one process, the others wait.

    Raises:
      ValueError: the other run's parameters are damaged.
    """
    directory = workdir / part.name
    set_aside(workdir, part)
    if part.stands:
        if part.measured:
            _mark(directory, part)
        if part.accepted:
            logging.warning("%s: kept although %s since it was trained", part.name, listed(part.accepted))
            part.identity.write(directory, accepted=list(part.accepted))
    elif part.source is None:
        part.identity.write(directory)
    elif part.source.parent == workdir / EARLIER:
        logging.info("%s: taken back from %s, where it was kept", part.name, part.source)
        _move(part.source, directory)
    else:
        logging.info("%s: reused from %s, which has the same identity %s", part.name, part.source, part.identity.hash)
        copy_finished(part.source, directory)
        part.identity.write(directory, reused_from=str(part.source))


def _mark(directory: epath.Path, part: Part) -> None:
    """Give a phase another identity, and say of its results by which one they were measured."""
    mark, before = directory / OUTDATED, read_identity(directory)
    if has_results(directory) and before is not None:
        logging.info("%s: to be measured again, since %s", part.name, listed(part.measured))
        mark.write_text(before.hash)
    part.identity.write(directory)
    if mark.exists() and mark.read_text() == part.identity.hash:
        mark.unlink()


def set_aside(workdir: epath.Path, part: Part) -> None:
    """Move what must leave a phase's directory to where it can come back from."""
    if part.aside is None:
        return
    before = workdir / EARLIER / f"{part.name}-{part.aside.hash}"
    differences = changed_settings(part.aside.settings, part.identity.settings)
    differences += changed_phases(part.aside.built_on, part.identity.built_on)
    differences += changed_inputs(part.aside.inputs, part.identity.inputs)
    logging.info("%s: %s; what was there before is kept in %s", part.name, listed(differences), before)
    _move(workdir / part.name, before)


def copy_finished(source: epath.Path, directory: epath.Path) -> None:
    """Copy what a finished phase left, its checkpoints excepted; results.json comes last and says that all is there."""
    if (source / "params").exists():
        check_manifest(source / "params")
    paths = [path for path in files_below(source) if "checkpoints" not in path.relative_to(source).parts]
    for path in sorted(paths, key=lambda path: path.name == RESULTS):
        target = directory / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.copy(target, overwrite=True)


def _move(source: epath.Path, target: epath.Path) -> None:
    if target.exists():
        target.rmtree()
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
