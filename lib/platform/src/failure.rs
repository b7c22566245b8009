//! Every failure is permanent or transient, and its type says which.

use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_smithy_runtime_api::client::result::SdkError;
use aws_smithy_types::error::metadata::ProvideErrorMetadata;

/// Whether trying again can help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The input itself is at fault (bad image, gone object, refused access):
    /// the same call will fail again.
    Permanent,
    /// Throttling, network or capacity: a later try can succeed.
    Transient,
}

/// Error codes that name a fact about the request or its object, which no
/// retry changes. From the error lists of the S3, SQS, SNS and EventBridge API
/// references. `AccessDenied` is absent on purpose: a role that is being
/// fixed must not cost the images that arrive meanwhile.
const PERMANENT_CODES: &[&str] = &[
    "InvalidBucketName",
    "InvalidObjectState",
    "InvalidParameter",
    "InvalidParameterValue",
    "InvalidRange",
    "InvalidRequest",
    "KeyTooLongError",
    "MethodNotAllowed",
    "NoSuchBucket",
    "NoSuchKey",
    "NoSuchVersion",
    "NotFound",
    "ValidationError",
    "ValidationException",
];

/// Tells permanent from transient failures of an AWS call. What is not known
/// to be permanent is transient: a wrong retry costs seconds, a wrong
/// rejection costs an image.
pub fn classify<E: ProvideErrorMetadata>(error: &SdkError<E, HttpResponse>) -> Failure {
    match error {
        SdkError::ConstructionFailure(_) => Failure::Permanent,
        SdkError::ServiceError(service) => match service.err().code() {
            Some(code) if PERMANENT_CODES.contains(&code) => Failure::Permanent,
            Some(_) => Failure::Transient,
            // HeadObject answers without a body, so only the status speaks.
            None if service.raw().status().as_u16() == 404 => Failure::Permanent,
            None => Failure::Transient,
        },
        _ => Failure::Transient,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_smithy_runtime_api::http::StatusCode;
    use aws_smithy_types::body::SdkBody;
    use aws_smithy_types::error::ErrorMetadata;

    fn service_error(code: Option<&str>, status: u16) -> SdkError<ErrorMetadata, HttpResponse> {
        let mut metadata = ErrorMetadata::builder();
        if let Some(code) = code {
            metadata = metadata.code(code);
        }
        let status = StatusCode::try_from(status).expect("a valid status");
        SdkError::service_error(
            metadata.build(),
            HttpResponse::new(status, SdkBody::empty()),
        )
    }

    #[test]
    fn a_gone_object_is_permanent() {
        assert_eq!(
            classify(&service_error(Some("NoSuchKey"), 404)),
            Failure::Permanent
        );
        assert_eq!(classify(&service_error(None, 404)), Failure::Permanent);
    }

    #[test]
    fn throttling_and_unknown_codes_are_transient() {
        for (code, status) in [
            ("SlowDown", 503),
            ("ThrottlingException", 400),
            ("New", 400),
        ] {
            assert_eq!(
                classify(&service_error(Some(code), status)),
                Failure::Transient,
                "{code}"
            );
        }
    }

    #[test]
    fn a_refused_access_is_transient_so_that_a_fixed_role_loses_nothing() {
        assert_eq!(
            classify(&service_error(Some("AccessDenied"), 403)),
            Failure::Transient
        );
    }

    #[test]
    fn a_network_failure_is_transient() {
        let error: SdkError<ErrorMetadata, HttpResponse> = SdkError::timeout_error("5 s passed");
        assert_eq!(classify(&error), Failure::Transient);
    }
}
