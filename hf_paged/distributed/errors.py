"""What goes wrong between processes."""

from __future__ import annotations


class ParallelError(RuntimeError):
    """The processes that compute one model together cannot go on as they were."""


class PeerLost(ParallelError):
    """Another rank ended, or has not answered for too long. The group is of no use any more."""


class PeerFailed(ParallelError):
    """A step failed on another rank, which told so. Every rank lets go of the step; the next one may be tried."""


class Divergence(ParallelError):
    """Ranks do not do the same. The group is of no use any more."""


class ReplicaLost(ParallelError):
    """A replica's process ended, or has not answered for too long. The others go on."""


class ReplicaFailed(ParallelError):
    """A step failed on a replica, whose unfinished requests ended with it. It goes on with others."""
