"""midlogit on Ray: a callable class for pipelines of Ray Data, and the pool of actors that runs a job's parts."""

from midlogit.ray.generate import Generate
from midlogit.ray.pool import actor_pool

__all__ = ["Generate", "actor_pool"]
