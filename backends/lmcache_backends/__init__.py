"""The built-in storage backends, found by URL scheme through entry points like a third party's."""
