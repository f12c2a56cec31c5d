"""The error tree. Cache trouble at run time is a miss and a counter; these are raised at start, and to operators.

LMCacheSDKError
├── ConfigError            a setting, URL or argument is wrong              (also ValueError)
├── UnsupportedError       a model, layout or engine feature refused by name (also ValueError)
├── LayoutError            engine memory is not what was declared           (also ValueError)
├── DeviceError            an accelerator or its driver failed
├── RecordError            stored bytes are not the record that was asked for
└── BackendError           a storage backend failed
    ├── BackendUnavailable   it cannot be reached or used now               (also ConnectionError)
    ├── BackendFull          there is no room for the record
    ├── BackendLocked        another process has the store open
    └── BackendFormatError   the store was written by another format version, or is none of ours

Every message names the value that was wrong and, where there is one, the fix.
"""


class LMCacheSDKError(Exception):
    """Base of all errors of this project."""


class ConfigError(LMCacheSDKError, ValueError):
    """A setting, URL or argument is wrong. Raised before anything is written."""


class UnsupportedError(LMCacheSDKError, ValueError):
    """A model, layout or engine feature is not served; the message names it."""


class LayoutError(LMCacheSDKError, ValueError):
    """Engine memory does not have the declared shape, or failed its proof at registration."""


class DeviceError(LMCacheSDKError):
    """An accelerator or its driver failed. What had been queued there may have happened, or not."""


class RecordError(LMCacheSDKError):
    """Stored bytes are not the record that was asked for.

    Attributes:
        reason: one word for the counter: ``magic``, ``version``, ``header``, ``key``, ``length``, ``payload``,
            ``codec``.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class BackendError(LMCacheSDKError):
    """A storage backend failed."""


class BackendUnavailable(BackendError, ConnectionError):
    """The backend cannot be reached or used now; later may help."""


class BackendFull(BackendError):
    """There is no room for the record, even after eviction."""


class BackendLocked(BackendError):
    """Another process has the store open."""


class BackendFormatError(BackendError):
    """The store was written by another format version, or is not a store."""
