"""Settings of all tests."""

from hypothesis import settings

settings.register_profile("default", deadline=None)  # no assertion on wall time: the machine may be busy
settings.load_profile("default")
