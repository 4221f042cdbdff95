"""S3 and stores that speak its protocol, by s3fs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar

from latentcache.errors import AccessDenied, StorageError, first_line
from latentcache.storage.backend import Backend, ObjectInfo, Upload
from latentcache.storage.failures import FinalStorageError
from latentcache.storage_options import StorageOptions

# What S3 stores say when they are full: Ceph, MinIO, and those that pass on what their disk said.
_SAYS_FULL = ("(QuotaExceeded)", "StorageFull)", "no space left on device", "disk quota exceeded")


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
            # Another process writes here too: a cached listing would lie.
            "use_listings_cache": False,
            "config_kwargs": {
                "connect_timeout": 10,
                "read_timeout": 60,
                # The default of five tries times ours times s3fs's would take a minute to fail.
                "retries": {"mode": "standard", "total_max_attempts": 3},
                # Stores that are not AWS send no checksums, or wrong ones for ranges.
                "response_checksum_validation": "when_required",
                "request_checksum_calculation": "when_required",
            },
        }

    def _bucket_and_prefix(self, folder: str = "") -> tuple[str, str]:
        bucket, key, _ = self.client.split_path(self.full(folder))
        return bucket, f"{key}/" if key else ""

    def now(self) -> float:
        """Return the time by the store's clock, in seconds since 1970, if it tells it."""
        bucket, _ = self._bucket_and_prefix()
        reply = self.client.call_s3("head_bucket", Bucket=bucket)
        date = reply["ResponseMetadata"]["HTTPHeaders"].get("date")
        return parsedate_to_datetime(date).timestamp() if date else time.time()

    def page(self, folder: str, token: str | None) -> tuple[Sequence[ObjectInfo], str | None]:
        """List up to `page_size` objects below a folder, at any depth.

        Args:
            folder: where they lie.
            token: of the page before; None for the first.

        Returns:
            The objects, and the token of the next page; None where there is none.
        """
        bucket, prefix = self._bucket_and_prefix(folder)
        request: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": self.page_size}
        if token:
            request["ContinuationToken"] = token
        page = self.client.call_s3("list_objects_v2", **request)
        infos = []
        for entry in page.get("Contents", ()):
            if not entry["Key"].endswith("/"):  # what consoles put to show a folder
                below = entry["Key"].removeprefix(prefix)
                path = f"{folder}/{below}" if folder else below
                infos.append(self.info_of(path, {**entry, "size": entry["Size"]}))
        return infos, page["NextContinuationToken"] if page.get("IsTruncated") else None

    def delete_page(self, paths: Sequence[str]) -> Sequence[str]:
        """Delete up to `page_size` objects with one request; return those that it left."""
        keys = {self.client.split_path(self.full(path))[1]: path for path in paths}
        bucket, _ = self._bucket_and_prefix()
        wanted = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        reply = self.client.call_s3("delete_objects", Bucket=bucket, Delete=wanted)
        return [keys[error["Key"]] for error in reply.get("Errors", ())]

    def uploads(self, after: dict[str, str]) -> tuple[Sequence[Upload], dict[str, str] | None]:
        """List some multipart uploads that are under way or were left.

        Args:
            after: where the page before ended; empty for the first.

        Returns:
            The uploads, and where the page ends; None where there is no other.
        """
        bucket, prefix = self._bucket_and_prefix()
        request = {"Bucket": bucket, "Prefix": prefix, "MaxUploads": self.page_size, **after}
        page = self.client.call_s3("list_multipart_uploads", **request)
        found = [
            Upload(
                entry["Key"].removeprefix(prefix),
                entry["UploadId"],
                entry["Initiated"].timestamp(),
            )
            for entry in page.get("Uploads", ())
        ]
        if not page.get("IsTruncated"):
            return found, None
        end = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
        return found, end

    def abort_upload(self, upload: Upload) -> None:
        """Give up a multipart upload."""
        bucket, key, _ = self.client.split_path(self.full(upload.path))
        self.client.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload.id)

    def is_foreign(self, error: Exception) -> bool:
        """Whether an exception is a store's doing, and not a mistake of ours."""
        return super().is_foreign(error) or _is_bad_endpoint(error)

    def explain(self, error: BaseException, url: str) -> StorageError:
        """Say what a foreign exception means for a URL, and how to fix it."""
        from botocore.exceptions import (
            NoCredentialsError,
            PartialCredentialsError,
            ProfileNotFound,
        )

        said = f"{error} {error.__cause__}"
        if isinstance(error, StorageError):
            return error
        if any(words in said for words in _SAYS_FULL):
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
            return AccessDenied(f"{url} refuses the time of this machine: set its clock")
        return super().explain(error, url)


def _is_bad_endpoint(error: BaseException) -> bool:
    # botocore raises a plain ValueError for an endpoint that AWS_ENDPOINT_URL or a profile names.
    return isinstance(error, ValueError) and str(error).startswith("Invalid endpoint")
