"""One small class for object stores and local folders: read, list, and put exactly once."""

from latentcache.storage.backend import DANGLING, ObjectInfo, Upload
from latentcache.storage.store import Store, split_url
from latentcache.storage_options import StorageOptions

__all__ = ["DANGLING", "ObjectInfo", "StorageOptions", "Store", "Upload", "split_url"]
