"""S3 and S3-compatible stores, through s3fs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar

from latentcache.errors import AccessDenied, StorageError, first_line
from latentcache.storage.backend import Backend, ObjectInfo, Upload
from latentcache.storage.failures import FinalStorageError
from latentcache.storage_options import StorageOptions

# The messages of full S3 stores: Ceph, MinIO, and stores that repeat the message of their disk.
_FULL_MESSAGES = (
    "(QuotaExceeded)",
    "StorageFull)",
    "no space left on device",
    "disk quota exceeded",
)


class S3Backend(Backend):
    """A folder of a bucket."""

    transports = Backend.transports | {"botocore", "s3fs"}
    invalid = frozenset({"ParamValidationError"})
    page_size: ClassVar[int] = 1000  # objects that S3 lists or deletes in one request

    @classmethod
    def arguments(cls, options: StorageOptions) -> dict[str, Any]:
        """Return the arguments of fsspec's client."""
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

    def _bucket_and_prefix(self, folder: str = "") -> tuple[str, str]:
        bucket, key, _ = self.client.split_path(self.full(folder))
        return bucket, f"{key}/" if key else ""

    def now(self) -> float:
        """Return the store's time in seconds since 1970; the host's time if S3 sends no date."""
        bucket, _ = self._bucket_and_prefix()
        reply = self.client.call_s3("head_bucket", Bucket=bucket)
        date = reply["ResponseMetadata"]["HTTPHeaders"].get("date")
        return parsedate_to_datetime(date).timestamp() if date else time.time()

    def page(self, folder: str, token: str | None) -> tuple[Sequence[ObjectInfo], str | None]:
        """List up to `page_size` objects below a folder, at any depth.

        Args:
            folder: the folder.
            token: the token of the page, from the previous call; None for the first page.

        Returns:
            The objects, and the token of the next page; None after the last page.
        """
        bucket, prefix = self._bucket_and_prefix(folder)
        request: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": self.page_size}
        if token:
            request["ContinuationToken"] = token
        page = self.client.call_s3("list_objects_v2", **request)
        infos = []
        for entry in page.get("Contents", ()):
            if not entry["Key"].endswith("/"):  # consoles put such objects to show a folder
                below = entry["Key"].removeprefix(prefix)
                path = f"{folder}/{below}" if folder else below
                infos.append(self.info_of(path, {**entry, "size": entry["Size"]}))
        return infos, page["NextContinuationToken"] if page.get("IsTruncated") else None

    def delete_page(self, paths: Sequence[str]) -> Sequence[str]:
        """Delete up to `page_size` objects with one request; return those that still exist."""
        keys = {self.client.split_path(self.full(path))[1]: path for path in paths}
        bucket, _ = self._bucket_and_prefix()
        request = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        reply = self.client.call_s3("delete_objects", Bucket=bucket, Delete=request)
        return [keys[error["Key"]] for error in reply.get("Errors", ())]

    def uploads(self, after: dict[str, str]) -> tuple[Sequence[Upload], dict[str, str] | None]:
        """List one page of the unfinished multipart uploads, whether active or abandoned.

        Args:
            after: the end of the previous page; empty for the first page.

        Returns:
            The uploads, and the end of the page; None after the last page.
        """
        bucket, prefix = self._bucket_and_prefix()
        request = {"Bucket": bucket, "Prefix": prefix, "MaxUploads": self.page_size, **after}
        page = self.client.call_s3("list_multipart_uploads", **request)
        uploads = [
            Upload(
                entry["Key"].removeprefix(prefix),
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
        bucket, key, _ = self.client.split_path(self.full(upload.path))
        self.client.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload.id)

    def is_foreign(self, error: Exception) -> bool:
        """Return whether an exception comes from the store and not from a bug of this package."""
        return super().is_foreign(error) or _is_bad_endpoint(error)

    def explain(self, error: BaseException, url: str) -> StorageError:
        """Return the error of this package for an exception of the client, with how to fix it.

        Args:
            error: what the client raised.
            url: the object's URL.
        """
        from botocore.exceptions import (
            NoCredentialsError,
            PartialCredentialsError,
            ProfileNotFound,
        )

        message = f"{error} {error.__cause__}"
        if isinstance(error, StorageError):
            return error
        if any(words in message for words in _FULL_MESSAGES):
            return self.full_error(url)
        if "NoSuchBucket" in str(error.__cause__):
            return FinalStorageError(f"cannot use {url}: there is no such bucket{self.where}")
        if _is_bad_endpoint(error):
            return FinalStorageError(
                f"cannot use {url}: {first_line(error)}; correct AWS_ENDPOINT_URL or "
                "`endpoint_url` of the AWS profile, which begin with http:// or https://"
            )
        if isinstance(error, NoCredentialsError | PartialCredentialsError):
            return AccessDenied(
                f"no credentials for {url}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, name "
                "a profile in `storage.profile`, or set `storage.anon: true` for a public bucket"
            )
        if isinstance(error, ProfileNotFound):
            return AccessDenied(f"cannot open {url}: {first_line(error)}")
        if "RequestTimeTooSkewed" in str(error.__cause__):
            return AccessDenied(f"{url} rejects the time of this machine: set its clock")
        return super().explain(error, url)


def _is_bad_endpoint(error: BaseException) -> bool:
    # botocore raises a plain ValueError for an endpoint that AWS_ENDPOINT_URL or a profile names.
    return isinstance(error, ValueError) and str(error).startswith("Invalid endpoint")
