"""Conformance suites and broken parts, for whoever writes a part of their own. Needs pytest (and Hypothesis).

Import the modules: ``backends`` (BackendTests, backend_state_machine), ``faulty`` (FaultyBackend). Nothing
else of lmcache_sdk imports them.
"""
