"""Write a trained model for other programs: `python -m user_llm.export --model=RUN/user_llm/model --out=DIR`.

DIR becomes a model directory that holds the whole LLM, with adapters merged into its weights. `user_llm.load` reads it, and so does
`transformers` and every other program that reads Hugging Face checkpoints. --push=ORGANISATION/NAME also uploads DIR to the hub.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from absl import app, flags, logging
from huggingface_hub.errors import RepositoryNotFoundError

from user_llm.common.printable import printable
from user_llm.models.families import FAMILIES, Family
from user_llm.models.pretrained import is_hub_name
from user_llm.serving import artifact
from user_llm.serving.front import find_model
from user_llm.serving.settings import read_settings

_MODEL = flags.DEFINE_string("model", None, "Model directory, such as RUN/user_llm/model, or a model's name on the hub.")
_OUT = flags.DEFINE_string("out", None, "Directory to write to, which must not exist.")
_LLM = flags.DEFINE_string("llm", "", "Directory or hub name of the LLM, if the model only names its LLM; empty for that name.")
_PUSH = flags.DEFINE_string("push", "", "Name on the hub to upload DIR to, as ORGANISATION/NAME; HF_TOKEN must allow it.")
_PRIVATE = flags.DEFINE_bool("private", True, "Whether the repository of --push is private; --noprivate allows a public one.")
_REPLACE = flags.DEFINE_bool("replace", False, "Whether --push may replace the model of a repository that exists.")


def export(
    model: str | os.PathLike,
    out: Path,
    *,
    llm: str = "",
    encoders: Mapping[str, Any] | None = None,
    families: Mapping[str, Family] | None = None,
) -> None:
    """Write a model with its whole LLM to the directory `out`.

    Args:
      model: a model directory, or the name of a model on the hub.
      llm: the directory or the hub name of the LLM that the model names; empty for the name in the model.
      encoders, families: encoders and families of LLMs of your own, as in `user_llm.load`.

    Raises:
      ValueError: `out` exists, or `model` is not a model.
    """
    if out.exists():
        raise ValueError(f"{out} exists: choose another directory.")
    artifact.export(find_model(model), out, llm=llm, encoders=encoders, families={**FAMILIES, **(families or {})})


def check_push(name: str, *, private: bool, replace: bool) -> None:
    """Check that a model may be uploaded to a repository of the hub; the arguments are those of `push`.

    Raises:
      ValueError: `name` is not a name on the hub; or the repository exists, and `replace` is not given; or it is public, and
        `private` is given.
    """
    if not is_hub_name(name):
        raise ValueError(f"--push={name}: name it as ORGANISATION/NAME.")
    try:
        found = huggingface_hub.HfApi().model_info(name)
    except RepositoryNotFoundError:
        return
    except Exception as error:  # of the hub's library, or of whichever library it speaks HTTP with
        raise ValueError(f"Cannot upload to {name} ({_reason(error)}): see that HF_TOKEN may write there.") from error
    kind = "private" if found.private else "public"
    if not replace:
        raise ValueError(f"{name} exists on the hub and is {kind}: choose another name, or replace its model by --replace.")
    if private and not found.private:
        raise ValueError(f"{name} is public on the hub: choose another name, or allow a public one by --noprivate.")


def push(directory: Path, name: str, *, private: bool = True, replace: bool = False) -> None:
    """Upload a model directory to the hub.

    The repository is created if it does not exist. The environment variables of the hub's library apply: HF_TOKEN is the account
    that uploads, HF_ENDPOINT is the address of a mirror.

    Args:
      name: the repository, as ORGANISATION/NAME.
      private: whether the repository is private. A public one is refused unless this is False.
      replace: whether the repository may exist. Files of an older model in it are deleted.

    Raises:
      ValueError: as in `check_push`, `directory` is not a model directory, or the hub refuses the upload.
    """
    read_settings(directory)
    check_push(name, private=private, replace=replace)
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(name, private=private, exist_ok=replace)
        # Files of an older model of that name would be read as files of this one.
        api.upload_folder(repo_id=name, folder_path=directory, delete_patterns=list(artifact.PATTERNS))
    except Exception as error:  # of the hub's library, or of whichever library it speaks HTTP with
        raise ValueError(
            f"Cannot upload {directory} to {name} ({_reason(error)}): see that HF_TOKEN may write there."
        ) from error


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def main(argv: list[str]) -> None:
    """Run the command. A mistake of the caller ends in one sentence."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}")
    out = Path(str(_OUT.value))
    try:
        if _PUSH.value:  # before the work of exporting
            check_push(_PUSH.value, private=_PRIVATE.value, replace=_REPLACE.value)
        export(str(_MODEL.value), out, llm=_LLM.value)
        if _PUSH.value:
            push(out, _PUSH.value, private=_PRIVATE.value, replace=_REPLACE.value)
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {printable(error)}")
    logging.info("Written to %s", out)


if __name__ == "__main__":
    flags.mark_flags_as_required(["model", "out"])
    app.run(main)
