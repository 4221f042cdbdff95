"""S3 and S3-compatible stores, through s3fs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar

from latentcache.errors import AccessDenied, StorageError, first_line
from latentcache.storage.backend import Backend, ObjectInfo, Upload
from latentcache.storage.failures import FinalStorageError, disk_full
from latentcache.storage_options import StorageOptions

# The messages of full S3 stores: Ceph, MinIO, and stores that repeat the message of their disk.
_FULL = ("(QuotaExceeded)", "StorageFull)", "no space left on device", "disk quota exceeded")


class S3Backend(Backend):
    """A folder of a bucket."""

    transports = Backend.transports | {"botocore", "s3fs"}
    invalid = frozenset({"ParamValidationError"})
    page_size: ClassVar[int] = 1000  # objects that S3 lists or deletes in one request

    @classmethod
    def arguments(cls, options: StorageOptions) -> dict[str, Any]:
        """Return the arguments of the fsspec client."""
        return {
            "anon": options.anon,
            "endpoint_url": options.endpoint_url,
            "profile": options.profile,
            "requester_pays": options.requester_pays,
            # Other processes write to the store too, so a cached listing would be stale.
            "use_listings_cache": False,
            "config_kwargs": {
                "connect_timeout": 10,
                "read_timeout": 60,
                # The default of five tries, multiplied by the tries of `retries.py` and of s3fs,
                # would take a minute to fail.
                "retries": {"mode": "standard", "total_max_attempts": 3},
                # Some stores other than AWS send no checksums, or wrong ones for ranges.
                "response_checksum_validation": "when_required",
                "request_checksum_calculation": "when_required",
            },
        }

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        bucket, _, _ = self.client.split_path(self.url)
        reply: dict[str, Any] = self.client.call_s3(method, Bucket=bucket, **arguments)
        return reply

    def _key(self, path: str = "") -> str:
        return str(self.client.split_path(self.full(path))[1])

    def _prefix(self, folder: str = "") -> str:
        return f"{key}/" if (key := self._key(folder)) else ""

    def now(self) -> float:
        """Return the store's time in seconds since 1970; the host's time if S3 sends no date."""
        date = self._call("head_bucket")["ResponseMetadata"]["HTTPHeaders"].get("date")
        return parsedate_to_datetime(date).timestamp() if date else time.time()

    def page(self, folder: str, token: str) -> tuple[Sequence[ObjectInfo], str | None]:
        """List up to `page_size` objects below a folder, at any depth, and the next page's token.

        Args:
            folder, token: the token is empty for the first page; None follows the last page.
        """
        after = {"ContinuationToken": token} if token else {}
        prefix, infos = self._prefix(folder), []
        page = self._call("list_objects_v2", Prefix=prefix, MaxKeys=self.page_size, **after)
        for entry in page.get("Contents", ()):
            if not entry["Key"].endswith("/"):  # consoles put such objects to show a folder
                below = entry["Key"].removeprefix(prefix)
                path = f"{folder}/{below}" if folder else below
                infos.append(self._info_of(path, {**entry, "size": entry["Size"]}))
        return infos, page["NextContinuationToken"] if page.get("IsTruncated") else None

    def delete_page(self, paths: Sequence[str]) -> Sequence[str]:
        """Delete up to `page_size` objects with one request; return those that still exist."""
        keys = {self._key(path): path for path in paths}
        request = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        reply = self._call("delete_objects", Delete=request)
        return [keys[error["Key"]] for error in reply.get("Errors", ())]

    def uploads(self, after: dict[str, str]) -> tuple[Sequence[Upload], dict[str, str] | None]:
        """List a page of the unfinished uploads, and `after` of the next page or None."""
        request = {"Prefix": self._prefix(), "MaxUploads": self.page_size, **after}
        page = self._call("list_multipart_uploads", **request)
        uploads = [
            Upload(
                entry["Key"].removeprefix(request["Prefix"]),
                entry["UploadId"],
                entry["Initiated"].timestamp(),
            )
            for entry in page.get("Uploads", ())
        ]
        if not page.get("IsTruncated"):
            return uploads, None
        end = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
        return uploads, end

    def abort_upload(self, upload: Upload) -> None:
        """Abort a multipart upload."""
        key = self._key(upload.path)
        self._call("abort_multipart_upload", Key=key, UploadId=upload.id)

    def is_foreign(self, error: Exception) -> bool:
        """Return whether an exception comes from the store and not from a bug of this package."""
        return super().is_foreign(error) or _is_bad_endpoint(error)

    def explain(self, error: BaseException, url: str) -> StorageError:
        """Return the error of this package for an exception of the client.

        Args:
            error, url: what the client raised, and the object's URL.
        """
        cause = str(error.__cause__)
        if any(words in f"{error} {cause}" for words in _FULL):
            return disk_full(url)
        if "NoSuchBucket" in cause:
            return FinalStorageError(f"cannot use {url}: there is no such bucket{self.where}")
        if "RequestTimeTooSkewed" in cause:
            return AccessDenied(f"{url} rejects the time of this machine: set its clock")
        if _is_bad_endpoint(error):
            return FinalStorageError(
                f"cannot use {url}: {first_line(error)}; correct AWS_ENDPOINT_URL or "
                "`endpoint_url` of the AWS profile, which begin with http:// or https://"
            )
        kind = type(error).__name__
        if kind in ("NoCredentialsError", "PartialCredentialsError"):
            return AccessDenied(
                f"no credentials for {url}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, name "
                "a profile in `storage.profile`, or set `storage.anon: true` for a public bucket"
            )
        if kind == "ProfileNotFound":
            return AccessDenied(f"cannot open {url}: {first_line(error)}")
        return super().explain(error, url)


def _is_bad_endpoint(error: BaseException) -> bool:
    # botocore raises a plain ValueError for an endpoint that AWS_ENDPOINT_URL or a profile names.
    return isinstance(error, ValueError) and str(error).startswith("Invalid endpoint")


BACKENDS: dict[str, type[Backend]] = dict.fromkeys(("s3", "s3a"), S3Backend)
