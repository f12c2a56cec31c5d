"""One pool for all engines of a machine, in a process that no engine's crash takes with it.

``protocol`` is what is said over the socket, ``server`` says it over a Store, ``client`` is a Cache that talks to it.
"""
