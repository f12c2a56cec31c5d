"""Conformance suites and broken parts, for whoever writes a part of their own. Needs pytest (and Hypothesis):
``pip install 'lmcache-sdk[testing]'``.

Import the modules: ``backends`` (BackendTests, backend_state_machine), ``codecs``, ``eviction``, ``kernels``,
``harness`` (an engine as a child process); backends around a backend: ``faulty`` (Faulty), ``latency`` (Latency),
``throttled`` (Throttled), ``logged`` (Logged); and ``proxy`` (Proxy), which breaks a connection. Nothing else of
lmcache_sdk imports them.
"""
