"""A model of the Hugging Face hub in its cache, through huggingface_hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfile
from typing import Any

from qwen_export.downloads.hub_options import HubName, HubOptions
from qwen_export.downloads.needed_files import INDEX, gguf, texts, weights
from qwen_export.downloads.remote_headers import write_header
from qwen_export.errors import CheckpointError
from qwen_export.extras import needed_for

_NO_FILE = "nothing-is-called-this"
_LOGIN = "Log in with `hf auth login`, or set HF_TOKEN to a token that may read the repository."


def download(name: HubName, options: HubOptions) -> Path:
    """The directory of the model in the cache, or its GGUF file. Raises CheckpointError for a model that cannot be downloaded."""
    with needed_for("a model of the hub"):
        from huggingface_hub import snapshot_download
    with _reported(name, options):
        if options.offline:
            directory = Path(snapshot_download(name.model, revision=options.revision, local_files_only=True, allow_patterns=_NO_FILE))
            files = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
            return _checkpoint(directory, name, files)
        names, commit = _listing(name, options)
        fetch = _fetcher(name, commit)
        files = _needed(name, names, fetch)
        # By the name of the revision, so that the cache knows it by that name, too.
        directory = Path(snapshot_download(name.model, revision=options.revision, allow_patterns=files))
        return _checkpoint(directory, name, files)


def download_headers(name: HubName, options: HubOptions, directory: Path) -> Path:
    """As `download`, into `directory`, with the headers of safetensors files only; files of GGUF models are downloaded whole."""
    with needed_for("a model of the hub"):
        from huggingface_hub import get_session, hf_hub_url, try_to_load_from_cache
        from huggingface_hub.utils import build_hf_headers
    with _reported(name, options):
        names, commit = _listing(name, options)
        fetch = _fetcher(name, commit)
        files = _needed(name, names, fetch)
        large = [file for file in files if file.endswith((".safetensors", ".gguf"))]
        cached = all(isinstance(try_to_load_from_cache(name.model, file, revision=commit), str) for file in large)
        if cached or any(file.endswith(".gguf") for file in large):
            return download(name, options)
        for file in files:
            target = directory / file
            target.parent.mkdir(parents=True, exist_ok=True)
            if file in large:
                address = hf_hub_url(name.model, file, revision=commit)
                write_header(target, _ranges(get_session(), address, build_hf_headers()))
            else:
                copyfile(fetch(file), target)
    return directory


def _needed(name: HubName, names: list[str], fetch: Callable[[str], Path]) -> list[str]:
    if not any(file.endswith(".safetensors") for file in names):
        return gguf(name, names)
    listed: set[str] = set()
    if INDEX in names:
        content = json.loads(fetch(INDEX).read_text(encoding="utf-8"))
        entries = content.get("weight_map") if isinstance(content, dict) else None
        listed = {file for file in entries.values() if isinstance(file, str)} if isinstance(entries, dict) else set()
    return [*texts(names), *weights(names, listed)]


def _checkpoint(directory: Path, name: HubName, files: list[str]) -> Path:
    if any(file.endswith(".safetensors") for file in files):
        return directory
    return directory / gguf(name, files)[0]


def _listing(name: HubName, options: HubOptions) -> tuple[list[str], str]:
    """The files of the repository, and the commit that they are of."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(name.model, revision=options.revision)
    return [sibling.rfilename for sibling in info.siblings or ()], str(info.sha)


def _fetcher(name: HubName, commit: str) -> Callable[[str], Path]:
    from huggingface_hub import hf_hub_download

    return lambda file: Path(hf_hub_download(name.model, file, revision=commit))


def _ranges(session: Any, address: str, headers: dict[str, str]) -> Callable[[int, int], tuple[bytes, int]]:
    def read(start: int, stop: int) -> tuple[bytes, int]:
        answer = session.get(address, headers=headers | {"Range": f"bytes={start}-{stop - 1}"}, follow_redirects=True)
        answer.raise_for_status()
        return answer.content, int(str(answer.headers.get("Content-Range", "/0")).rpartition("/")[2] or 0)

    return read


@contextmanager
def _reported(name: HubName, options: HubOptions) -> Iterator[None]:
    """Errors of the hub and of the network as ours; no bars where none are wanted."""
    from huggingface_hub import errors
    from huggingface_hub.utils import disable_progress_bars

    if not options.bars:
        disable_progress_bars()

    # Of the library that huggingface_hub sends requests with: releases differ.
    bases = [kind for kind in errors.HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"]
    network: tuple[type[Exception], ...] = (*(kind for kind in bases if issubclass(kind, Exception)), OSError)
    where = f"{name}" + (f" at {options.revision}" if options.revision else "")

    def failed(what: str, error: Exception, fix: str) -> CheckpointError:
        return CheckpointError(what, where=where, got=(str(error).splitlines() or [""])[0][:200], fix=fix)

    try:
        yield
    except errors.GatedRepoError as error:
        raise failed("the model is not open to everyone", error, f"Ask for access on the page of the model. {_LOGIN}") from error
    except errors.RepositoryNotFoundError as error:
        fix = f"Give a directory that exists, or correct the name. A private model needs a token. {_LOGIN}"
        raise failed("there is no such directory, and the hub has no such model", error, fix) from error
    except errors.RevisionNotFoundError as error:
        raise failed("the model has no such revision", error, "Give a branch, a tag or a commit as {revision}.") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise failed("there is no such directory, and the model is not in the cache", error, _ONLINE) from error
    except network as error:
        raise failed("there is no such directory, and the model could not be downloaded", error, f"Try again. {_ONLINE}") from error


_ONLINE = "Correct the path; or leave out {offline} and HF_HUB_OFFLINE on a machine with a network, and try again."
