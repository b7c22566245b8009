//! What an AWS call failed with: one type, made from the SDK's many in one
//! place. Decisions read [`Error::kind`], [`Error::code`] and
//! [`Error::failure`], never the message.

use std::fmt;

use aws_runtime::retries::classifiers::THROTTLING_ERRORS;
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_smithy_runtime_api::client::result::SdkError;
use aws_smithy_types::error::metadata::ProvideErrorMetadata;

use crate::Failure;

/// What kind of failure it is, whatever the service calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The caller may not do this, or nobody knows who it is.
    Access,
    /// The object, bucket, queue, topic, function or cluster is not there.
    NotFound,
    /// Asked too often.
    Throttled,
    /// The service will not take this very request.
    Refused,
    /// The request, or one entry of it, is over a limit.
    TooLarge,
    /// No answer, or one that broke off.
    Network,
    /// The service failed, or answered a code that is not known here.
    Other,
}

/// Prefix of the codes that SQS has kept from its older protocol.
const SQS_PREFIX: &str = "AWS.SimpleQueueService.";

/// What the codes mean and whether a later try can succeed, from the error
/// lists of the API references of S3, SQS, SNS, EventBridge, Lambda, ECS and
/// Auto Scaling. What is not known to be permanent is transient: a wrong retry
/// costs seconds, a wrong rejection costs an image.
const CODES: &[(ErrorKind, Failure, &str)] = &[
    // Transient: a role that is being fixed must not cost the images that
    // arrive meanwhile.
    (
        ErrorKind::Access,
        Failure::Transient,
        "AccessDenied AccessDeniedException AuthorizationError ExpiredToken \
         ExpiredTokenException InvalidAccessKeyId InvalidClientTokenId \
         InvalidSignatureException KMSAccessDenied KMSAccessDeniedException KmsAccessDenied \
         MissingAuthenticationToken NotAuthorized SignatureDoesNotMatch \
         UnrecognizedClientException",
    ),
    // What the input names is gone.
    (
        ErrorKind::NotFound,
        Failure::Permanent,
        "NoSuchBucket NoSuchKey NoSuchVersion NotFound",
    ),
    // What the configuration names is missing, which is not the input's fault.
    (
        ErrorKind::NotFound,
        Failure::Transient,
        "ClusterNotFoundException InvalidAddress NonExistentQueue QueueDoesNotExist \
         ResourceNotFoundException",
    ),
    // Beside the SDK's own list.
    (
        ErrorKind::Throttled,
        Failure::Transient,
        "KMSThrottling KMSThrottlingException KmsThrottled OverLimit Throttled",
    ),
    (
        ErrorKind::TooLarge,
        Failure::Permanent,
        "BatchRequestTooLong EntityTooLarge KeyTooLongError MessageTooLong \
         RequestEntityTooLargeException RequestTooLargeException",
    ),
    (
        ErrorKind::Refused,
        Failure::Permanent,
        "InvalidArgument InvalidBucketName InvalidMessageContents InvalidObjectState \
         InvalidParameter InvalidParameterValue InvalidRange InvalidRequest MalformedDetail \
         MessageNotInflight MethodNotAllowed ReceiptHandleIsInvalid ValidationError \
         ValidationException",
    ),
];

/// A call of an AWS API, or one entry of a batch, that failed after the SDK's
/// own retries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// What was called: `s3:GetObject`.
    pub operation: &'static str,
    /// What it was about, where that says more: a URL, a name.
    pub resource: Option<Box<str>>,
    /// What kind of failure it is.
    pub kind: ErrorKind,
    /// AWS's code without `AWS.SimpleQueueService.`, or a word for what went
    /// wrong before AWS could answer one.
    pub code: String,
    /// AWS's message with the request's id, or what the network said.
    pub message: String,
    /// Whether a later try can succeed. The code decides, unless the caller
    /// knows better: a missing bucket may be the input's fault or ours.
    pub failure: Failure,
}

impl Error {
    /// What a code means, be it of a whole answer or of a batch's entry.
    pub fn of_code(operation: &'static str, code: &str, message: impl Into<String>) -> Self {
        let code = code.strip_prefix(SQS_PREFIX).unwrap_or(code);
        let known = CODES
            .iter()
            .find(|(_, _, codes)| codes.split(' ').any(|known| known == code));
        let (kind, failure) = match known {
            Some((kind, failure, _)) => (*kind, *failure),
            None if THROTTLING_ERRORS.contains(&code) => (ErrorKind::Throttled, Failure::Transient),
            None => (ErrorKind::Other, Failure::Transient),
        };
        Self {
            operation,
            resource: None,
            kind,
            code: code.to_owned(),
            message: message.into(),
            failure,
        }
    }

    /// No answer, or one that broke off: a later try can succeed.
    pub fn network(operation: &'static str, code: &str, problem: &dyn std::error::Error) -> Self {
        Self {
            kind: ErrorKind::Network,
            ..Self::of_code(operation, code, chain(problem))
        }
    }

    /// What an operation of the SDK failed with.
    pub fn from_sdk<E>(operation: &'static str, error: &SdkError<E, HttpResponse>) -> Self
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        match error {
            SdkError::ServiceError(service) => {
                let status = service.raw().status().as_u16();
                // An answer to HEAD has no body: only its status speaks.
                let code = service.err().code().unwrap_or(match status {
                    403 => "AccessDenied",
                    404 => "NotFound",
                    413 => "EntityTooLarge",
                    429 => "Throttled",
                    _ => "NoCode",
                });
                let message = match service.err().message() {
                    Some(message) => message.to_owned(),
                    None => format!("HTTP {status} without a message"),
                };
                match service.err().meta().extra("aws_request_id") {
                    Some(id) => Self::of_code(operation, code, format!("{message} (request {id})")),
                    None => Self::of_code(operation, code, message),
                }
            }
            SdkError::ConstructionFailure(_) => Self {
                kind: ErrorKind::Refused,
                failure: Failure::Permanent,
                ..Self::of_code(operation, "Unsendable", chain(error))
            },
            SdkError::TimeoutError(_) => Self::network(operation, "Timeout", error),
            SdkError::DispatchFailure(dispatch) if dispatch.is_timeout() => {
                Self::network(operation, "Timeout", error)
            }
            // Such as credentials that cannot be had.
            SdkError::DispatchFailure(dispatch) if !dispatch.is_io() => {
                Self::of_code(operation, "NotSent", chain(error))
            }
            SdkError::DispatchFailure(_) => Self::network(operation, "Unreachable", error),
            _ => Self::network(operation, "BadResponse", error),
        }
    }

    /// The same about `resource`.
    pub fn of(self, resource: impl Into<String>) -> Self {
        Self {
            resource: Some(resource.into().into_boxed_str()),
            ..self
        }
    }
}

/// For `map_err`: what `operation` failed with.
pub fn failed<E>(operation: &'static str) -> impl FnOnce(SdkError<E, HttpResponse>) -> Error
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    move |error| Error::from_sdk(operation, &error)
}

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            operation,
            code,
            message,
            ..
        } = self;
        match &self.resource {
            Some(resource) => write!(formatter, "{operation} of {resource}: {code}: {message}"),
            None => write!(formatter, "{operation}: {code}: {message}"),
        }
    }
}

impl std::error::Error for Error {}

/// An error with its causes, whose own texts say little.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use aws_smithy_runtime_api::client::result::ConnectorError;
    use aws_smithy_runtime_api::http::StatusCode;
    use aws_smithy_types::body::SdkBody;
    use aws_smithy_types::error::ErrorMetadata;

    use super::*;

    fn error_of(error: SdkError<ErrorMetadata, HttpResponse>) -> Error {
        failed("s3:GetObject")(error)
    }

    fn service_error(code: Option<&str>, status: u16) -> Error {
        let mut metadata = ErrorMetadata::builder();
        if let Some(code) = code {
            metadata = metadata.code(code);
        }
        let status = StatusCode::try_from(status).expect("a valid status");
        error_of(SdkError::service_error(
            metadata.build(),
            HttpResponse::new(status, SdkBody::empty()),
        ))
    }

    #[test]
    fn a_gone_object_is_permanent() {
        for error in [
            service_error(Some("NoSuchKey"), 404),
            service_error(None, 404),
        ] {
            assert_eq!(error.kind, ErrorKind::NotFound);
            assert_eq!(error.failure, Failure::Permanent);
        }
    }

    #[test]
    fn a_missing_queue_is_transient_since_no_message_is_at_fault() {
        let error = service_error(Some("AWS.SimpleQueueService.NonExistentQueue"), 400);
        assert_eq!(error.kind, ErrorKind::NotFound);
        assert_eq!(error.failure, Failure::Transient);
        assert_eq!(error.code, "NonExistentQueue");
    }

    #[test]
    fn throttling_and_unknown_codes_are_transient() {
        for (code, status, kind) in [
            (Some("SlowDown"), 503, ErrorKind::Throttled),
            (Some("ThrottlingException"), 400, ErrorKind::Throttled),
            (None, 429, ErrorKind::Throttled),
            (Some("New"), 400, ErrorKind::Other),
            (None, 500, ErrorKind::Other),
        ] {
            let error = service_error(code, status);
            assert_eq!(
                (error.kind, error.failure),
                (kind, Failure::Transient),
                "{error}"
            );
        }
    }

    #[test]
    fn a_refused_access_is_transient_so_that_a_fixed_role_loses_nothing() {
        for error in [
            service_error(Some("AccessDenied"), 403),
            service_error(None, 403),
        ] {
            assert_eq!(error.kind, ErrorKind::Access);
            assert_eq!(error.failure, Failure::Transient);
        }
    }

    #[test]
    fn what_a_request_is_too_large_or_wrong_for_is_permanent() {
        for (code, kind) in [
            (
                "AWS.SimpleQueueService.BatchRequestTooLong",
                ErrorKind::TooLarge,
            ),
            ("ValidationException", ErrorKind::Refused),
            ("ReceiptHandleIsInvalid", ErrorKind::Refused),
        ] {
            let error = Error::of_code("sqs:SendMessageBatch", code, "");
            assert_eq!((error.kind, error.failure), (kind, Failure::Permanent));
        }
    }

    #[test]
    fn a_network_failure_is_transient_and_tells_its_causes() {
        let late = error_of(SdkError::timeout_error("5 s passed"));
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        let unreachable = error_of(SdkError::dispatch_failure(ConnectorError::io(
            refused.into(),
        )));
        for (error, cause) in [(late, "5 s passed"), (unreachable, "connection refused")] {
            assert_eq!(error.kind, ErrorKind::Network);
            assert_eq!(error.failure, Failure::Transient);
            assert!(error.message.contains(cause), "{error}");
        }
    }

    #[test]
    fn a_request_that_cannot_be_built_is_permanent() {
        let error = error_of(SdkError::construction_failure("no bucket"));
        assert_eq!(error.failure, Failure::Permanent);
    }

    #[test]
    fn it_says_what_was_called_on_what_and_what_came_back() {
        let metadata = ErrorMetadata::builder()
            .code("AccessDenied")
            .message("Access Denied")
            .custom("aws_request_id", "4442587FB7D0A2F9")
            .build();
        let status = StatusCode::try_from(403).expect("a valid status");
        let error = error_of(SdkError::service_error(
            metadata,
            HttpResponse::new(status, SdkBody::empty()),
        ));
        assert_eq!(
            error.of("s3://photos/a.png").to_string(),
            "s3:GetObject of s3://photos/a.png: AccessDenied: Access Denied (request 4442587FB7D0A2F9)"
        );
    }
}
