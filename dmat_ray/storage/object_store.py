"""pyarrow's file systems of object stores, with limits on how long they wait, and their errors in plain words."""

import contextlib
import functools
import os
import re
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from pyarrow import fs

SCHEMES = ("s3", "gs")
# a store that is not there is given up within a minute; a busy one may be silent for longer than pyarrow's 3 s
CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S, ATTEMPTS = 5, 10, 4
REFUSALS = ("ACCESS_DENIED", "HTTP status 403", "PERMISSION_DENIED")
VARIABLES = ("AWS_", "GOOGLE_", "STORAGE_", "CLOUDSDK_")

# what pyarrow's long texts mean
REASONS = {
    "NETWORK_CONNECTION": "{endpoint} cannot be reached ({detail}); AWS_ENDPOINT_URL is where S3 is looked for",
    "UNAVAILABLE": "the store cannot be reached ({detail})",
    "NO_SUCH_BUCKET": "there is no bucket '{bucket}'",
    "ACCESS_DENIED": "access denied; which credentials are used is said by AWS_ACCESS_KEY_ID, AWS_PROFILE or the machine's role",
    "INVALID_ACCESS_KEY_ID": "the store does not know the key in AWS_ACCESS_KEY_ID or AWS_PROFILE",
    "ExpiredToken": "the credentials have expired; renew what AWS_SESSION_TOKEN, AWS_PROFILE or the machine's role gives",
    "REQUEST_TIME_TOO_SKEWED": "the clock of this machine is wrong: requests are signed with a time that the store does not take",
    "RequestTimeTooSkewed": "the clock of this machine is wrong: requests are signed with a time that the store does not take",
    "SIGNATURE_DOES_NOT_MATCH": "the store does not take the secret in AWS_SECRET_ACCESS_KEY or AWS_PROFILE",
}


def is_its_error(error: Exception) -> bool:
    """True if an error is about the store or the way to it, not about what a file holds."""
    return isinstance(error, OSError) and any(name in str(error) for name in ("AWS Error", "google::cloud"))


def explain(text: str) -> str:
    """What the text of an error of pyarrow means for the user."""
    text = " ".join(text.split())
    # the first is one that the SDK has no name for
    code = re.search(r"ExceptionName: (\w+)", text) or re.search(r"AWS Error (\w+)|google::cloud::Status\((\w+)", text)
    plain = next((REASONS[name] for name in code.groups() if name in REASONS), None) if code else None
    if plain is None and "HTTP status 400" in text and "No response body" in text:
        plain = "the store refuses without a word (HTTP status 400), as it does when credentials have expired; renew them"
    if plain is None:
        return re.sub(r" \(Request ID: \w+\)", "", text)[:300]
    bucket = re.search(r"in bucket '([^']*)'", text)
    detail = re.split(r"Details: |message was: ", text)[-1][:100]
    return plain.format(endpoint=_endpoint() or "AWS", bucket=bucket[1] if bucket else "", detail=detail)


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def filesystem(scheme: str, bucket: str) -> fs.FileSystem:
    """The file system for a bucket, as the environment now says. Made when it is first needed: that starts threads."""
    return _made(scheme, bucket, tuple(sorted(item for item in os.environ.items() if item[0].startswith(VARIABLES))))


def scheme_of(found: fs.FileSystem) -> str:
    """The scheme of URLs in this file system; '' if it is of this machine."""
    return {"s3": "s3", "gcs": "gs"}.get(found.type_name, "")


@functools.lru_cache(maxsize=64)
def _made(scheme: str, bucket: str, variables: tuple[tuple[str, str], ...]) -> fs.FileSystem:
    if scheme == "gs":
        return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=15))
    options: dict[str, Any] = {}
    if endpoint := _endpoint():  # pyarrow itself does not look for it
        url = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
        options = {"scheme": url.scheme, "endpoint_override": url.netloc}
    elif not os.environ.get("AWS_REGION") and not os.environ.get("AWS_DEFAULT_REGION"):
        with contextlib.suppress(OSError):  # then the store's own answer will say what is wrong
            options = {"region": fs.resolve_s3_region(bucket)}
    return fs.S3FileSystem(
        **options,
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        allow_delayed_open=True,  # a small file is one request instead of three
    )
