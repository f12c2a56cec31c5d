"""``s3://``: records in a bucket of any S3-compatible store. Needs the extra ``s3``."""

from lmcache_backends.s3.backend import S3Backend

__all__ = ["S3Backend"]
