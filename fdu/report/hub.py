"""Saved erasures on the Hugging Face hub: what a push needs is checked first, and one that fails loses nothing."""

from __future__ import annotations

import dataclasses
import logging
import shlex
from pathlib import Path
from typing import Any

from fdu.report.card import PICTURES, is_evaluated, read_card, write_licence
from fdu.storage.loading import read_record
from fdu.storage.output import RECORD_FILE, write_json

LOGGER = logging.getLogger(__name__)
TOKENS = "https://huggingface.co/settings/tokens"
UNSENT = [".*", "**/.*"]
"""Files that are not pushed, as patterns: locks, and what is being written."""


@dataclasses.dataclass(frozen=True)
class Upload:
    """A repository of models to push to; :meth:`checked` makes one."""

    repo_id: str
    """With its namespace."""
    token: str | None = dataclasses.field(default=None, repr=False)
    """None: the stored one."""
    private: bool | None = None
    """Whether a new repository is private; None: as its owner's settings say."""

    @classmethod
    def checked(cls, repo_id: str, token: str | None = None, private: bool | None = None) -> Upload:
        """Check the name, the token and the namespace; the hub is asked who the token's owner is, and nothing is made.

        Args:
            repo_id: org/name, or a name in the owner's own namespace.
            token: None: that of `hf auth login` or HF_TOKEN.
            private: see the field.

        Raises:
            ValueError: a name that no repository can have, no token or one that cannot write, or a namespace that is
                not the owner's.
            OSError: the hub cannot be reached, or refuses the token.
        """
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(repo_id)
        except ValueError as error:
            raise ValueError(f"hub_model_id {repo_id!r} is no name of a repository: {error}") from error
        if not (token or get_token()):
            raise ValueError(
                f"hub_token is missing: run `hf auth login`, set HF_TOKEN, or give a token that can write ({TOKENS})"
            )
        try:
            owner: dict[str, Any] = HfApi(token=token or None).whoami()
        except Exception as error:  # of many kinds, also from the library for HTTP
            raise OSError(f"the hub does not say who you are: {_reason(error)}") from error
        role = ((owner.get("auth") or {}).get("accessToken") or {}).get("role", "")
        if role == "read":
            raise ValueError(f"hub_token can only read; make one that can write ({TOKENS})")
        name = str(owner["name"])
        namespace, slash, _ = repo_id.rpartition("/")
        known = [name, *(str(one["name"]) for one in owner.get("orgs") or ())]
        if slash and namespace not in known and role != "fineGrained":  # which may hide organizations
            raise ValueError(
                f"hub_model_id {repo_id!r}: the token is that of {name!r}, which can write to {', '.join(known)}; "
                "choose one of these, or another token"
            )
        return cls(repo_id if slash else f"{name}/{repo_id}", token or None, private)

    def command(self, folder: str | Path) -> str:
        """The command line that pushes a folder, once it is :meth:`ready`, by the hub's own program."""
        words = ["hf", "upload", self.repo_id, str(folder), "."]
        words += [word for pattern in UNSENT for word in ("--exclude", pattern)]
        return shlex.join([*words, "--delete", PICTURES, *(["--private"] if self.private else [])])

    def ready(self, folder: str | Path) -> None:
        """Make a saved erasure fit for others: no private paths in its record, and the licence of its base model.

        Args:
            folder: the saved erasure.

        Raises:
            OSError: it cannot be written.
        """
        from huggingface_hub import HfApi

        _hide_places(Path(folder))
        base = read_card(folder)[0].get("base_model")
        if not isinstance(base, str):
            return
        try:
            found = HfApi(token=self.token).model_info(base).card_data
        except Exception as error:  # gone, gated, no name of the hub, or no answer
            LOGGER.warning("the licence of %s is not known (%s); add it to the model card", base, _reason(error))
            return
        write_licence(folder, found.to_dict() if found else {})

    def push(
        self,
        folder: str | Path,
        unevaluated: bool = False,
        again: str = "",
        message: str = "Upload an erasure by fdu",
    ) -> str:
        """Make the repository if there is none, and push all files of a saved erasure; returns its address.

        The licence of the base model comes from its card, if that is on the hub.

        Args:
            folder: the saved erasure.
            unevaluated: push although its card holds no figures.
            again: what to do if it fails; if empty, :meth:`command`.
            message: of the commit.

        Raises:
            ValueError: the card holds no figures.
            FileNotFoundError: the folder holds no erasure that fdu saved.
            OSError: it failed or was interrupted; the message gives the reason and what to do.
        """
        from huggingface_hub import HfApi

        if not is_evaluated(folder) and not unevaluated:
            raise ValueError(
                f"the model card in {str(folder)!r} holds no figures yet: run `fdu evaluate BASE {folder} "
                "--push_to_hub`, or push unevaluated"
            )
        api = HfApi(token=self.token)
        remedy = again or f"nothing that was saved is lost; push again with: {self.command(folder)}"
        try:
            self.ready(folder)
        except OSError as error:
            cure = again or f"make {str(folder)!r} writable and push again"
            raise OSError(f"{self.repo_id} was not pushed: {_reason(error)}; {cure}") from error
        try:
            url = str(api.create_repo(self.repo_id, private=self.private, exist_ok=True))
            # Pictures of an earlier evaluation go.
            api.upload_folder(
                repo_id=self.repo_id,
                folder_path=folder,
                commit_message=message,
                delete_patterns=PICTURES,
                ignore_patterns=UNSENT,
            )
        except (Exception, KeyboardInterrupt) as error:
            raise OSError(f"{self.repo_id} was not pushed: {_reason(error)}; {remedy}") from error
        return url


def _hide_places(folder: Path) -> None:
    """Shorten absolute paths in the recorded command line, which are private, to names of files and folders."""
    record = read_record(str(folder))
    given = record.get("command") if isinstance(record, dict) else None
    if not isinstance(given, str):
        return
    try:
        typed = shlex.split(given)
    except ValueError:  # of a record that fdu did not write
        typed = []
    words = []
    for word in typed:
        option, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
        words.append(option + equals + (Path(value).name if value.startswith(("/", "~/")) else value))
    if shlex.join(words) != given:
        write_json(folder / RECORD_FILE, {**record, "command": shlex.join(words)})


def _reason(error: BaseException) -> str:
    """The first line of a reason, with what to do about refusals."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    cause: Any = error.__cause__ or error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    line = (str(cause).strip().splitlines() or [type(cause).__name__])[0].rstrip(".")
    hints = {
        401: f"the token was refused; run `hf auth login`, or make another ({TOKENS})",
        403: f"the token may not write there; give it that right ({TOKENS}), or choose another hub_model_id",
    }
    return f"{line}. {hints[status]}" if status in hints else line
