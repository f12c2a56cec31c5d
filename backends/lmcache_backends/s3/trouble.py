"""What the client's errors mean, and what helps."""

from __future__ import annotations

import re

from lmcache_sdk.errors import BackendUnavailable

# The first that occurs in the error's text: S3's own codes, then what the client says of a connection.
_FIXES = {
    "/latest/api/token": "there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile",
    "NoSuchBucket": "there is no such bucket; create it, or correct the URL",
    "InvalidBucketName": "that is no name of a bucket; correct the URL",
    "InvalidAccessKeyId": "the access key is not known there; check AWS_ACCESS_KEY_ID or the profile, and the endpoint",
    "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY or the profile",
    "ExpiredToken": "the credentials have expired; renew them, and AWS_SESSION_TOKEN with them",
    "InvalidToken": "the session token is wrong; check AWS_SESSION_TOKEN",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
    "AuthorizationHeaderMalformed": "the bucket is in another region; say which by ?region=",
    "PermanentRedirect": "the bucket is in another region; say which by ?region=",
    "configured region": "the bucket is in another region; say which by ?region=",
    "AccessDenied": "these credentials may not do that: reading needs s3:GetObject and s3:ListBucket, writing "
    "s3:PutObject, removing s3:DeleteObject",
    "NotImplemented": "the server lacks something that is needed, such as puts with If-None-Match",
    "SlowDown": "the server asks for fewer requests; lower ?connections=",
    "InvalidCertificate": "the server's certificate is not trusted; name its authority's by ?ca=FILE",
    "InvalidContentType": "the server does not speak TLS; write endpoint=http://…",
    "dns error": "the endpoint's name cannot be resolved",
    "ConnectionRefused": "nothing listens at the endpoint",
    "403 Forbidden": "these credentials may not do that",
    "TimedOut": "no answer in time",
}


def trouble(place: str, error: BaseException) -> BackendUnavailable:
    """What is raised instead. The client's own text tells the request, but no secret."""
    text = str(error)
    for sign, fix in _FIXES.items():
        if sign in text:
            return BackendUnavailable(f"{place}: {fix} ({sign})")
    first = re.split(r"\n|: <", text, maxsplit=1)[0]
    return BackendUnavailable(f"{place}: {type(error).__name__}: {first[:300]}")
