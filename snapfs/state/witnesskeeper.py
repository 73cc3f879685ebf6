"""Having a witness of the daemon's end, and another one when it has been killed.

Not in witness.py, which the small process imports as well.
"""

from __future__ import annotations

import logging

from .witness import Witness

log = logging.getLogger(__name__)


class WitnessKeeper:
    """Keeps the witness of a mount; there is none before `appoint`."""

    def __init__(self) -> None:
        self._present: Witness | None = None
        self._failed = False  # to be started; logged

    def lives(self) -> bool:
        """Is there one?"""
        return self._present is not None and self._present.lives()

    def appoint(self, image: int, lock: int, page: int, session: int) -> None:
        """Start one, as `Witness.appoint`; that it cannot be is logged, once.  Blocks."""
        try:
            if self._present is not None:
                log.warning("the witness of the daemon's end was killed; it is started anew")
                self.dismiss()
            self._present = Witness.appoint(image, lock, page, session)
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.warning("no witness of the daemon's end can be started: %s", error.strerror)
            self._failed = True

    def dismiss(self) -> None:
        """End it, if there is one, as `Witness.dismiss`."""
        former, self._present = self._present, None
        if former is not None:
            former.dismiss()
