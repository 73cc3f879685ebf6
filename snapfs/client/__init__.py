"""How any program finds a mount and talks to its daemon.

Knows /proc, the control socket's words and nothing of the daemon's insides;
imports no other folder.
"""
