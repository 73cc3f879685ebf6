"""Bytes: system calls, threads for what blocks, locks, images.

Knows no snapshot and imports no other folder.
"""
