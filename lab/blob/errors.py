"""Errors of the blob service, with the status each code travels under (Blob service error codes, REST reference)."""

from __future__ import annotations

STATUS: dict[str, int] = {
    "AuthenticationFailed": 403,
    "AuthorizationFailure": 403,
    "AuthorizationPermissionMismatch": 403,
    "AuthorizationProtocolMismatch": 403,
    "AuthorizationResourceTypeMismatch": 403,
    "AuthorizationServiceMismatch": 403,
    "AuthorizationSourceIPMismatch": 403,
    "BlobAlreadyExists": 409,
    "BlobNotFound": 404,
    "BlobOverwritten": 409,
    "BlockCountExceedsLimit": 409,
    "CannotVerifyCopySource": 404,
    "ConditionNotMet": 412,
    "ContainerAlreadyExists": 409,
    "ContainerNotFound": 404,
    "CopyAcrossAccountsNotSupported": 409,
    "CopyIdMismatch": 409,
    "Crc64Mismatch": 400,
    "InternalError": 500,
    "InvalidAuthenticationInfo": 401,
    "InvalidBlobOrBlock": 400,
    "InvalidBlobType": 409,
    "InvalidBlockId": 400,
    "InvalidBlockList": 400,
    "InvalidHeaderValue": 400,
    "InvalidInput": 400,
    "InvalidMd5": 400,
    "InvalidMetadata": 400,
    "InvalidPageRange": 416,
    "InvalidQueryParameterValue": 400,
    "InvalidRange": 416,
    "InvalidResourceName": 400,
    "InvalidSourceBlobType": 409,
    "InvalidSourceBlobUrl": 409,
    "InvalidUri": 400,
    "InvalidXmlDocument": 400,
    "LeaseAlreadyPresent": 409,
    "LeaseIdMismatchWithBlobOperation": 412,
    "LeaseIdMismatchWithContainerOperation": 412,
    "LeaseIdMismatchWithLeaseOperation": 409,
    "LeaseIdMissing": 412,
    "LeaseIsBreakingAndCannotBeAcquired": 409,
    "LeaseIsBreakingAndCannotBeChanged": 409,
    "LeaseIsBrokenAndCannotBeRenewed": 409,
    "LeaseLost": 412,
    "LeaseNotPresentWithBlobOperation": 412,
    "LeaseNotPresentWithContainerOperation": 412,
    "LeaseNotPresentWithLeaseOperation": 409,
    "Md5Mismatch": 400,
    "MetadataTooLarge": 400,
    "MissingContentLengthHeader": 411,
    "MissingRequiredHeader": 400,
    "MissingRequiredQueryParameter": 400,
    "NoAuthenticationInformation": 401,
    "NoPendingCopyOperation": 409,
    "OperationTimedOut": 500,
    "OutOfRangeInput": 400,
    "OutOfRangeQueryParameterValue": 400,
    "PendingCopyOperation": 409,
    "PreviousSnapshotCannotBeNewer": 400,
    "PreviousSnapshotNotFound": 409,
    "RequestBodyTooLarge": 413,
    "ResourceNotFound": 404,
    "SequenceNumberConditionNotMet": 412,
    "SequenceNumberIncrementTooLarge": 409,
    "ServerBusy": 503,
    "SnapshotCountExceeded": 409,
    "SnapshotOperationRateExceeded": 409,
    "SnapshotsPresent": 409,
    "SourceConditionNotMet": 412,
    "TargetConditionNotMet": 412,
    "TooManyRequests": 429,
    "UnauthorizedBlobOverwrite": 403,
    "UnsupportedHeader": 400,
    "UnsupportedHttpVerb": 405,
    "UnsupportedQueryParameter": 400,
}


class StorageError(Exception):
    """An answer of the blob service other than success; `status` and `code` are what a client sees."""

    def __init__(
        self,
        code: str,
        message: str = "",
        *,
        status: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(f"{code}: {message}" if message else code)
        self.code = code
        self.status = STATUS[code] if status is None else status
        self.message = message or code
        self.headers = headers or {}


class NotModified(Exception):
    """A conditional read found nothing newer: 304 without a body."""

    def __init__(self, etag: str) -> None:
        super().__init__("304 Not Modified")
        self.etag = etag


class BlobAuthError(StorageError):
    """The caller's signature, time window or permissions do not allow this."""


class BlobNotFound(StorageError):
    """There is no such container, blob or snapshot."""
