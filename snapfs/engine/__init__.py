"""Copy-before-write: what is copied when, where a snapshot finds its bytes, who waits.

Pure: knows the Image protocol of `storage`, trio and bits; no path, no FUSE, no command line.
"""
