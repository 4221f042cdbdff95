"""One small class for object stores and local folders: read, list, and put exactly once."""

from latentcache.storage.backend import DANGLING, ObjectInfo, Upload
from latentcache.storage.store import Store, split_url

__all__ = ["DANGLING", "ObjectInfo", "Store", "Upload", "split_url"]
