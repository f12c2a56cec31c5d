"""``redis://`` and its kin: records in Redis or Valkey, on one server or in a cluster. See ``docs/redis.md``."""

from lmcache_backends.redis.backend import RedisBackend

__all__ = ["RedisBackend"]
