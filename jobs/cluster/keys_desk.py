"""Where processes of a cluster ask for newer keys, while the command lives that has the profile which makes them.

Keys of SSO, an assumed role or a credential process can be made on the caller's machine alone. They travel as they are
at that moment; when the store refuses them, the tasks and ranks ask here.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from dataclasses import dataclass
from typing import Any

from pipeline.access.profile_keys import Keys, ProfileKeys, ProfileKeysError
from pipeline.errors import StorageError
from pipeline.store.storage import Storage

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0
LOOK_SECONDS = 2.0


class KeysDesk:
    """The newest keys of a command. A plain class: `open_desk` makes an actor of it.

    Failure: goes with the command's driver; who asks then looks for keys of its own.
    Blocking: every method is O(1).
    """

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._asked = False

    def put(self, keys: Keys) -> None:
        """Take newer ones."""
        self._keys = keys

    def get(self) -> Keys:
        """The newest; whoever asks was refused with older ones, or with these."""
        self._asked = True
        return self._keys

    def was_asked(self) -> bool:
        """Whether somebody asked since this was last called."""
        asked, self._asked = self._asked, False
        return asked


@dataclass(frozen=True)
class DeskAddress:
    """Asks the desk of one command; what travels with a Storage."""

    name: str

    @classmethod
    def new(cls) -> DeskAddress:
        """Of a desk that is not open yet."""
        return cls(f"keys-{secrets.token_hex(8)}")

    def __call__(self) -> Keys | None:
        """The newest keys; None where the desk is gone, or this process is not of its cluster."""
        import ray
        from ray.exceptions import RayError

        if not ray.is_initialized():
            return None
        try:
            desk: Any = ray.get_actor(self.name)
            keys: Keys = ray.get(desk.get.remote(), timeout=ANSWER_SECONDS)
        except (RayError, ValueError, TimeoutError):
            return None
        return keys


def open_desk(storage: Storage) -> None:
    """Open the desk of a store whose keys only this machine can renew, for as long as this process lives.

    Ray is connected. Does nothing for keys that do not expire, and where there are none by now: who needs them says so.
    """
    profile, address = storage.profile, storage.renewal
    if profile is None or not isinstance(address, DeskAddress):
        return
    try:
        now = storage.for_others()
    except StorageError as error:
        logger.debug("no keys to renew: %s", error)
        return
    if now.token is None:
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor: Any = ray.remote(KeysDesk)
    keys = Keys(str(now.key), str(now.secret), now.token)
    desk = actor.options(name=address.name, num_cpus=0, scheduling_strategy=here).remote(keys)
    threading.Thread(target=_renew, args=(profile, desk, keys), name="keys-desk", daemon=True).start()


def _renew(profile: ProfileKeys, desk: Any, known: Keys) -> None:
    """Bring newer keys to the desk until it is gone: such as botocore renewed, and such as were asked for."""
    import ray
    from ray.exceptions import RayError

    while True:
        time.sleep(LOOK_SECONDS)
        try:
            if ray.get(desk.was_asked.remote(), timeout=ANSWER_SECONDS):
                profile.forget()
            keys = profile.now()
            if keys != known:
                ray.get(desk.put.remote(keys), timeout=ANSWER_SECONDS)
                known = keys
        except ProfileKeysError as error:
            logger.warning("keys could not be renewed: %s", error)
        except (RayError, RuntimeError, ValueError):  # the command has ended
            return
