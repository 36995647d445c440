"""Xet's store for the double: a folder that hf_xet itself writes and reads, through its `local://` endpoint.

The double only says where the folder is, as the Hub says where its store is, and looks up which file of the store has
a SHA-256, which hf_xet notes in the shards that it registers.
"""

from __future__ import annotations

import time
from pathlib import Path

HASH, ENTRY = 32, 48  # bytes; a shard is a header, then records of one size
WITH_SHA, WITH_CHECKS = 30, 31  # bits of a file's flags


class XetStore:
    """A store in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, f"local://{folder}"

    def token(self) -> dict[str, object]:
        """What the Hub answers to whoever may read or write."""
        return {"casUrl": self.url, "accessToken": "xet", "exp": int(time.time()) + 3600}

    def headers(self) -> dict[str, str]:
        """The same for huggingface_hub, which reads it off headers."""
        said = self.token()
        names = {"casUrl": "X-Xet-Cas-Url", "accessToken": "X-Xet-Access-Token", "exp": "X-Xet-Token-Expiration"}
        return {names[key]: str(value) for key, value in said.items()}

    def files(self) -> dict[str, str]:
        """SHA-256 of each file that was registered -> its name in the store."""
        found: dict[str, str] = {}
        for shard in self.folder.rglob("shards/*.mdb"):
            data, at = shard.read_bytes(), ENTRY
            while data[at : at + HASH] != b"\xff" * HASH:
                flags, entries = (int.from_bytes(data[at + HASH + i : at + HASH + i + 4], "little") for i in (0, 4))
                name = _hex(data[at : at + HASH])
                at += ENTRY * (1 + entries * (1 + (flags >> WITH_CHECKS & 1)))
                if flags >> WITH_SHA & 1:
                    found[_hex(data[at : at + HASH])] = name
                    at += ENTRY
        return found

    def read(self, name: str, size: int) -> bytes:
        """A file of the store, put together by hf_xet."""
        from hf_xet import XetFileInfo, XetSession

        said = self.token()
        options = {"endpoint": said["casUrl"], "token": said["accessToken"], "token_expiry_unix_secs": said["exp"]}
        target = self.folder / name
        with XetSession().new_file_download_group(**options) as group:
            group.start_download_file(XetFileInfo(name, size), str(target))
        data = target.read_bytes()
        target.unlink()
        return data


def _hex(data: bytes) -> str:
    """A hash as Xet writes it: as four numbers of eight bytes, the lowest byte first."""
    return "".join(data[i : i + 8][::-1].hex() for i in range(0, HASH, 8))
