"""Object stores and local folders behind one small class: read, list, and put exactly once."""

from latentcache.storage.backend import DANGLING, ObjectInfo, Upload
from latentcache.storage.store import Store, split_url

__all__ = ["DANGLING", "ObjectInfo", "Store", "Upload", "split_url"]
