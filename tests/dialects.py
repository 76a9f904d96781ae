"""Where a peer computes something else than rljax: what turns our answer into theirs, and why ours differs.

Used by the tables of tests/golden only. Nothing here is a recommendation.
"""
