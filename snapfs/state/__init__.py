"""What outlives the daemon: the state directory, recovery, check.

Knows the engine's records and `storage`; no FUSE, no trio of requests, no command line.
"""
