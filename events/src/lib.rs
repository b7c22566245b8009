//! The wire contract: CloudEvents, the forms in which work arrives, MIME types and S3 URLs.
