"""Engine adapters: how an inference engine reads and fills the cache. Each engine is imported only when it is used."""
