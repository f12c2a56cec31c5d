"""A KV cache that outlives the inference engine, and that every engine can read."""

from lmcache_sdk.api import WHOLE, Cache, Lookup, LookupState, Part, Reservation, Stats, Ticket, Transfer
from lmcache_sdk.backend import Backend, Item, Miss, open_backend
from lmcache_sdk.config import Config, load_config
from lmcache_sdk.connector import GPUConnector
from lmcache_sdk.errors import (
    BackendError,
    BackendFormatError,
    BackendFull,
    BackendLocked,
    BackendUnavailable,
    ConfigError,
    DeviceError,
    LayoutError,
    LMCacheSDKError,
    RecordError,
    UnsupportedError,
)
from lmcache_sdk.keys import Chain, Overlay
from lmcache_sdk.layout import KVLayout, Plane
from lmcache_sdk.open import open_cache
from lmcache_sdk.spec import CellGrid, Group, KVSpec, Namespace, Producer, namespace_of, weights_fingerprint

__version__ = "0.1.0"

__all__ = [
    "WHOLE",
    "Backend",
    "BackendError",
    "BackendFormatError",
    "BackendFull",
    "BackendLocked",
    "BackendUnavailable",
    "Cache",
    "CellGrid",
    "Chain",
    "Config",
    "ConfigError",
    "DeviceError",
    "GPUConnector",
    "Group",
    "Item",
    "KVLayout",
    "KVSpec",
    "LMCacheSDKError",
    "LayoutError",
    "Lookup",
    "LookupState",
    "Miss",
    "Namespace",
    "Overlay",
    "Part",
    "Plane",
    "Producer",
    "RecordError",
    "Reservation",
    "Stats",
    "Ticket",
    "Transfer",
    "UnsupportedError",
    "load_config",
    "namespace_of",
    "open_backend",
    "open_cache",
    "weights_fingerprint",
]
