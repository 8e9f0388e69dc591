"""Renewal of keys for the processes of a cluster, by the command whose profile makes them, for as long as it runs.

Keys of SSO, an assumed role or a credential process can be made only on the caller's machine. They are sent as they are
at that moment; when the store refuses them, tasks and ranks ask here for newer ones.
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


class NewestKeys:
    """The newest keys of a command. A plain class: `start_renewal` makes an actor of it.

    Failure: ends with the command's driver; a process that asks afterwards looks for keys of its own.
    Blocking: every method is O(1).
    """

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._asked = False

    def put(self, keys: Keys) -> None:
        """Take newer ones."""
        self._keys = keys

    def get(self) -> Keys:
        """The newest; the store refused the caller with older ones, or with these."""
        self._asked = True
        return self._keys

    def was_asked(self) -> bool:
        """Whether `get` was called since this was last called."""
        asked, self._asked = self._asked, False
        return asked


@dataclass(frozen=True)
class KeyRenewal:
    """Asks one command's NewestKeys; travels with a Storage."""

    name: str

    @classmethod
    def new(cls) -> KeyRenewal:
        """Of an actor that is not started yet."""
        return cls(f"keys-{secrets.token_hex(8)}")

    def __call__(self) -> Keys | None:
        """The newest keys; None if the actor is gone, or this process does not belong to its cluster."""
        import ray
        from ray.exceptions import RayError

        if not ray.is_initialized():
            return None
        try:
            newest: Any = ray.get_actor(self.name)
            keys: Keys = ray.get(newest.get.remote(), timeout=ANSWER_SECONDS)
        except (RayError, ValueError, TimeoutError):
            return None
        return keys


def start_renewal(storage: Storage) -> None:
    """Renew a store's keys that only this machine can make, for as long as this process lives.

    Ray must be connected. Does nothing for keys that do not expire, nor if there are none by now: whatever needs them
    reports that.
    """
    profile, renewal = storage.profile, storage.renewal
    if profile is None or not isinstance(renewal, KeyRenewal):
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
    actor: Any = ray.remote(NewestKeys)
    keys = Keys(str(now.key), str(now.secret), now.token)
    newest = actor.options(name=renewal.name, num_cpus=0, scheduling_strategy=here).remote(keys)
    threading.Thread(target=_renew, args=(profile, newest, keys), name="key-renewal", daemon=True).start()


def _renew(profile: ProfileKeys, newest: Any, known: Keys) -> None:
    """Put newer keys into the actor until it is gone: those that botocore renewed, and those that were asked for."""
    import ray
    from ray.exceptions import RayError

    while True:
        time.sleep(LOOK_SECONDS)
        try:
            if ray.get(newest.was_asked.remote(), timeout=ANSWER_SECONDS):
                profile.forget()
            keys = profile.now()
            if keys != known:
                ray.get(newest.put.remote(keys), timeout=ANSWER_SECONDS)
                known = keys
        except ProfileKeysError as error:
            logger.warning("keys could not be renewed: %s", error)
        except (RayError, RuntimeError, ValueError):  # the command has ended
            return
