"""One queue in front of several engines of a machine: a process of its own, an engine to its clients, and a client to
its engines."""
