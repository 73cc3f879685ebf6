"""Programs on top of a mount: copies of snapshots, and backups made of them.

They are clients: they talk to the daemon through the control socket, read
snapshots as files, and know nothing of the engine.
"""
