"""Stands in for xxhash where it is not installed. The digests are others, so they are good within one run only."""
import hashlib
from functools import partial

xxh3_128 = partial(hashlib.blake2b, digest_size=16)
