"""Which phases a phase of a run starts from, and what becomes of what the run's directory holds already."""

from collections.abc import Mapping, Sequence

from etils import epath

from user_llm.common.distributed import agreed, barrier, gather
from user_llm.common.workdir import check_tree
from user_llm.config.phases import Contextualize
from user_llm.config.reader import Config
from user_llm.data.dataset import Dataset
from user_llm.models import pretrained
from user_llm.phases import identities
from user_llm.phases.llm import tokenizer
from user_llm.phases.run import Run
from user_llm.training import phases
from user_llm.training.identity import Identity, changed_inputs, changed_settings, listed, read_identity

BASELINES, LLM, TOKENIZER = "baselines", "llm", "tokenizer"  # folders of a run beside those of its phases
ANOTHER = "{} holds a run of another config ({}): choose another --workdir."


def check_settings(config: Config, workdir: epath.Path) -> None:
    """Refuse a directory of a run with another dataset, protocol or seed, before any data are read.

    Raises:
      ValueError: what differs, and the remedy.
    """

    def check() -> None:
        stored = read_identity(workdir / BASELINES)
        if stored is not None and _begun(workdir):
            now = identities.run_identity(config, {})
            if differences := changed_settings(stored.settings, now.settings):
                raise ValueError(ANOTHER.format(workdir, listed(differences)))

    agreed(check)


def settle_run(run: Run, data: Dataset) -> dict[str, str]:
    """Decide what becomes of everything that the run's directory holds, carry it out, and return each phase's identity.

    Finished phases stay or are taken from the runs of `config.reuse`; phases whose settings changed are set aside.

    Raises:
      ValueError: files that changed under what was trained on them, processes that read different files, a run to reuse that
        is not there, or a name that is no part of a path.
    """
    config, workdir, accept = run.config, run.workdir, run.config.data.accept_changes
    _same_everywhere(data.files)
    runs = other_runs(config.reuse)

    def settle_data() -> None:
        _settle_run(workdir, identities.run_identity(config, data.files), accept)
        if needs_tokenizer(config):
            _settle_tokenizer(run, data, runs)

    agreed(settle_data)
    barrier("the tokenizer is settled")
    files = llm_files(run, data)
    _same_everywhere(files)

    def settle_phases() -> dict[str, str]:
        parts: dict[str, phases.Part] = {}
        if config.llm.checkpoint:
            wanted = Identity({**files, **identities.text_files(config)}, identities.text_settings(config))
            parts[LLM] = phases.decide(workdir, LLM, wanted, runs=runs, accept=accept)
        for name in with_sources(config):
            built_on = {source: parts[source].identity.trained for source in sources(config, name)}
            wanted = identities.phase_identity(config, name, data.files, files, built_on)
            parts[name] = phases.decide(workdir, name, wanted, runs=runs, accept=accept, runs_it=name in config.phases)
            if name not in config.phases and not (
                parts[name].source or parts[name].stands and phases.has_trained(workdir / name)
            ):
                raise ValueError(
                    f"Parameters of {name} are needed, and it is not finished here: add {name} to --config.phases."
                )
        for part in parts.values():
            phases.settle(workdir, part)
        return {name: part.identity.hash for name, part in parts.items()}

    return {BASELINES: identities.run_identity(config, data.files).hash, **agreed(settle_phases)}


def other_runs(reuse: str) -> list[epath.Path]:
    """Return the workdirs that `--config.reuse=RUN1,RUN2` names.

    Raises:
      ValueError: one that is not there, or that holds links out of it.
    """
    runs = [epath.Path(name.strip()) for name in reuse.split(",") if name.strip()]
    for run in runs:
        if not run.is_dir():
            raise ValueError(f"--config.reuse names {run}, and there is no such run: name workdirs, separated by commas.")
        check_tree(run)
    return runs


def with_sources(config: Config) -> list[str]:
    """Return the phases of a run and those whose parameters they start from, in an order in which each can be built.

    Raises:
      ValueError: a phase that starts from itself, or from what is no phase.
    """
    order: list[str] = []

    def add(name: str, above: tuple[str, ...] = ()) -> None:
        if name in above:
            raise ValueError(f"Phase {name} starts from parameters of its own: {' <- '.join([*above, name])}.")
        if name not in order:
            for source in sources(config, name):
                add(source, (*above, name))
            order.append(name)

    for name in config.phases:
        if not (config.sections[name].task == "pretrain_lm" and config.llm.checkpoint):
            add(name)
    return order


def sources(config: Config, name: str) -> list[str]:
    """Return the phases whose parameters a phase starts from.

    Raises:
      ValueError: one that is no phase.
    """
    phase = config.sections[name]
    if not isinstance(phase, Contextualize):
        return []
    encoder = [phase.taught_by] if phase.taught_by else []
    kinds = ("fresh", "checkpoint", *(("pretrain_lm",) if config.llm.checkpoint else ()))
    loaded = [source for _, source in phase.load if source not in kinds]
    if unknown := [source for source in loaded if source not in config.sections]:
        raise ValueError(f"{name}.load names {unknown[0]!r}, which is no phase.")
    return list(dict.fromkeys([*encoder, *loaded]))


def needs_tokenizer(config: Config) -> bool:
    """Return whether a phase of a run reads text by a tokenizer that the run makes itself."""
    return not config.llm.checkpoint and any(config.sections[name].task != "pretrain_encoder" for name in config.phases)


def llm_files(run: Run, data: Dataset) -> dict[str, str]:
    """Return the content hashes of the LLM and its tokenizer; none for a run whose phases read no text."""
    if run.config.llm.checkpoint:
        return pretrained.checkpoint_hashes(run.checkpoint, run.local)
    if not needs_tokenizer(run.config):
        return {}
    tokenizer(run, data)  # made if it is missing
    return pretrained.tokenizer_hashes(run.local / TOKENIZER)


def _settle_run(workdir: epath.Path, wanted: Identity, accept: bool) -> None:
    """Refuse a run of another dataset, protocol or seed; note which this one is of."""
    stored, begun = read_identity(workdir / BASELINES), _begun(workdir)
    if stored is not None and begun:
        if differences := changed_settings(stored.settings, wanted.settings):
            raise ValueError(ANOTHER.format(workdir, listed(differences)))
        if (differences := changed_inputs(stored.inputs, wanted.inputs)) and not accept:
            raise ValueError(f"{', '.join(begun)} in {workdir} saw other data ({listed(differences)}): {phases.REMEDY}")
    wanted.write(workdir / BASELINES)


def _settle_tokenizer(run: Run, data: Dataset, runs: Sequence[epath.Path]) -> None:
    """Keep the tokenizer that the run made, take that of another run, or let it be made again where its settings changed."""
    wanted = identities.tokenizer_identity(run.config, data.files)
    home = epath.Path(run.local)
    made = lambda folder: (folder / "tokenizer.json").exists()  # noqa: E731
    part = phases.decide(home, TOKENIZER, wanted, runs=runs, accept=True, finished=made)
    if part.stands and not _begun(run.workdir):  # nothing was trained with it
        source = phases.find_phase(home, TOKENIZER, wanted, runs, made)
        if part.accepted or source is not None:
            (home / TOKENIZER).rmtree()
            part = phases.Part(TOKENIZER, wanted, source=source)
    if part.source is not None or part.accepted:
        phases.settle(home, part)
    else:  # the folder appears once it is made
        phases.set_aside(home, part)


def _same_everywhere(files: Mapping[str, str]) -> None:
    """Refuse processes of one run that read different files."""
    for number, others in enumerate(gather(dict(files))):
        if differences := changed_inputs(files, others):
            raise ValueError(f"Process {number} reads other files than this one ({listed(differences)}): give all the same.")


def _begun(workdir: epath.Path) -> list[str]:
    """Return the phases that a directory holds steps or results of."""
    folders = [path for path in workdir.iterdir() if path.is_dir()] if workdir.exists() else []
    return sorted(path.name for path in folders if path.name != LLM and phases.has_begun(path))
