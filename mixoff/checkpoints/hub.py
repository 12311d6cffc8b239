"""Models on the Hugging Face Hub, through `huggingface_hub` alone: its token, cache, endpoint and offline mode apply.

A model is named `org/model` or `org/model@revision` (a branch, a tag or a commit). For loading, its files are fetched
into the cache that transformers uses too. For conversion, only headers are fetched at first, by range requests; then
each shard is fetched, verified, and deleted once it is consumed.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from mixoff.checkpoints import model_files
from mixoff.checkpoints.checkpoint import TensorRange, parse_header
from mixoff.checkpoints.model_files import MAX_HEADER, SIDE_FILES, WHOLE
from mixoff.checkpoints.names import HubId
from mixoff.checkpoints.published import open_checkpoint
from mixoff.checkpoints.shards import read_side_files
from mixoff.errors import AGAIN, CheckpointError

# files fetched first to load a model: they tell which others are needed; a store may be on the Hub too
WANTED = (*SIDE_FILES, WHOLE, "quantized.safetensors", "experts-*.bin")
STRAY = re.compile(r"\.[0-9a-f]{8}\.incomplete$")  # huggingface_hub 2 names them at random and never resumes one
FIRST = 100_000  # bytes of the first request: nearly every header fits
CONNECTIONS = 8  # headers that are fetched at a time


# Whole models, for loading --------------------------------------------------------------------------------------------


def snapshot(model: HubId) -> Path:
    """The folder in the Hub cache with all that loading needs, fetched if needed. Raises CheckpointError."""
    from huggingface_hub import snapshot_download

    with advice(model):
        folder = Path(snapshot_download(model.repo, revision=model.revision, allow_patterns=list(WANTED)))
        weights = model_files.here(folder)
        if weights and not all((folder / name).exists() for name in weights.names):
            # folder.name is the commit: the branch may have moved since
            snapshot_download(model.repo, revision=folder.name, allow_patterns=list(weights.names))
    return folder


def config_folder(model: HubId) -> Path:
    """A folder with the model's config.json; nothing else is fetched. Raises CheckpointError."""
    from huggingface_hub import hf_hub_download

    with advice(model):
        return Path(hf_hub_download(model.repo, "config.json", revision=model.revision)).parent


class HubShards:
    """A model on the Hub at one commit. Opening it fetches the small files and the header of each shard."""

    transient = True

    def __init__(self, model: HubId, downloads: Path) -> None:
        from huggingface_hub import HfApi, constants

        with advice(model):
            info = HfApi().model_info(
                model.repo, revision=model.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
        self.model = HubId(model.repo, info.sha)
        self.downloads = downloads
        self.listed = {entry.rfilename: entry for entry in info.siblings or []}
        folder = self._side_folder()
        files = model_files.find(folder, self.listed, self.model)
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            headers = dict(zip(files.names, pool.map(self._header, files.names), strict=True))
        self.checkpoint = open_checkpoint(folder, files, headers)

    def identity(self) -> str:
        return f"{self.model} {[(file, self.listed[file].size) for file in self.checkpoint.files]}"

    def side_files(self) -> dict[str, bytes]:
        return read_side_files(self.checkpoint.folder) | self.checkpoint.side_changes()

    def acquire(self, file: str) -> Path:
        from huggingface_hub import hf_hub_download

        if path := self._cached(file):
            return path
        path = self.downloads / file
        for stray in self.downloads.rglob("*.incomplete"):  # left by a process that was killed
            if STRAY.search(stray.name):
                stray.unlink()
        for attempt in range(2):
            with advice(self.model):
                hf_hub_download(
                    self.model.repo,
                    file,
                    revision=self.model.revision,
                    local_dir=self.downloads,
                    force_download=attempt > 0,
                )
            if self._is_sound(path, file):
                return path
            path.unlink()
        raise CheckpointError(
            f"{file} of {self.model} was downloaded twice and both copies differ from the Hub's checksum: {AGAIN}"
        )

    def release(self, file: str) -> None:
        (self.downloads / file).unlink(missing_ok=True)

    def close(self) -> None:
        pass

    def _side_folder(self) -> Path:
        """The folder in the Hub cache with config.json, the index and the other small files."""
        from huggingface_hub import hf_hub_download

        plain = [name for name in self.listed if "/" not in name]
        names = [name for name in plain if any(fnmatch.fnmatch(name, pattern) for pattern in SIDE_FILES)]
        if "config.json" not in names:
            model_files.refuse_adapter(names, self.downloads, self.model)
            raise CheckpointError(f"{self.model} has no config.json: it is not a model that transformers can load")
        with advice(self.model):
            paths = [Path(hf_hub_download(self.model.repo, n, revision=self.model.revision)) for n in names]
        return paths[names.index("config.json")].parent

    def _header(self, file: str) -> dict[str, TensorRange]:
        """The tensors of one shard, from its first bytes."""
        raw = self._first_bytes(file, FIRST)
        wanted = 8 + int.from_bytes(raw[:8], "little")
        if len(raw) < wanted <= 8 + MAX_HEADER:
            raw = self._first_bytes(file, wanted)
        return parse_header(Path(f"{self.model}/{file}"), raw, self.listed[file].size or 0)

    def _first_bytes(self, file: str, nbytes: int) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.model.repo, file, revision=self.model.revision)
        headers = build_hf_headers() | {"Range": f"bytes=0-{nbytes - 1}", "Accept-Encoding": "identity"}
        raw = b""
        with advice(self.model), get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
            hf_raise_for_status(response)
            for piece in response.iter_bytes():  # a server without range requests sends everything: stop reading
                raw += piece
                if len(raw) >= nbytes:
                    break
        return raw[:nbytes]

    def _cached(self, file: str) -> Path | None:
        """The shard in the Hub cache, if it was fetched before; that copy is not ours to delete."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.model.repo, file, revision=self.model.revision)
        return Path(path) if isinstance(path, str) else None

    def _is_sound(self, path: Path, file: str) -> bool:
        """Whether a fetched file has the size and, if the Hub lists one, the SHA-256 of the Hub's entry."""
        entry = self.listed[file]
        if path.stat().st_size != entry.size or not entry.lfs:
            return path.stat().st_size == entry.size
        with path.open("rb") as f:
            digest = hashlib.sha256()
            while piece := f.read(1 << 22):
                digest.update(piece)
        return digest.hexdigest() == entry.lfs.sha256


# What went wrong ------------------------------------------------------------------------------------------------------


@contextmanager
def advice(model: HubId) -> Iterator[None]:
    """Turn errors of huggingface_hub into one line that says what to do. "Disk full" passes through unchanged."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.HfHubHTTPError, errors.EntryNotFoundError, errors.HFValidationError, errors.HTTPError) as error:
        raise CheckpointError(_explain(error, model)) from error
    except OSError as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CheckpointError(_unreachable(error, model)) from error


def _explain(error: Exception, model: HubId) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__  # the Hub answered; huggingface_hub only looked into the cache afterwards
    page, revision = f"https://huggingface.co/{model.repo}", model.revision or "main"
    known = (
        (errors.GatedRepoError, f"{model.repo} is gated: accept its terms at {page}, then log in with `hf auth login`"),
        (errors.DisabledRepoError, f"the Hub has disabled {model.repo}: choose another copy of the model"),
        (
            errors.RepositoryNotFoundError,
            f"no folder at {model}, and no such model on the Hub, or it is private: "
            "check the name, or log in with `hf auth login`",
        ),
        (errors.RevisionNotFoundError, f"{model.repo} has no revision {revision!r}: look at {page}/commits/main"),
        (errors.LocalEntryNotFoundError, _unreachable(error, model)),
        (errors.EntryNotFoundError, f"{model} lacks a file that a model has: look at {page}/tree/{revision}"),
        (errors.HFValidationError, f"{str(model)!r} is neither a folder nor a name on the Hub (org/model)"),
    )
    for kind, text in known:
        if isinstance(error, kind):
            return text
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    if status in (401, 403):
        return f"the Hub refuses access to {model} ({status}): use `hf auth login` with a token that can read it"
    if status:
        return f"the Hub answers {status} to a request for {model}: wait a little, then {AGAIN}"
    return _unreachable(error, model)


def _unreachable(error: BaseException, model: HubId) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return (
            f"no folder at {model}, and no such model in the local Hub cache: "
            f"fetch it with `hf download {model.repo}`, without HF_HUB_OFFLINE=1"
        )
    cause = error.__cause__ or error
    reason = (str(cause) or type(cause).__name__).splitlines()[0]
    return (
        f"no folder at {model}, and cannot reach the Hub at {constants.ENDPOINT} ({reason}): check the "
        f"connection, or that path, then {AGAIN}"
    )
