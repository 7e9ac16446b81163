"""The two hubs: lists their files and downloads them, resuming where an earlier attempt stopped."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

PROBE_SECONDS = 5


class Failed(Exception):
    """The text is for the user: what went wrong, and what to do next."""


class Unreachable(Failed):
    """There is no network, or a hub does not answer."""


class Damaged(Exception):
    """A hub sent something else than it lists."""


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


@dataclass(frozen=True)
class RemoteFile:
    repo: str
    kind: str  # of the repository: "model" or "dataset"
    path: str  # in the repository
    size: int
    checksum: str  # "sha256:..." or "git:...", the sha1 of a git blob; "" where a hub lists none

    def staging(self, target: Path) -> Path:
        """Returns the folder where the file is assembled: next to its target, on the same disk, where the next run
        finds it."""
        return target.parent / ".download" / (self.checksum[-16:] or str(self.size))

    def whole(self, target: Path) -> Path:
        return self.staging(target) / self.path

    def partial(self, target: Path) -> Path:
        return Path(f"{self.whole(target)}.incomplete")  # the name that ModelScope's library uses


class HuggingFace:
    source, other = "hf", "modelscope"
    owners = {}  # those with another name than on Hugging Face
    pages = {"model": "huggingface.co", "dataset": "huggingface.co/datasets"}
    attempts = 4  # in a row without progress
    token = "HF_TOKEN (huggingface.co/settings/tokens)"

    def __init__(self):
        self.endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")

    def list(self, repo: str, kind: str) -> list[RemoteFile]:
        from huggingface_hub import HfApi

        entries = HfApi(endpoint=self.endpoint).list_repo_tree(repo, recursive=True, repo_type=kind)
        return [
            RemoteFile(repo, kind, at.path, at.size, f"sha256:{at.lfs.sha256}" if at.lfs else f"git:{at.blob_id}")
            for at in entries
            if hasattr(at, "size")  # a folder has none
        ]

    def fetch(self, file: RemoteFile, target: Path) -> None:
        """Downloads a file. Does not use hf_hub_download, which starts over in every run. Raises Damaged."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff
        from tqdm import tqdm

        partial, have = file.partial(target), size_of(file.partial(target))
        url = hf_hub_url(file.repo, file.path, repo_type=file.kind, endpoint=self.endpoint)
        headers = {"Accept-Encoding": "identity"}  # with compression, Range would count other bytes
        headers = build_hf_headers(headers=headers | ({"Range": f"bytes={have}-"} if have else {}))
        once = {"timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT, "retry_on_exceptions": ()}  # `bring` retries
        if have < file.size:
            with partial.open("ab") as out, http_stream_backoff("GET", url, headers=headers, **once) as response:
                hf_raise_for_status(response)
                if response.status_code == 200:  # the server ignored Range and starts at the first byte
                    out.truncate(0)
                begun = out.seek(0, os.SEEK_END)
                with tqdm(total=file.size, initial=begun, unit="B", unit_scale=True, desc=file.path) as bar:
                    for chunk in response.iter_bytes():
                        out.write(chunk)
                        bar.update(len(chunk))
        if size_of(partial) != file.size:
            raise Damaged(f"{size_of(partial)} bytes, expected {file.size}")
        partial.replace(file.whole(target))


class ModelScope:
    source, other = "modelscope", "hf"
    owners = {"jingyaogong": "gongjy", "openai": "openai-mirror"}
    pages = {"model": "modelscope.cn/models", "dataset": "modelscope.cn/datasets"}
    attempts = 1  # its library retries by itself
    token = "MODELSCOPE_API_TOKEN (modelscope.cn/my/myaccesstoken)"

    def __init__(self):
        self.endpoint = (os.environ.get("MODELSCOPE_ENDPOINT") or "https://www.modelscope.cn").rstrip("/")

    def api(self):
        from modelscope_hub import HubApi, HubConfig  # not `modelscope`, which imports torch

        logging.getLogger("modelscope_hub").setLevel(logging.WARNING)  # no line for every page of a listing
        return HubApi(HubConfig(endpoint=self.endpoint))

    def list(self, repo: str, kind: str) -> list[RemoteFile]:
        return [
            RemoteFile(repo, kind, at.path, at.size, f"sha256:{at.sha256}" if at.sha256 else "")
            for at in self.api().list_repo_files(repo, kind)
            if not at.is_dir
        ]

    def fetch(self, file: RemoteFile, target: Path) -> None:
        from modelscope_hub.errors import FileIntegrityError

        folder = file.staging(target)
        places = {"local_dir": folder, "cache_dir": folder}  # cache_dir gets its lock, else the home folder does
        try:
            self.api().download_file(file.repo, file.kind, file.path, **places, file_size=file.size)
        except FileIntegrityError as error:
            raise Damaged(str(error)) from error


Hub = HuggingFace | ModelScope


def choose_hub(source: str) -> Hub:
    """Returns the hub of --source; for auto the first one that answers. Raises Unreachable."""
    import requests

    silent = []
    hubs = [hub for hub in (HuggingFace(), ModelScope()) if source in ("auto", hub.source)]
    for hub in hubs:
        try:
            requests.head(hub.endpoint, timeout=PROBE_SECONDS)
            return hub
        except requests.RequestException as error:
            silent.append(f"{hub.endpoint} ({type(error).__name__})")
    other = f", or use the other hub: --source {hubs[0].other}" if len(hubs) == 1 else ""
    raise Unreachable(
        f"no answer from {' nor '.join(silent)}. Is there a network?\nBehind a proxy: export HTTPS_PROXY=http://host:port"
        f"\nA mirror of Hugging Face: export HF_ENDPOINT=https://hf-mirror.com{other}"
    )


def status_of(error: Exception) -> int | None:
    """Returns the HTTP status in an exception of either library, if any."""
    return getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status_code", None)


def failure(error: Exception, hub: Hub, what: str, kind: str) -> Failed:
    """Returns the exception to raise for one of either library, or of the HTTP client below it.

    what: a repository of this kind, "owner/name", or a file in it.
    """
    status, other = status_of(error), f"Or try the other hub: --source {hub.other}"
    if not status:
        cause = error.__cause__ or error
        reason = (str(cause) or type(cause).__name__).splitlines()[0]
        again = "Run the same command again to resume"
        return Unreachable(f"the connection to {hub.endpoint} failed at {what}: {reason}. {again}. {other}")
    page = f"{hub.pages[kind]}/{'/'.join(what.split('/')[:2])}"
    login = f"Accept the terms, if any, on {page}, and export {hub.token.replace(' ', '=... ', 1)}"
    wait = "Wait a few minutes, then run the same command again to resume"
    reasons = {
        401: f"requires a login for {what}, or does not have it. {login}. {other}",
        404: f"has no {what}. {other}",
        429: f"refused {what}: too many requests. {wait}. The limit is higher with {hub.token}",
    }
    reason = reasons.get(401 if status == 403 else status, f"failed at {what}. {other}")
    return Failed(f"{hub.endpoint} {reason} (HTTP {status})")
