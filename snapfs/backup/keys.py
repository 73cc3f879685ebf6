"""The key of encrypted points: a file, which QEMU reads by itself.

It is on no command line and in no environment.  Checksums of encrypted points are made with
a secret derived from it: others would tell who cannot read the data what it is like.
"""

from __future__ import annotations

import hashlib
import os

from attrs import field, frozen

from ..errors import KeyRefused

MIN_BYTES = 32  # its strength is all there is: QEMU is told not to spend time on weak ones
_MAX_BYTES = 4096
_PERSON = b"snapfs sums"
SECRET = "key"  # its name among QEMU's objects


@frozen
class Key:
    """A key file.  `secret`: for checksums."""

    path: str
    secret: bytes = field(repr=False)

    @classmethod
    def read(cls, path: str) -> Key:
        """Raises KeyRefused if it cannot be a key, OSError if it cannot be read."""
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
        try:
            content.decode()
            text = b"\0" not in content
        except UnicodeDecodeError:
            text = False
        if not text or not MIN_BYTES <= len(content) <= _MAX_BYTES:
            raise KeyRefused(
                f"{path} is no key: {MIN_BYTES} to {_MAX_BYTES} bytes of random text are one, as "
                f"openssl rand -base64 48 makes it"
            )
        return cls(os.path.abspath(path), hashlib.blake2b(content, person=_PERSON).digest())

    @property
    def objects(self) -> list[str]:
        """Arguments for QEMU's programs; a comma in a path is doubled."""
        return ["--object", f"secret,id={SECRET},file={self.path.replace(',', ',,')}"]


def secret_of(key: Key | None) -> bytes | None:
    """For checksums of encrypted data, None for others."""
    return None if key is None else key.secret
